"""Measuring a candidate: the layerwise fit of all its sites at once, then the model's error with each of them converted alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.adapters.family import Extent
from edit_compile.adapters.inputs import inputs_for_size
from edit_compile.api import teacher
from edit_compile.bench.conversion_cost import cost
from edit_compile.bench.latency import compare_calls
from edit_compile.bench.machine import machine_in_words
from edit_compile.distillation.context import Context, trained_parameters
from edit_compile.distillation.evaluate.validation import error_of, error_sums, samples_of, validation_batches
from edit_compile.distillation.ranking.folder import CandidateFolder, Costs, ErrorSums, Times
from edit_compile.distillation.recipe.schedule import Phase
from edit_compile.distillation.train.checkpoints import load_newest
from edit_compile.distillation.train.interrupt import Interrupt
from edit_compile.distillation.train.train_context import only_trainable
from edit_compile.distillation.train.trainer import Trainer
from edit_compile.errors import DistillError, GridError, Interrupted
from edit_compile.progress import working
from edit_compile.student.checkpoint import save

_RUNS, _WARMUP = 15, 3  # timed calls


def fit(context: Context, phase: Phase, folder: CandidateFolder, base: str, interrupt: Interrupt) -> None:
    """Fit all sites of a student to their teacher's, or go on with it, and save the student.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was saved.
        DistillError: too many consecutive steps had to be skipped, or a checkpoint could not be written.
    """
    with only_trainable(context.student, set(trained_parameters(context.student, context.recipe.train))):
        trainer = Trainer(context, folder.checkpoints, lambda row: None, interrupt, {}, lambda total: None, [phase])
        trainer.run(load_newest(folder.checkpoints))
    save(context.student, folder.path, base=base)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


@torch.no_grad()
def measure_errors(context: Context, phase: Phase, paths: Sequence[str], folder: CandidateFolder, interrupt: Interrupt, name: str) -> None:
    """Measure the model's error with each of some sites converted and all others as they were, or go on with it.

    Raises:
        Interrupted: a signal asked to stop; what is measured was saved.
    """
    batches, known = validation_batches(context), folder.errors()
    nothing = [[0.0] * 4] * context.recipe.validation.timestep_bins
    sums = {path: torch.tensor(known.sums[path] if known.batches else nothing, dtype=torch.float64) for path in paths}
    with working("one site at a time", len(batches), known.batches) as work:
        for done in range(known.batches, len(batches)):
            if interrupt.requested:
                raise Interrupted(f"stopped measuring {name} after {done} of {len(batches)} batches")
            bins, batch = samples_of(context, phase.height, phase.width, phase.frames, batches[done])
            with teacher(context.student) as model:
                expected = context.predict(model, batch)
            for path in paths:
                with teacher(context.student, students=[path]) as model:
                    sums[path].index_add_(0, bins, error_sums(context.predict(model, batch), expected))
            folder.write(ErrorSums(fit=known.fit, batches=done + 1, sums={path: _rows(found) for path, found in sums.items()}))
            work.advance()


def _rows(sums: Tensor) -> tuple[tuple[float, float, float, float], ...]:
    return tuple((a, b, c, d) for a, b, c, d in sums.tolist())


def errors_of(found: ErrorSums, path: str) -> tuple[float, tuple[float, ...]]:
    """Compute a site's error, over all timesteps and over each bin.

    Raises:
        DistillError: the teacher predicts the same value everywhere, or one of the two NaN or infinity; names the site.
    """
    sums = torch.tensor(found.sums[path], dtype=torch.float64)
    try:
        return error_of(sums.sum(0)), tuple(error_of(row) for row in sums if row[3])  # a sampler of few steps leaves bins empty
    except DistillError as error:
        raise DistillError(f"with {path} converted, {error}") from error


def count_costs(student: nn.Module, size: Extent, paths: Sequence[str], pipeline: str | None) -> Costs:
    """Count FLOPs of one forward of the model as it is, and those that each site saves.

    Raises:
        GridError: the model does not support the size.
        NoExampleInputsError: no adapter knows the model, and its pipeline is not known or fails.
    """
    report = cost(student, [size], pipeline=pipeline)
    if report.errors:
        raise GridError(next(iter(report.errors.values())))
    (found,) = report.costs
    saved = {site.path: site.before - site.after for site in found.sites if site.path in paths}
    return Costs(image_tokens=found.image, text_tokens=found.text, total=found.before, saved=saved)


def inputs_at(student: nn.Module, size: Extent) -> dict[str, Any]:
    """Make random inputs of one forward at a size in pixels, as keyword arguments.

    Raises:
        GridError: the model does not support the size.
        NoExampleInputsError: no adapter knows the model.
    """
    *frames, height, width = size
    weight = next(p for p in student.parameters() if p.is_floating_point())
    options: dict[str, Any] = {"frames": frames[0] if frames else None, "device": weight.device, "dtype": weight.dtype}
    return inputs_for_size(student, height, width, **options).inputs


@torch.no_grad()
def measure_times(student: nn.Module, size: Extent, paths: Sequence[str]) -> Times:
    """Time the model as it is, and every site against its teacher by alternating calls, with what the site gets in a forward.

    Raises:
        GridError: the model does not support the size.
        NoExampleInputsError: no adapter knows the model.
    """
    inputs = inputs_at(student, size)
    saved: dict[str, float] = {}

    def compare(path: str, site: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls = partial(site.edit_teacher, *args, **kwargs), partial(site.forward, *args, **kwargs)
        before, after, *_ = compare_calls(*calls, runs=_RUNS, warmup=_WARMUP)
        saved[path] = before.median - after.median
        work.advance()

    def as_it_is() -> None:
        with teacher(student):
            student(**inputs)

    handles = [student.get_submodule(path).register_forward_hook(partial(compare, path), with_kwargs=True) for path in paths]
    try:
        with working("timing sites", len(paths)) as work:
            student(**inputs)  # the grid is known inside
    finally:
        for handle in handles:
            handle.remove()
    total, *_ = compare_calls(as_it_is, as_it_is, runs=_RUNS, warmup=_WARMUP)
    return Times(machine=machine_in_words(), total=total.median, saved=saved)
