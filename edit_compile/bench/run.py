"""A model, its conversions, their bound and their floors, timed in turns in one process.

The bound is the time of the model with its attention between image tokens taken out, projections and cross-attention kept: no design that
replaces this attention is faster. A design's floor is the bound and what the design adds, at the best rates of the machine's own kernels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from edit_compile.adapters.family import Extent, lookup_family
from edit_compile.adapters.inputs import ImageInputs, default_sizes, inputs_for_size
from edit_compile.adapters.random_model import random_model
from edit_compile.bench.conversion_cost import size_in_words
from edit_compile.bench.flops import telling_of_too_many_tokens
from edit_compile.bench.high_water import free_memory, measured_peak
from edit_compile.bench.latency import Timing
from edit_compile.bench.machine import machine_in_words
from edit_compile.bench.prediction import count_traffic, predict
from edit_compile.bench.primitives import as_call
from edit_compile.bench.profile import Share, parts_of_sites, profile_shares
from edit_compile.bench.roofline import Roofline, roofline
from edit_compile.bench.subjects import BOUND, TEACHER, Subject, Work, count_work, make_subjects
from edit_compile.bench.turns import repeats_for, repeats_of, seconds_of, time_in_turns
from edit_compile.config import LinearizeConfig
from edit_compile.designs.ops.parts import Part
from edit_compile.errors import ConfigError, GridError, NoExampleInputsError, first_line
from edit_compile.passes.capture import meta_inputs
from edit_compile.progress import each, working
from edit_compile.words import bytes_in_words

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchRow:
    """A forward of one subject at one size, batch 1.

    Attributes:
        name: "teacher", "bound" or a conversion's.
        size: in pixels, (height, width) or (frames, height, width).
        tokens: of the image.
        flops: counted.
        needs: bytes of tensors beside the weights, counted.
        problem: why it was not timed, with the figure; None if it was.
        seconds: of a forward.
        floor: seconds of the bound and what the conversion adds, at the machine's best rates; of conversions.
        predicted: seconds by what a forward does and the rates of the machine.
        speedup: the teacher's seconds over these, round by round.
        of_bound, of_floor: the bound's and the floor's seconds over these, round by round.
        peak: bytes beside the weights and all else that was there before, measured; None where the system does not tell.
        profile: shares of the time by part of a site and kind of work, as `profile_shares` has them, if that was asked for.
    """

    name: str
    size: Extent
    tokens: int
    flops: int
    needs: int
    problem: str | None = None
    seconds: Timing | None = None
    floor: Timing | None = None
    predicted: float | None = None
    speedup: Timing | None = None
    of_bound: Timing | None = None
    of_floor: Timing | None = None
    peak: int | None = None
    profile: Sequence[Share] = ()


@dataclass(frozen=True)
class BenchReport:
    """All rows, by size and subject, and what they depend on.

    Attributes:
        blocks: to how many blocks of a kind the model was cut; None for all.
        runs: timed rounds.
        machine: the processor and its threads.
        impossible: why there are no rows of a size, by the size in words.
    """

    model: str
    blocks: int | None
    device: str
    dtype: str
    compiled: bool
    runs: int
    machine: str
    torch: str
    rows: tuple[BenchRow, ...]
    impossible: Mapping[str, str]

    @property
    def sizes(self) -> tuple[Extent, ...]:
        """The sizes that have rows, in order."""
        return tuple(dict.fromkeys(row.size for row in self.rows))


@dataclass(frozen=True)
class Bench:
    """A model and its conversions, made and ready to be timed."""

    source: str
    blocks: int | None
    device: torch.device
    dtype: torch.dtype
    compiled: bool
    subjects: Sequence[Subject]

    @classmethod
    def make(
        cls,
        source: str,
        conversions: Mapping[str, LinearizeConfig],
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        blocks: int | None = None,
        compiled: bool = False,
    ) -> Bench:
        """Make a model with random weights, and its conversions by name.

        Args:
            source: a name as of `load_model`; weights are not loaded.
            device: default: cuda, if there is any.
            blocks: cut each run of equal blocks to so many.
            compiled: compile the repeated blocks, the teacher's too.

        Raises:
            ConfigError: the device is not there, the weights do not fit into its memory, or a conversion has a name that means something.
            ModelNotFoundError, NoExampleInputsError, PlanError, CaptureError: as `plan`.
        """
        place = _device(device)
        if taken := sorted(conversions.keys() & {TEACHER, BOUND}):
            raise ConfigError(f"no conversion can be called {taken[0]!r}: that is what it is compared with")
        model = random_model(source, blocks=blocks, device="meta").model
        if lookup_family(model) is None:
            raise NoExampleInputsError(
                f"{source} cannot be timed here: no adapter makes inputs of {type(model).__name__} at a size; in Python, "
                "edit_compile.compare_speed(student, sizes=[...], inputs_for=...) takes yours"
            )
        _check_weights(source, model, place, dtype)
        model = random_model(source, blocks=blocks, device=str(place), dtype=dtype).model
        return cls(source, blocks, place, dtype, compiled, make_subjects(model, conversions, compiled=compiled))

    def run(
        self, sizes: Sequence[Extent] | None = None, *, runs: int = 5, warmup: int = 2, profiled: bool = False, limit: float = math.inf
    ) -> BenchReport:
        """Time all subjects at all sizes.

        Args:
            sizes: (height, width) in pixels, or of videos (frames, height, width); default: those the model is used at.
            profiled: profile a forward of each, too.
            limit: seconds; a forward that should take longer is not tried.
        """
        rows: list[BenchRow] = []
        impossible: dict[str, str] = {}
        with working("measuring how fast this machine is"):
            rates = roofline(self.device, self.dtype)
        for size in sizes if sizes is not None else default_sizes(self.subjects[0].model):
            words = size_in_words(size)
            try:
                with working(f"{words} px: counting FLOPs and memory"), telling_of_too_many_tokens(words):
                    at_size = _SizeBench(self, size, self._inputs(size, torch.device("meta")), rates)
            except GridError as error:
                impossible[words] = str(error)
                continue
            try:
                rows += at_size.rows(runs, warmup, profiled, limit)
            except torch.OutOfMemoryError as error:  # of parts, or of subjects that fitted one by one: other sizes may fit
                impossible[words] = f"{words} px: {_out_of_memory(error)}"
        how = (str(self.device), str(self.dtype).removeprefix("torch."), self.compiled, runs)
        return BenchReport(self.source, self.blocks, *how, machine_in_words(), torch.__version__, tuple(rows), impossible)

    def _inputs(self, size: Extent, device: torch.device) -> ImageInputs:
        *frames, height, width = size
        model = self.subjects[0].model
        return inputs_for_size(model, height, width, frames=frames[0] if frames else None, device=device, dtype=self.dtype)

    def real_inputs(self, size: Extent) -> dict[str, Any]:
        """Make random inputs of a size on the device."""
        return self._inputs(size, self.device).inputs


class _SizeBench:
    """The subjects at one size."""

    def __init__(self, bench: Bench, size: Extent, inputs: ImageInputs, rates: Roofline) -> None:
        self.bench, self.size = bench, size
        self.work = {subject.name: count_work(subject, inputs) for subject in bench.subjects}
        self.predicted = dict(_predicted(bench, self.work, meta_inputs(inputs.inputs, bench.dtype), rates))
        self.tokens = math.prod(inputs.grid)

    def rows(self, runs: int, warmup: int, profiled: bool, limit: float) -> list[BenchRow]:
        bench, words = self.bench, size_in_words(self.size)
        rows = {s.name: self._row(s.name, self.work[s.name], limit) for s in bench.subjects}
        timed = [subject for subject in bench.subjects if rows[subject.name].problem is None]
        if not timed:
            return list(rows.values())
        inputs = bench.real_inputs(self.size)
        calls: dict[Any, Callable[[], Any]] = {}
        for subject in each(timed, f"{words} px: {'compiling and ' if bench.compiled else ''}warming up", len(timed)):
            call = partial(subject.model, **inputs)
            problem = _problem_of(call, warmup)
            if problem is None:
                calls[subject.name] = call
            else:
                rows[subject.name] = replace(rows[subject.name], problem=problem)
        parts = self._parts_as_calls(calls) if BOUND in calls else {}
        tried = {name: _seconds_and_peak(call, bench.device) for name, call in calls.items()}
        repeats: dict[Any, int] = {name: repeats_for(seconds) for name, (seconds, _) in tried.items()}
        repeats |= {part: repeats_of(call, bench.device) for part, (call, _) in parts.items()}
        everything = {**calls, **{part: call for part, (call, _) in parts.items()}}
        with working(f"{words} px: rounds", runs) as rounds:
            seconds = time_in_turns(everything, bench.device, runs=runs, warmup=0, repeats=repeats, done=rounds.advance)
        done = [self._timed(row, seconds, parts, tried[row.name][1]) if row.name in calls else row for row in rows.values()]
        return [replace(row, profile=self._profile(row.name, calls[row.name])) if profiled and row.name in calls else row for row in done]

    def _profile(self, name: str, call: Callable[[], Any]) -> tuple[Share, ...]:
        bench = self.bench
        model = next(subject.model for subject in bench.subjects if subject.name == name)
        sites = {site for subject in bench.subjects for site in subject.rewritten}
        return profile_shares(call, model, {} if bench.compiled else parts_of_sites(model, sorted(sites)), bench.device)

    def _row(self, name: str, work: Work, limit: float) -> BenchRow:
        free, predicted = free_memory(self.bench.device), self.predicted.get(name)
        problem = None
        if free is not None and work.memory > free:
            problem = f"needs {bytes_in_words(work.memory)}, {bytes_in_words(free)} are free: not tried"
        elif predicted is not None and predicted > limit:
            problem = f"should take {predicted:,.0f} s, the limit is {limit:g} s: not tried"
        return BenchRow(name, self.size, self.tokens, work.flops, work.memory, problem, predicted=predicted)

    def _parts_as_calls(self, calls: Mapping[Any, Any]) -> dict[Part, tuple[Callable[[], Any], float]]:
        wanted = dict.fromkeys(part for name in calls for part in self.work[name].parts)
        return {part: as_call(part, self.bench.device, self.bench.dtype) for part in wanted}

    def _timed(
        self,
        row: BenchRow,
        seconds: Mapping[Any, Sequence[float]],
        parts: Mapping[Part, tuple[Callable[[], Any], float]],
        peak: int | None,
    ) -> BenchRow:
        own, bound = seconds[row.name], seconds.get(BOUND)
        floor = None
        if bound is not None and row.name not in (TEACHER, BOUND):
            added = self.work[row.name].parts.items()
            floor = [least + sum(sites * parts[part][1] * seconds[part][i] for part, sites in added) for i, least in enumerate(bound)]

        def against(other: Sequence[float] | None) -> Timing | None:
            return Timing.of([a / b for a, b in zip(other, own, strict=True)]) if other is not None else None

        return replace(
            row,
            seconds=Timing.of(own),
            floor=Timing.of(floor) if floor is not None else None,
            speedup=against(seconds.get(TEACHER)),
            of_bound=against(bound),
            of_floor=against(floor),
            peak=peak,
        )


def _predicted(bench: Bench, work: Mapping[str, Work], inputs: Mapping[str, Any], rates: Roofline) -> Iterator[tuple[str, float]]:
    """Predict the seconds of all subjects, the bound's as of what is no attention between image tokens."""
    teacher, *others = bench.subjects
    for subject in others:
        traffic = count_traffic(teacher.structure, inputs, subject.rewritten)
        found = predict(traffic, work[subject.name].sites, rates, compiled=bench.compiled)
        yield from ((teacher.name, found.seconds_before), (subject.name, found.seconds_after))


