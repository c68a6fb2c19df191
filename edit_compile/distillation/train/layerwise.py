"""The layer-wise warm start: every site fitted to its teacher, on the teacher's own activations, in one forward.

The whole model runs, without gradients, with each site's output replaced by its teacher's, so that every site receives
what it received before conversion. Within a site gradients are on, and its loss goes backward at once: there is no backward
through the rest of the model, and one site's graph in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.distillation.train.distributed import mean_in_shards
from edit_compile.distillation.train.features import relative_error, tensors_of
from edit_compile.student.site import ConvertedSite, converted_sites


@contextmanager
def fitting(student: nn.Module, share: float) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward of the student leaves the gradient of every site's loss in those of its parameters that require one.

    Gradients of shards are averaged over processes, those of whole parameters are this process' own.

    Args:
        share: the weight of this forward in the step's batch.

    Yields:
        The losses of the sites by path, float32: relative errors, averaged over the batch.
    """
    losses: dict[str, Tensor] = {}
    parameters = dict(student.named_parameters())  # in a forward, sites have whole ones in the place of shards

    def begin(site: ConvertedSite, args: Any) -> None:
        torch.set_grad_enabled(True)

    def end(path: str, site: ConvertedSite, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        torch.set_grad_enabled(False)
        expected = site.edit_teach(*args, **kwargs)
        with torch.enable_grad():
            loss = relative_error(tensors_of(output), tensors_of(expected)).mean()
            trained = {f"{path}.{name}": p for name, p in site.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(loss * share, list(trained.values()), allow_unused=True) if trained else ()
        for (name, whole), gradient in zip(trained.items(), found, strict=True):
            if gradient is not None:
                _add(parameters[name], mean_in_shards(_laid_out_like(whole, gradient), parameters[name]))
        losses[path] = losses.get(path, 0) + loss.detach() * share
        return expected

    handles = []
    for path, site in converted_sites(student).items():
        handles.append(site.register_forward_pre_hook(begin))
        # First of all hooks: those of FSDP take the whole parameters away.
        handles.append(site.register_forward_hook(partial(end, path), prepend=True, with_kwargs=True))
    try:
        with torch.no_grad():
            yield losses
    finally:
        for handle in handles:
            handle.remove()


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """With the parameter's strides: optimizers' fused kernels go through the memory of both alike."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
