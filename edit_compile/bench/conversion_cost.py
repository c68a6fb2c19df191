"""What a conversion costs and saves: parameters added, and FLOPs of one forward before and after. No weights, no memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edit_compile.adapters.family import Extent, lookup_family
from edit_compile.adapters.inputs import pixels_per_token
from edit_compile.adapters.load_model import load_model
from edit_compile.api import plan_and_convert, plan_of, repeated_blocks, teacher, transformer_of
from edit_compile.bench.flops import block_keys, count_flops, telling_of_too_many_tokens
from edit_compile.bench.prediction import Prediction, count_traffic, predict
from edit_compile.bench.roofline import Roofline, known_rates
from edit_compile.bench.site_parts import layouts_noted, parts_by_site
from edit_compile.bench.sized_inputs import InputMaker, SizedInputs, usual_sizes
from edit_compile.config import LinearizeConfig
from edit_compile.errors import GridError, NoExampleInputsError, PlanError
from edit_compile.passes.capture import PROBE_DTYPE, meta_copy, meta_inputs
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.handle import conversion_of
from edit_compile.student.site import converted_sites


@dataclass(frozen=True)
class SiteCost:
    """FLOPs of one rewritten site in one forward, projections included; seconds predicted of what is replaced, and of what replaces it."""

    path: str
    before: int
    after: int
    seconds_before: float | None = None
    seconds_after: float | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of one forward, batch 1, at one size of images or videos.

    Attributes:
        height, width: in pixels.
        image, text: numbers of tokens; text is None if unknown.
        before, after: FLOPs of the whole model.
        sites: FLOPs of each rewritten site.
        frames: of a video; None for an image.
        seconds_before, seconds_after: predicted, compiled; None without rates of a machine.
    """

    height: int
    width: int
    image: int
    text: int | None
    before: int
    after: int
    sites: tuple[SiteCost, ...]
    frames: int | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None

    @property
    def size(self) -> str:
        """The size in pixels, "height x width", after the number of a video's frames."""
        return size_in_words(video_size(self.height, self.width, self.frames))

    @property
    def saved(self) -> int:
        return self.before - self.after

    @property
    def ratio(self) -> float:
        return self.before / self.after


@dataclass(frozen=True)
class CostReport:
    """The costs of a conversion at several image sizes.

    Attributes:
        parameters: of the model before conversion.
        added: parameters that the designs bring.
        costs: in ascending order of image tokens.
        errors: why a size could not be counted, by the size as in `Cost.size`.
        break_even_tokens: image tokens from which the conversion needs fewer FLOPs; 0 if at every size, None if unknown.
        pixels_per_token: along each side of the image; None if unknown.
        rates: of the machine that seconds are predicted for.
        break_even_predicted: image tokens from which the conversion should be faster on it; 0 if at every size, None if unknown.
    """

    parameters: int
    added: int
    costs: tuple[Cost, ...]
    errors: Mapping[str, str]
    break_even_tokens: int | None
    pixels_per_token: float | None
    rates: Roofline | None = None
    break_even_predicted: int | None = None


def added_parameters(student: nn.Module) -> int:
    """Count the parameters that the designs brought."""
    return sum(p.numel() for site in plan_of(student).rewritten for p in getattr(student.get_submodule(site.path), ADDED).parameters())


def cost(
    model: Any,
    sizes: Sequence[Extent] | None = None,
    *,
    text: int | None = None,
    config: LinearizeConfig | None = None,
    pipeline: str | None = None,
    rates: Roofline | None = None,
) -> CostReport:
    """Count a converted model against its teacher, or what converting a model would cost and save.

    Args:
        model: a converted model, or as for `plan`: a model, a pipeline, or a name; of a name no weights are loaded.
        sizes: (height, width) in pixels, or of videos (frames, height, width); default: those the model is used at.
        text: number of text tokens; default: as many as the model's pipeline passes.
        config: how to convert a model that is not converted yet.
        pipeline: the folder or hub id of the model's pipeline, asked for inputs where no adapter knows the model. Default: the
            name that was given.
        rates: of a machine, for which seconds are predicted, too.

    Raises:
        NoExampleInputsError: no adapter knows the model, and its pipeline is not known or fails.
        PlanError: the model can not be converted.
    """
    if isinstance(model, str):
        model = load_model(model, structure_only=True)
        pipeline = pipeline or model.pipeline
    structure = meta_copy(_converted(model, config), _dtype(rates))
    conversion_of(structure).run_as_original_below(0)
    conversion_of(structure).originals.clear()  # without values, its own weights are as good
    maker, keys = InputMaker(structure, pipeline), block_keys(structure, repeated_blocks(structure))
    costs: list[Cost] = []
    errors: dict[str, str] = {}
    for size in sizes if sizes is not None else usual_sizes(structure):
        try:
            with telling_of_too_many_tokens(size_in_words(size)):
                costs.append(_cost(structure, size, maker.at(size, text), keys, rates))
        except GridError as error:
            errors[size_in_words(size)] = str(error)
    costs.sort(key=lambda cost: cost.image)
    added = added_parameters(structure)
    total = sum(p.numel() for p in structure.parameters())
    faster = {cost.image: cost.seconds_before - cost.seconds_after for cost in costs if cost.seconds_before and cost.seconds_after}
    pixels = _pixels_per_token(structure, costs)
    return CostReport(total - added, added, tuple(costs), errors, break_even_tokens(costs), pixels, rates, _crossing(faster))


