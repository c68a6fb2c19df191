"""The layer-wise warm start: every site fitted to its teacher, on the teacher's own activations, in one forward.

The whole model runs with each site's output replaced by its teacher's, so that every site receives what it received
before conversion. Inputs carry no gradient; each site's loss goes backward at once and ends within the site. There
is no backward through the rest of the model, and one site's graph in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.distill.features import relative_error, tensors_of
from edit_compile.sites import ConvertedSite, converted_sites


@contextmanager
def fitting(student: nn.Module, share: float) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward of the student leaves the gradient of every site's loss in the site's parameters.

    The forward must run with gradients enabled and nothing else trainable.

    Args:
        share: the weight of this forward in the step's batch.

    Yields:
        The losses of the sites by path, float32: relative errors, averaged over the batch.
    """
    losses: dict[str, Tensor] = {}

    def hook(site: ConvertedSite, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with torch.no_grad():
            expected = site.edit_teach(*args, **kwargs)
        loss = relative_error(tensors_of(output), tensors_of(expected)).mean()
        (loss * share).backward()
        losses[site.edit_path] = losses.get(site.edit_path, 0) + loss.detach() * share
        return expected

    handles = [site.register_forward_hook(hook, with_kwargs=True) for site in converted_sites(student).values()]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()