@torch.no_grad()
def _problem_of(call: Callable[[], Any], times: int) -> str | None:
    """Make a call some times; say what was in the way, as memory, or a compiler."""
    try:
        for _ in range(max(1, times)):
            call()
    except torch.OutOfMemoryError as error:
        return _out_of_memory(error)
    except RuntimeError as error:
        log.debug("a forward failed", exc_info=error)
        return f"failed: {type(error).__name__}: {first_line(error)}"
    return None


def _seconds_and_peak(call: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Time a call, and measure its memory, once for both: it may take a minute."""
    seconds: list[float] = []
    peak = measured_peak(lambda: seconds.append(seconds_of(call, device)), device)
    if not seconds:  # memory cannot be measured here
        seconds.append(seconds_of(call, device))
    return seconds[0], peak


def _out_of_memory(error: torch.OutOfMemoryError) -> str:
    return f"ran out of memory: {first_line(error)}"


def _device(name: str | None) -> torch.device:
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device {chosen!r}: {first_line(error)}") from error
    return torch.device(chosen)


def _check_weights(source: str, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model whose weights, made in float32 before they are converted, do not fit."""
    free, number = free_memory(device), sum(p.numel() for p in model.parameters())
    needed = number * max(4, dtype.itemsize)
    if free is not None and needed > free:
        what = f"{bytes_in_words(needed)}, {bytes_in_words(free)} are free on {device}"
        raise ConfigError(f"{source}: its weights need {what}; cut it with --blocks N")
