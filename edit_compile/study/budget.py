"""Equal budgets: how many steps each configuration gets."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edit_compile.distillation.recipe.schedule import phases_of, total_steps
from edit_compile.distillation.recipe.schema import FREE, Recipe, flatten
from edit_compile.distillation.run import distill
from edit_compile.distillation.train.metrics import MetricsRow
from edit_compile.files import write_text
from edit_compile.frozen import Frozen, dump_except

_TIMED, _SKIPPED, _TURNS = 6, 2, 2  # steps of a phase in a short run, how many of them are not timed, and how many such runs
_WARMUP_SHARE = 5  # at least so many times the warm-up of a phase are its steps
_CHECKPOINTS = 10  # of a cell, at least


class Timing(Frozen):
    """The seconds that a step of each phase takes, of a configuration."""

    recipe: dict[str, Any]
    """Without the seed."""
    seconds_per_step: tuple[float, ...]


def with_steps(recipe: Recipe, total: int) -> Recipe:
    """Give the phases of a recipe `total` steps together, in proportion to what they have; each gets one at least."""
    shares = [phase.options.steps / total_steps(recipe) for phase in phases_of(recipe)]
    return with_phase_steps(recipe, apportioned(shares, max(total, len(shares))))


def with_phase_steps(recipe: Recipe, steps: Sequence[int]) -> Recipe:
    """Give each phase of a recipe its number of steps; a warm-up takes a fifth of them at most."""
    content = recipe.model_dump(mode="json")
    phases = [content["layerwise"]] * (content["layerwise"] is not None) + content["stages"]
    for phase, count in zip(phases, steps, strict=True):
        phase |= {"steps": count, "warmup_steps": min(phase["warmup_steps"], count // _WARMUP_SHARE)}
    return Recipe.model_validate(content)


def as_cell(recipe: Recipe) -> Recipe:
    """Give a recipe as many checkpoints as resuming needs, and only the trackers that it names: neither changes the student."""
    save_every = min(recipe.save_every, max(total_steps(recipe) // _CHECKPOINTS, 1))
    return recipe.model_copy(update={"save_every": save_every, "trackers": recipe.trackers or ()})


def apportioned(shares: Sequence[float], total: int) -> list[int]:
    """Split a total into whole numbers in proportion to shares, which sum to one, each at least one (largest remainders)."""
    spare = total - len(shares)
    exact = [max(share * total - 1, 0.0) for share in shares]
    exact = [part * spare / sum(exact) if sum(exact) else spare / len(shares) for part in exact]
    counts = [int(part) for part in exact]
    for index in sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])[: spare - sum(counts)]:
        counts[index] += 1
    return [count + 1 for count in counts]


def with_seconds(recipe: Recipe, seconds: float, timing: Timing) -> Recipe:
    """Give the phases of a recipe the steps that take so many seconds, in proportion to what they have."""
    steps = [phase.options.steps for phase in phases_of(recipe)]
    factor = seconds / sum(count * each for count, each in zip(steps, timing.seconds_per_step, strict=True))
    return with_phase_steps(recipe, [max(round(count * factor), 1) for count in steps])


def timings(recipes: Mapping[str, Recipe], folder: Path) -> dict[str, Timing]:
    """Time each recipe's steps, unless `folder` says how long they take: medians of short runs of all, by turns."""
    found = {name: _read(folder / f"{name}.json", recipe) for name, recipe in recipes.items()}
    missing = [name for name, timing in found.items() if timing is None]
    rows: dict[str, list[MetricsRow]] = {name: [] for name in missing}
    for _ in range(_TURNS):
        for name in missing:
            rows[name] += _short_run(recipes[name])
    for name in missing:
        names = [phase.name for phase in phases_of(recipes[name])]
        seconds = ([row["seconds_per_step"] for row in rows[name] if row["phase"] == phase and row["step"] > _SKIPPED] for phase in names)
        found[name] = timing = Timing(recipe=_identity(recipes[name]), seconds_per_step=tuple(map(statistics.median, seconds)))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{name}.json", timing.model_dump_json(indent=2))
    return {name: timing for name, timing in found.items() if timing is not None}


def _short_run(recipe: Recipe) -> list[MetricsRow]:
    content = with_phase_steps(recipe, [_TIMED] * len(phases_of(recipe))).model_dump(mode="json")
    content |= {"log_every": 1, "trackers": [], "samples": {"count": 1, "steps": 1}}
    content["validation"] |= {"samples": content["validation"]["timestep_bins"]}
    rows: list[MetricsRow] = []
    with tempfile.TemporaryDirectory() as folder:
        distill(Recipe.model_validate(content), folder, report=rows.append)
    return rows


def _read(path: Path, recipe: Recipe) -> Timing | None:
    try:
        timing = Timing.model_validate_json(path.read_text())
    except (OSError, ValidationError):
        return None
    return timing if timing.recipe == _identity(recipe) else None


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe that its speed may depend on."""
    return {key: value for key, value in identity(recipe).items() if key != "seed"}


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe that the student depends on, as dotted keys."""
    (mark,) = FREE
    return flatten(json.loads(json.dumps(dump_except(recipe, mark))))
