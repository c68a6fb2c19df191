"""The layer-wise fit: every site learns its teacher's output, on the teacher's own activations, in one forward.

The whole model runs, without gradients, with each site's output replaced with its teacher's, so that every site receives
what it received before conversion. Within a site gradients are on, and the backward pass of its loss runs at once: there is none
through the rest of the model, and only one site's graph in memory at a time.
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
def layerwise_fit(student: nn.Module, share: float) -> Iterator[dict[str, Tensor]]:
    """Let a forward of the student leave every site's gradients in the parameters that require one.

    Gradients of shards are averaged over processes, those of unsharded parameters are this process's own.

    Args:
        share: the weight of this forward in the step's batch.

    Yields:
        The losses of the sites by path, float32: relative errors, averaged over the batch.
    """
    losses: dict[str, Tensor] = {}
    parameters = dict(student.named_parameters())  # in a forward, sites have full ones in the place of shards

    def begin(site: ConvertedSite, args: Any) -> None:
        torch.set_grad_enabled(True)

    def end(path: str, site: ConvertedSite, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        torch.set_grad_enabled(False)
        expected = site.edit_teacher_forward(*args, **kwargs)
        with torch.enable_grad():
            loss = relative_error(tensors_of(output), tensors_of(expected)).mean()
            trained = {f"{path}.{name}": p for name, p in site.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(loss * share, list(trained.values()), allow_unused=True) if trained else ()
        for (name, full), gradient in zip(trained.items(), found, strict=True):
            if gradient is not None:
                _add(parameters[name], mean_in_shards(_with_strides_of(full, gradient), parameters[name]))
        losses[path] = losses.get(path, 0) + loss.detach() * share
        return expected

    handles = []
    for path, site in converted_sites(student).items():
        handles.append(site.register_forward_pre_hook(begin))
        # Before all other hooks: those of FSDP free the full parameters.
        handles.append(site.register_forward_hook(partial(end, path), prepend=True, with_kwargs=True))
    try:
        with torch.no_grad():
            yield losses
    finally:
        for handle in handles:
            handle.remove()


def _with_strides_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Give a gradient the parameter's strides: optimizers' fused kernels walk the memory of both in the same order."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
