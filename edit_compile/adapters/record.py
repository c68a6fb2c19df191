"""Example inputs from one step of a diffusers pipeline."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.capture import bound_arguments
from edit_compile.errors import NoExampleInputsError


class _Received(Exception):
    """Stops the pipeline once its transformer was called."""


def record(pipe: Any, *args: Any, component: str = "transformer", **kwargs: Any) -> dict[str, Any]:
    """What a pipeline's transformer receives: the pipeline runs up to the first call and no further.

    Args:
        pipe: a diffusers pipeline.
        args, kwargs: of the pipeline's call. Choose a height and width that differ.
        component: the name of the transformer.

    Returns:
        Keyword arguments of the component's forward, for `example_inputs`.

    Raises:
        NoExampleInputsError: the pipeline has no such component, or never called it.
    """
    module = getattr(pipe, component, None)
    if not isinstance(module, nn.Module):
        names = [name for name, value in getattr(pipe, "components", {}).items() if isinstance(value, nn.Module)]
        raise NoExampleInputsError(f"{type(pipe).__name__} has no module {component!r}; it has: {', '.join(names)}")
    received: dict[str, Any] = {}

    def keep(submodule: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        received.update(bound_arguments(submodule, positional, named))
        raise _Received

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            pipe(*args, **{"num_inference_steps": 1, **kwargs})
    except _Received:
        return {name: _detached(value) for name, value in received.items()}
    finally:
        hook.remove()
    raise NoExampleInputsError(f"{type(pipe).__name__} finished without calling its {component}")


def _detached(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)