def predicted_speedups(student: nn.Module, pipeline: str | None = None) -> str | None:
    """Say in a line how much faster a converted model should be on this machine, at the sizes that it is used at.

    Args:
        pipeline: as for `cost`.

    Returns:
        None where the machine's rates were not measured (`edit-compile bench` does that), or nobody knows the model's inputs.
    """
    rates = known_rates()
    if rates is None:
        return None
    try:
        costs = cost(student, pipeline=pipeline, rates=rates).costs
    except NoExampleInputsError:
        return None
    found = ", ".join(f"{c.seconds_before / c.seconds_after:.2f}x at {c.size} px" for c in costs if c.seconds_before and c.seconds_after)
    return f"Predicted speed-up on {rates.device}, compiled, {rates.dtype}: {found}." if found else None


def _converted(model: Any, config: LinearizeConfig | None) -> nn.Module:
    transformer = transformer_of(model)
    if converted_sites(transformer):
        return transformer
    plan, student = plan_and_convert(model, config)
    if student is None:
        raise PlanError(f"no site of {plan.model} can be converted; print(edit_compile.plan(model)) says why")
    return student


def video_size(height: int, width: int, frames: int | None) -> Extent:
    """Put the number of a video's frames before its height and width; None for an image."""
    return (height, width) if frames is None else (frames, height, width)


def size_in_words(size: Extent) -> str:
    """Write a size as "height x width", or "frames x height x width"."""
    return " x ".join(map(str, size))


def _cost(structure: nn.Module, size: Extent, made: SizedInputs, keys: Mapping[str, Any], rates: Roofline | None) -> Cost:
    *_, height, width = size
    paths = [site.path for site in plan_of(structure).rewritten]
    inputs = meta_inputs(made.inputs, _dtype(rates))
    with made.stated(structure), layouts_noted(structure) as layouts:
        after = count_flops(structure, inputs, paths, keys)
    with teacher(structure):
        before = count_flops(structure, inputs, paths, keys)
        traffic = count_traffic(structure, inputs, paths) if rates is not None else None
    found = None
    if rates is not None and traffic is not None:
        # Of equal blocks one has run, and its layouts are those of the others.
        noted = {path: layouts[first] for path, first in after.ran.items() if first in layouts}
        parts = parts_by_site(structure, noted, tuple(made.grids[0]), made.text or 0)
        found = predict(traffic, parts, rates, compiled=True, batch=made.batch)
    flops = ((path, before.parts[path] // made.batch, after.parts[path] // made.batch) for path in paths)
    sites = tuple(SiteCost(path, old, new, *_seconds(found, path)) for path, old, new in flops)
    totals = before.total // made.batch, after.total // made.batch
    return Cost(height, width, made.image_tokens, made.text, *totals, sites, made.frames, *_seconds(found))


def _dtype(rates: Roofline | None) -> torch.dtype:
    """Return the type that a structure is counted in: of the numbers whose bytes are to take time."""
    return PROBE_DTYPE if rates is None else rates.number_type


def _seconds(found: Prediction | None, path: str | None = None) -> tuple[float | None, float | None]:
    if found is None:
        return None, None
    return (found.seconds_before, found.seconds_after) if path is None else (found.before[path], found.after[path])


def _pixels_per_token(structure: nn.Module, costs: Sequence[Cost]) -> float | None:
    """Return the side of an image token in pixels, as the adapter or the smallest image tells it."""
    if lookup_family(structure) is not None:
        return pixels_per_token(structure)
    images = [cost for cost in costs if cost.frames is None]
    return math.sqrt(images[0].height * images[0].width / images[0].image) if images else None


def break_even_tokens(costs: Sequence[Cost]) -> int | None:
    """Find the number of image tokens at which teacher and student need the same FLOPs.

    What is saved is a N^2 - b N: a linear part replaces the quadratic one, and the rest of the model stays. Two counts
    give a and b. With arXiv 2503.16726's softmax 4 N^2 C and convolutions 20 C^2 N / reduction, they meet near N = 5 C / reduction.
    """
    return _crossing({cost.image: cost.saved for cost in costs})


def _crossing(saved: Mapping[int, float]) -> int | None:
    """Find the number of image tokens from which something is saved, given how much is at some."""
    counted = {image: each / image for image, each in saved.items()}
    if len(counted) < 2:
        return None
    few, many = min(counted), max(counted)
    slope = (counted[many] - counted[few]) / (many - few)
    return max(0, math.ceil(few - counted[few] / slope)) if slope > 0 else None
