"""From how many image tokens on a converted model runs what conversion put there: a number, counted, or measured on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from edit_compile.adapters.family import Extent
from edit_compile.adapters.inputs import default_sizes, pixels_per_token, tokens_of_size
from edit_compile.bench.conversion_cost import cost, size_in_words
from edit_compile.bench.latency import compare_speed
from edit_compile.bench.roofline import known_roofline
from edit_compile.errors import ConfigError, EditCompileError, GridError
from edit_compile.student.handle import conversion_of, unwrap

MinTokens = int | Literal["predicted", "measured"]
SMALLEST_SIDE = 4  # in image tokens, of what is measured
_RUNS = 5
_LONG = 2.0  # seconds of a forward, at which larger sizes are not tried: one of twice the side takes up to sixteen times as long


def set_min_tokens(student: Any, tokens: MinTokens, *, pipeline: str | None = None) -> int:
    """Let a converted model run as the original where there are too few image tokens for conversion to pay.

    It is decided call by call, for the whole model, bit for bit the original then, and saved with the student. Where gradients
    are recorded what conversion put there always runs, for it is what they train; so it does in graphs that torch.export makes,
    which hold for all sizes, and with LoRA on the model that is not the student's own.

    Args:
        student: a converted model, or what holds one: a pipeline, torch.compile.
        tokens: the number of image tokens from which on the student runs as converted, 0 for always, as before this call; or
            "predicted", where both should be equally fast by this machine's rates, or if `edit-compile bench` never measured them,
            where both need the same FLOPs; or "measured", where it is no slower than the teacher as both are now:
            on this device, compiled if they are. Both take some square sizes, "measured" of models with an adapter.
        pipeline: as for `cost`, for "predicted".

    Returns:
        The number.

    Raises:
        ConfigError: it is neither a number nor one of the two words.
        EditCompileError: the student is at no size the faster one.
        NoExampleInputsError: no adapter knows the model, so that nothing can be measured, nor counted without its pipeline: give a number.
    """
    model = unwrap(student)
    if tokens == "predicted":
        found = _predicted(model, pipeline)
    elif tokens == "measured":
        with min_tokens_set(model, 0):
            found = _measured(model)
    elif isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0:
        found = tokens
    else:
        raise ConfigError(f"min_tokens={tokens!r}: it is a number of image tokens, 0 for none, or 'predicted' or 'measured'")
    conversion_of(model).run_as_original_below(found)
    return found


@contextmanager
def min_tokens_set(model: nn.Module, tokens: int) -> Iterator[None]:
    """Let a converted model have another number inside, for all of its calls."""
    conversion = conversion_of(model)
    before = conversion.plan.min_tokens
    conversion.run_as_original_below(tokens)
    try:
        yield
    finally:
        conversion.run_as_original_below(before)


def _predicted(model: nn.Module, pipeline: str | None) -> int:
    weight = next(p for p in model.parameters() if p.is_floating_point())
    rates = known_roofline(weight.device, weight.dtype)
    report = cost(model, pipeline=pipeline, rates=rates)
    found = report.break_even_tokens if rates is None else report.break_even_predicted
    if found is None:
        raise EditCompileError(f"{type(model).__name__}: no size is known from which on the student needs less than its teacher")
    return found


def _measured(model: nn.Module) -> int:
    """Return the image tokens of the smallest square at which the student is no slower; 0 if it nowhere is."""
    *_, usual = default_sizes(model)
    fast: set[int] = set()

    def size_of(side: int) -> Extent:
        pixels = side * pixels_per_token(model)
        return (*usual[:-2], pixels, pixels)

    def is_fast_at(side: int) -> bool:
        try:
            (row,) = compare_speed(model, [size_of(side)], runs=_RUNS, warmup=1)
        except GridError as error:
            raise EditCompileError(
                f"{type(model).__name__}: the student is no faster at any size that it can be measured at: {error}"
            ) from error
        if row.speedup.median >= 1:
            fast.add(side)
        elif row.student.median > _LONG and not fast:
            slow = size_in_words(size_of(side))
            raise EditCompileError(
                f"{type(model).__name__}: the student is still the slower one at {slow} px: give a number of image tokens"
            )
        return side in fast

    side = smallest_side(is_fast_at, math.isqrt(cost(model).break_even_tokens or 0))
    if side == SMALLEST_SIDE:
        return 0
    *frames, height, width = size_of(side)
    return math.prod(tokens_of_size(model, height, width, *frames))


def smallest_side(is_fast: Callable[[int], bool], start: int) -> int:
    """Find the side in image tokens from which on squares are fast, to a sixteenth of it; `SMALLEST_SIDE` if all are.

    Args:
        start: where to begin.
    """
    slow, fast = SMALLEST_SIDE - 1, max(SMALLEST_SIDE, start)
    while not is_fast(fast):
        slow, fast = fast, 2 * fast
    while fast - slow > max(1, fast // 16):
        middle = (slow + fast) // 2
        slow, fast = (slow, middle) if is_fast(middle) else (middle, fast)
    return fast
