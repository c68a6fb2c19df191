"""Equal budgets: how many steps each configuration gets."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edit_compile.distillation.recipe.schedule import phases_of, total_steps
from edit_compile.distillation.recipe.schema import FREE, Recipe, flatten
from edit_compile.distillation.run import distill
from edit_compile.distillation.train.metrics import MetricsRow
from edit_compile.errors import Interrupted, StudyError
from edit_compile.files import write_text
from edit_compile.frozen import Frozen, dump_except

_TIMED, _SKIPPED, _TURNS = 6, 2, 2  # steps of a phase in a short run, how many of them are not timed, and how many such runs
_WARMUP_SHARE = 5  # at least so many times the warm-up of a phase are its steps
_CHECKPOINTS = 10  # of a cell, at least


class StepTiming(Frozen):
    """The seconds that a step of each phase takes, of a configuration."""

    recipe: dict[str, Any]
    """Without the seed."""
    machine: str
    """On which it was timed."""
    seconds_per_step: tuple[float, ...]
    """As if it had been timed with the study's first configurations, by turns."""


def with_steps(recipe: Recipe, total: int) -> Recipe:
    """Give the phases of a recipe `total` steps together, in proportion to what they have; each gets one at least.

    Raises:
        StudyError: there are fewer steps than phases.
    """
    shares = [phase.options.steps / total_steps(recipe) for phase in phases_of(recipe)]
    if total < len(shares):
        raise StudyError(f"budget.steps: {total} cannot be shared by {len(shares)} phases: each needs one at least")
    return with_phase_steps(recipe, apportioned(shares, total))


def with_phase_steps(recipe: Recipe, steps: Sequence[int]) -> Recipe:
    """Give each phase of a recipe its number of steps; a warm-up takes a fifth of them at most."""
    content = recipe.model_dump(mode="json")
    phases = [content["layerwise"]] * (content["layerwise"] is not None) + content["stages"]
    for phase, count in zip(phases, steps, strict=True):
        phase |= {
            "steps": count,
            "warmup_steps": min(phase["warmup_steps"], count // _WARMUP_SHARE) if phase["warmup_steps"] >= 1 else phase["warmup_steps"],
        }
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


def with_seconds(recipe: Recipe, seconds: float, timing: StepTiming) -> Recipe:
    """Give the phases of a recipe the steps that take so many seconds, in proportion to what they have."""
    steps = [phase.options.steps for phase in phases_of(recipe)]
    factor = seconds / sum(count * each for count, each in zip(steps, timing.seconds_per_step, strict=True))
    return with_phase_steps(recipe, [max(round(count * factor), 1) for count in steps])


@dataclass(frozen=True)
class Timings:
    """What configurations take by name, and why that is not known of others: their short runs failed."""

    found: dict[str, StepTiming]
    failed: dict[str, Exception]


def timings(recipes: Mapping[str, Recipe], folder: Path, machine: str) -> Timings:
    """Time each recipe's steps, unless `folder` says how long they take: medians of short runs of all, by turns.

    Configurations that are added later take turns with one that was timed then. What that takes now and took then tells how busy
    the machine is, by which the others' times are multiplied: seconds are equal, whenever a configuration came.

    Args:
        machine: this one, in words.

    Raises:
        StudyError: some were timed on another machine.
        Interrupted: a signal asked to stop.
    """
    known = {name: timing for name, recipe in recipes.items() if (timing := _read(folder / f"{name}.json", recipe)) is not None}
    missing = [name for name in recipes if name not in known]
    if not missing:
        return Timings(known, {})
    elsewhere = next((timing.machine for timing in known.values() if timing.machine != machine), None)
    if elsewhere is not None:
        raise StudyError(
            f"budget.seconds: configuration {missing[0]!r} cannot be timed on this machine ({machine}): the others were on another "
            f"({elsewhere}); compare on that one, or choose another folder with -o"
        )
    failed: dict[str, Exception] = {}
    now = _timed({name: recipes[name] for name in (*list(known)[:1], *missing)}, failed)
    if known and not known.keys() & now.keys():
        name = next(iter(known))
        raise StudyError(f"budget.seconds: configuration {name!r} cannot be timed again, beside those that are new: {failed[name]}")
    slower = _slower(known, now)
    for name in missing:
        if name in now:
            seconds = tuple(each / slower for each in now[name])
            known[name] = timing = StepTiming(recipe=_identity(recipes[name]), machine=machine, seconds_per_step=seconds)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / f"{name}.json", timing.model_dump_json(indent=2))
    return Timings(known, failed)


def _timed(recipes: Mapping[str, Recipe], failed: dict[str, Exception]) -> dict[str, tuple[float, ...]]:
    """Time the steps of recipes by turns; what fails is noted, and left out."""
    rows: dict[str, list[MetricsRow]] = {name: [] for name in recipes}
    for _ in range(_TURNS):
        for name in [name for name in recipes if name not in failed]:
            try:
                rows[name] += _short_run(recipes[name])
            except Interrupted:
                raise Interrupted("stopped while the steps of the configurations were timed") from None
            except Exception as error:  # one configuration must not end the study for the others
                failed[name] = error
    return {name: _medians(recipe, rows[name]) for name, recipe in recipes.items() if name not in failed}


def _medians(recipe: Recipe, rows: Sequence[MetricsRow]) -> tuple[float, ...]:
    names = [phase.name for phase in phases_of(recipe)]
    steps = ([row["seconds_per_step"] for row in rows if row["phase"] == name and row["step"] > _SKIPPED] for name in names)
    return tuple(map(statistics.median, steps))


def _slower(then: Mapping[str, StepTiming], now: Mapping[str, tuple[float, ...]]) -> float:
    """Tell how many times as long steps take now as they took then, by what was timed both times."""
    both = [pair for name in then if name in now for pair in zip(now[name], then[name].seconds_per_step, strict=True)]
    return statistics.median(new / old for new, old in both) if both else 1.0


def _short_run(recipe: Recipe) -> list[MetricsRow]:
    content = with_phase_steps(recipe, [_TIMED] * len(phases_of(recipe))).model_dump(mode="json")
    content |= {"log_every": 1, "trackers": [], "samples": {"count": 1, "steps": 1}}
    fewest = max(recipe.validation.timestep_bins, recipe.timesteps.sampler_steps or 0)
    content["validation"] |= {"samples": fewest, "resolutions": []}
    rows: list[MetricsRow] = []
    with tempfile.TemporaryDirectory() as folder:
        distill(Recipe.model_validate(content), folder, report=rows.append)
    return rows


def _read(path: Path, recipe: Recipe) -> StepTiming | None:
    try:
        timing = StepTiming.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return timing if timing.recipe == _identity(recipe) else None


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe that its speed may depend on."""
    return {key: value for key, value in identity(recipe).items() if key != "seed"}


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe that the student depends on, as dotted keys."""
    (mark,) = FREE
    return flatten(json.loads(json.dumps(dump_except(recipe, mark))))
