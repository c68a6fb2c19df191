"""What a pipeline calls its denoiser with, step by step: training data for models that no adapter knows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.adapters.pipelines import denoiser_name, dtype_kwarg, load_diffusers_pipeline
from edit_compile.errors import DistillError, first_line
from edit_compile.passes.capture import bound_arguments

FRAMES = "num_frames"  # the argument of pipelines that make videos
Call = dict[str, Any]  # keyword arguments of one forward, its tensors on the CPU


class CallRecorder:
    """A pipeline round a model, which samples to record how it calls the model."""

    def __init__(self, base: str, model: nn.Module, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> None:
        """
        Args:
            base: the pipeline's folder or hub id.
            options: keyword arguments of its call, besides prompt, size and generator.

        Raises:
            DistillError: it cannot be loaded, or does not accept an option.
        """
        try:
            pipe = load_diffusers_pipeline(base, **dtype_kwarg(dtype))
        except Exception as error:  # a folder that is not a pipeline fails in many ways
            raise DistillError(f"{base} cannot be loaded as a pipeline: {first_line(error)}") from error
        pipe.register_modules(**{denoiser_name(pipe) or "transformer": model})
        self.pipe, self.model = pipe.to(device), model
        self.accepted = inspect.signature(type(pipe).__call__).parameters
        if unknown := sorted(options.keys() - self.accepted.keys()):
            raise DistillError(f"data.call: {type(pipe).__name__} does not take {', '.join(unknown)}")
        pipe.set_progress_bar_config(disable=True)
        self.options = {name: value for name, value in {"output_type": "latent", **options}.items() if name in self.accepted}

    @torch.no_grad()
    def calls(self, prompt: str, height: int, width: int, seed: int, frames: int | None = None) -> list[Call]:
        """Sample once at a size in pixels, and return all calls of the model, in order.

        Args:
            frames: of a video; None for an image, or as many as are the pipeline's default.

        Raises:
            DistillError: the pipeline fails, does not call the model, or makes no videos.
        """
        if frames is not None and FRAMES not in self.accepted:
            raise DistillError(f"{type(self.pipe).__name__} takes no {FRAMES}: leave frames out of the recipe")
        found: list[Call] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_on_cpu(bound_arguments(module, args, kwargs)))

        hook = self.model.register_forward_pre_hook(keep, with_kwargs=True)
        size = {name: value for name, value in (("height", height), ("width", width)) if name in self.accepted}
        size |= {} if frames is None else {FRAMES: frames}
        try:
            self.pipe(prompt=prompt, **{**self.options, **size}, generator=torch.Generator().manual_seed(seed))
        except Exception as error:
            raise DistillError(
                f"{type(self.pipe).__name__} failed at {height} x {width} px with {prompt!r}: {first_line(error)}"
            ) from error
        finally:
            hook.remove()
        if not found:
            raise DistillError(f"{type(self.pipe).__name__} did not call its {type(self.model).__name__}")
        return found


def merged(calls: Sequence[Call]) -> Call:
    """Put calls into one batch: tensors whose first dimension is the batch are joined along it, and all else must be equal.

    Raises:
        DistillError: they differ in more than that.
    """
    if len(calls) == 1:
        return calls[0]
    flat = [pytree.tree_flatten(call) for call in calls]
    if any(spec != flat[0][1] for _, spec in flat[1:]):
        raise DistillError("calls of this pipeline differ in their structure; set micro_batch_size: 1 and validation.batch_size: 1")
    rows = batch_size(calls[0])
    leaves = [_joined(column, rows) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
    merged_call: Call = pytree.tree_unflatten(leaves, flat[0][1])
    return merged_call


def repeated(call: Call, number: int) -> Call:
    """Put `number` equal calls into one batch, as `merged` does."""
    rows = batch_size(call)

    def leaf(value: Any) -> Any:
        along_batch = isinstance(value, Tensor) and value.ndim and value.shape[0] == rows
        return torch.cat([value] * number) if along_batch else value

    several: Call = pytree.tree_map(leaf, call)
    return several


def batch_size(call: Call) -> int:
    """Return the first dimension of the tensor with most dimensions, and of these the largest: the noisy images or videos."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim > 1]
    return max(tensors, key=lambda x: (x.ndim, x.numel())).shape[0] if tensors else 1


def _joined(column: Sequence[Any], rows: int) -> Any:
    first = column[0]
    if not isinstance(first, Tensor):
        same = all(value == first for value in column[1:])
    elif first.ndim and first.shape[0] == rows and all(x.shape == first.shape for x in column):
        return torch.cat(list(column))
    else:
        same = all(x.shape == first.shape and torch.equal(x, first) for x in column[1:])
    if not same:
        raise DistillError("calls of this pipeline differ in size; set micro_batch_size: 1 and validation.batch_size: 1")
    return first


def call_as_recorded(model: nn.Module, x: Tensor, timesteps_B: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    """Make the calls that `conditions` holds; returns the predictions, (B, n), of a sample with and without its prompt in one row."""
    output = model(**conditions)
    prediction = output if isinstance(output, Tensor) else output[0]
    if not isinstance(prediction, Tensor):  # a list of images
        prediction = torch.stack(list(prediction))
    return prediction.reshape(len(timesteps_B), -1)


def _on_cpu(call: Call) -> Call:
    copied: Call = pytree.tree_map(lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, call)
    return copied
