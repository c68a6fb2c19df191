"""Example inputs from one step of a diffusers pipeline."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.errors import NoExampleInputsError
from edit_compile.passes.capture import bound_arguments


class _Received(Exception):
    """Raised to stop the pipeline once its transformer has been called."""


def record(pipe: Any, *args: Any, component: str = "transformer", **kwargs: Any) -> dict[str, Any]:
    """Record what a pipeline passes to its transformer. The pipeline stops at the first call.

    Args:
        pipe: a diffusers pipeline.
        args, kwargs: of the pipeline's call. Defaults, for those it accepts: a prompt, two images per prompt (a batch of
            one would become a constant of the graph), 256 x 384 pixels, one step.
        component: the name of the transformer in the pipeline.

    Returns:
        Keyword arguments of the component's forward, for `example_inputs`.

    Raises:
        NoExampleInputsError: the pipeline has no such component, or it failed or finished without calling it.
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
            pipe(*args, **_completed(pipe, args, kwargs))
    except _Received:
        return {name: _detached(value) for name, value in received.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise NoExampleInputsError(f"{type(pipe).__name__} failed before it called its {component}: {error}") from error
    finally:
        hook.remove()
    raise NoExampleInputsError(f"{type(pipe).__name__} finished without calling its {component}")


def _completed(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add defaults for what the pipeline accepts and was not given."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    given = {*kwargs, *list(accepted)[1 : len(args) + 1]}
    defaults: dict[str, Any] = {"num_inference_steps": 1, "num_images_per_prompt": 2, "num_videos_per_prompt": 2}
    if not given & {"height", "width"}:
        defaults |= {"height": 256, "width": 384}
    if "prompt_embeds" not in given:
        defaults["prompt"] = "a photo"
    return {name: value for name, value in defaults.items() if name in accepted and name not in given} | kwargs


def _detached(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)
