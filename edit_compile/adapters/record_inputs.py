"""The inputs of a model's forward: by its family's adapter, or recorded from one step of its pipeline."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.adapters.family import lookup_family
from edit_compile.adapters.inputs import example_inputs
from edit_compile.adapters.pipeline_structure import pipeline_structure
from edit_compile.adapters.pipelines import DENOISERS, denoiser_name, load_diffusers_pipeline
from edit_compile.errors import EditCompileError, NoExampleInputsError, first_line
from edit_compile.passes.capture import bound_arguments

FRAMES = 25  # of videos: one, and a multiple of 4, 6 and 8, by which pipelines' VAEs compress time
_SAMPLES = ("num_images_per_prompt", "num_videos_per_prompt")  # arguments of pipelines: how many of each prompt


class _Received(Exception):
    """Raised to stop the pipeline once its transformer has been called."""


def inputs_of(model: nn.Module, pipeline: Any = None) -> dict[str, Any]:
    """Make keyword arguments of one small forward.

    Args:
        pipeline: the model's, or its folder or hub id, whose weights are loaded only if it cannot do without; asked where no
            adapter knows the model.

    Raises:
        NoExampleInputsError: no adapter knows the model, and there is no pipeline, or it fails before it calls the model.
    """
    if pipeline is None or lookup_family(model) is not None:
        return example_inputs(model)
    if not isinstance(pipeline, str):
        return record(pipeline)
    try:
        return record(pipeline_structure(pipeline))
    except (EditCompileError, ImportError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        return _record_with_weights(pipeline, error)


def _record_with_weights(pipeline: str, reason: Exception) -> dict[str, Any]:
    try:
        loaded = load_diffusers_pipeline(pipeline)
    except Exception as error:
        raise NoExampleInputsError(
            f"{pipeline}: the inputs of its denoiser cannot be recorded without weights ({reason}), and these cannot be loaded "
            f"({error}); give them: example_inputs=dict(...) (inspect and convert: --example-inputs FILE)"
        ) from error
    return record(loaded)


def record(pipe: Any, *args: Any, component: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """Record what a pipeline passes to its transformer or UNet. The pipeline stops at the first call.

    Args:
        pipe: a diffusers pipeline.
        args, kwargs: of the pipeline's call. Defaults, for those it accepts: a prompt, two images per prompt (a batch of
            one would become a constant of the graph), 256 x 384 pixels, 25 frames, one step.
        component: the name of the network in the pipeline. Default: its transformer, or its UNet.

    Returns:
        Keyword arguments of the component's forward, for `example_inputs`.

    Raises:
        NoExampleInputsError: the pipeline has no such component, or it failed or finished without calling it.
    """
    component = component or denoiser_name(pipe) or DENOISERS[0]
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
    except Exception as error:
        raise NoExampleInputsError(
            f"{type(pipe).__name__} failed before it called its {component}: {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        hook.remove()
    raise NoExampleInputsError(f"{type(pipe).__name__} finished without calling its {component}")


def one_sample(pipe: Any) -> dict[str, Any]:
    """Return arguments for `record` with which a pipeline makes a single sample."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    return {"prompt": "a photo"} | {name: 1 for name in _SAMPLES if name in accepted}


def _completed(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add defaults for what the pipeline accepts and was not given."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    given = {*kwargs, *list(accepted)[1 : len(args) + 1]}
    defaults: dict[str, Any] = {"num_inference_steps": 1, **dict.fromkeys(_SAMPLES, 2)}
    if not given & {"height", "width"}:
        defaults |= {"height": 256, "width": 384}
    if "num_frames" in accepted:
        defaults["num_frames"] = FRAMES
    if "prompt_embeds" not in given:
        several = set(_SAMPLES) & accepted.keys()
        defaults["prompt"] = "a photo" if several else ["a photo", "a painting"]
    return {name: value for name, value in defaults.items() if name in accepted and name not in given} | kwargs


def _detached(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)
