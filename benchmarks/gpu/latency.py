"""The latency table: a model, its conversions, their bound and floor, against the best softmax kernel of this machine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.step import Row, Unit, Work, in_gib, in_ms, problem_in, short

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True)
class Model:
    """What is timed.

    Attributes:
        source, tiny: names of the model, and of what stands for it in a rehearsal.
        designs: options of conversions, by name.
        heads, channels, text: of its attention between image tokens, and the other tokens in it.
        per_token: pixels along each side of an image token.
        paper: the speed-ups of arXiv 2503.16726 by the side in pixels.
        blocks: at a side, cut to so many blocks of a kind: where all of them take minutes.
    """

    source: str
    tiny: str
    designs: dict[str, dict[str, Any]]
    heads: int
    channels: int
    text: int
    paper: dict[int, float]
    blocks: dict[int, int]
    per_token: int = 16


MODELS = {
    "pixart-sigma": Model(
        "arch/pixart-sigma",
        "demo/dit",
        {"default": {}, "reduction 8": {"reduction": 8}},
        *(16, 72, 0),
        {1024: 1.4, 2048: 3.2, 4096: 10.3, 8192: 43},
        {},
    ),
    "sd3.5-medium": Model(
        "arch/sd3.5-medium",
        "demo/mm-dit",
        {"default": {}, "eta ratio, reduction 8": {"eta": "ratio", "reduction": 8}},
        *(24, 64, 333),
        {},
        {},
    ),
    "flux-dev": Model("arch/flux-dev", "demo/mm-dit", {"reduction 8": {"reduction": 8}}, *(24, 128, 512), {}, {8192: 2}),
}
SIDES, _TINY_SIDES = (1024, 2048, 4096, 8192), (16, 32)
_ROUNDS = {1024: 9, 2048: 7, 4096: 3, 8192: 3}
_SOFTMAX = "softmax kernels"
_NOISE = 0.02  # of a kernel's time


def units(name: str, tiny: bool) -> list[Unit]:
    sides = _TINY_SIDES if tiny else SIDES
    timed = [Unit(f"{side} px", partial(_at_size, name, side)) for side in sides]
    return [Unit(_SOFTMAX, partial(_softmax_kernels, name)), *timed[:2], Unit("int8", partial(_int8, name)), *timed[2:]]


# ------------------------------------------------------------------ softmax kernels


def _softmax_kernels(name: str, work: Work) -> list[Row]:
    """Time every softmax kernel there is on the model's own shapes; the fastest of torch's own is what the model is timed with."""
    rows = []
    for side in _TINY_SIDES if work.tiny else SIDES:
        seconds = _seconds_of_kernels(name, side, work)
        fastest = min((each for each in seconds.values() if each is not None), default=None)
        for kernel, each in seconds.items():
            rows.append({"side": side, "kernel": kernel, "ms": None if each is None else in_ms(each), "fastest": each == fastest})
    return rows


def _seconds_of_kernels(name: str, side: int, work: Work) -> dict[str, float | None]:
    """Time attention of all image tokens, and the text's where it is joint, once per kernel; None for one that cannot do it."""
    import torch

    from edit_compile.bench.turns import seconds_of

    model = MODELS[name]
    tokens = (side // model.per_token) ** 2 + model.text
    q, k, v = (torch.randn(1, model.heads, tokens, model.channels, device=work.device, dtype=work.dtype) for _ in range(3))
    found: dict[str, float | None] = {}
    for kernel, call in _kernels(work, q, k, v):
        row: Row = {}
        with problem_in(row, any_error=True), torch.no_grad():
            call()
            first = seconds_of(call, work.device)
            found[kernel] = first if first > 1 else min(first, *(seconds_of(call, work.device) for _ in range(4)))
        if row:  # as of a kernel that does not take these operands
            print(f"{kernel} at {tokens} tokens: {row['problem']}", flush=True)
            found[kernel] = None
    return found


def _kernels(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield softmax kernels: torch's, FlexAttention's, and those of packages that are installed."""
    import torch.nn.functional as F
    from torch.nn.attention import sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    def by(backend: Any) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    for title, backend in _backends(work).items():
        yield title, partial(by, backend)
    if not work.tiny:
        yield "FlexAttention", partial(work.kept_as("flex", lambda: work.compile(flex_attention)), q, k, v)
    for title, module, function in (
        ("flash-attn 3", "flash_attn_interface", "flash_attn_func"),
        ("flash-attn 2", "flash_attn", "flash_attn_func"),
    ):
        try:
            call = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, OSError):
            continue
        yield title, partial(call, *(x.transpose(1, 2).contiguous() for x in (q, k, v)))


def _backends(work: Work) -> dict[str, Any]:
    """Name torch's softmax kernels."""
    from torch.nn.attention import SDPBackend

    if work.tiny:
        return {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    return {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def _best_backend(name: str, side: int, work: Work) -> str | None:
    """Tell which of torch's softmax kernels was the fastest at a size; None if that was not measured.

    What was compiled before is kept with the kernel that it has, if no other one is faster by more than noise.
    """
    from benchmarks.gpu.results import Results

    ended = Results(work.out).state(f"latency-{name}", _SOFTMAX).ended
    own = _backends(work)
    rows = [row for row in (ended or {}).get("rows", ()) if row["side"] == side and row["kernel"] in own and row["ms"] is not None]
    found = {row["kernel"]: row["ms"] for row in rows}
    current = work.kept.get("preferred")
    if current in found and found[current] < (1 + _NOISE) * min(found.values()):
        return str(current)
    return min(found, key=lambda kernel: found[kernel]) if found else None


@contextmanager
def _preferring(kernel: str | None, work: Work) -> Iterator[None]:
    """Let torch choose a kernel wherever it can inside, as cross-attention with a mask may not.

    It chooses when code is compiled: what was compiled with another one is forgotten.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if work.kept.get("preferred", kernel) != kernel:
        torch.compiler.reset()
    work.kept["preferred"] = kernel
    if kernel is None:
        yield
        return
    own = _backends(work)
    with sdpa_kernel(list(dict.fromkeys([own[kernel], *own.values(), SDPBackend.MATH])), set_priority=True):
        yield


# ------------------------------------------------------------------ models


def _at_size(name: str, side: int, work: Work) -> list[Row]:
    """Time a model and its conversions at a size; the model in rounds with the conversions."""
    model = MODELS[name]
    blocks = 1 if work.tiny else model.blocks.get(side)
    kernel = _best_backend(name, side, work)
    with _preferring(kernel, work):
        bench = _bench(model, blocks, work)
        report = bench.run([(side, side)], runs=2 if work.tiny else _ROUNDS[side], warmup=1)
        used = _kernels_used(bench, side, work) if not work.tiny and report.rows else None
    if not report.rows:
        return [{"px": side, "model": "all", "problem": reason} for reason in report.impossible.values()]
    rows: list[Row] = []
    for row in report.rows:
        found: Row = {"px": side, "model": row.name, "image tokens": row.tokens}
        if blocks is not None:
            found["blocks"] = f"{blocks} of each kind"
        if row.seconds is not None:
            found |= {"ms": in_ms(row.seconds.median), "low": in_ms(row.seconds.low), "high": in_ms(row.seconds.high)}
        if row.speedup is not None and row.name not in ("teacher", "bound"):
            found |= {"teacher / it": short(row.speedup.median), "paper": model.paper.get(side)}
        found |= {what: f"{100 * share.median:.0f}%" for what, share in (("of bound", row.of_bound), ("of floor", row.of_floor)) if share}
        found |= {
            "predicted ms": None if row.predicted is None else in_ms(row.predicted),
            "peak GiB": in_gib(row.peak),
            "problem": row.problem,
        }
        if row.name == "teacher":
            found |= {"softmax": kernel, "kernels seen": used}
        rows.append(found)
    return rows


def _int8(name: str, work: Work) -> list[Row]:
    """Time the model and its first conversion with torchao's int8 weights and activations too, in turns with both as they are."""
    import copy

    import torch

    from edit_compile.api import block_options, repeated_blocks
    from edit_compile.bench.latency import Timing
    from edit_compile.bench.turns import time_in_turns

    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return [{"model": "int8", "problem": "torchao is not installed"}]
    rows: list[Row] = []
    sides = (_TINY_SIDES if work.tiny else SIDES)[:2]
    with _preferring(_best_backend(name, sides[0], work), work):
        bench = _bench(MODELS[name], 1 if work.tiny else None, work)
        models = {subject.name: subject.model for subject in bench.subjects[:2]}
        blocks = repeated_blocks(bench.subjects[1].model)
        for title, model in list(models.items()):
            models[f"{title}, int8"] = made = copy.deepcopy(model)
            quantize_(made, Int8DynamicActivationInt8WeightConfig())
            for path in blocks if bench.compiled else ():
                made.get_submodule(path).compile(**block_options())
        for side in sides:
            found: dict[str, Row] = {title: {"model": title, "side": side} for title in models}
            calls: dict[str, Callable[[], Any]] = {}
            for title, model in models.items():
                call = partial(model, **bench.real_inputs((side, side)))
                with problem_in(found[title], any_error=True), torch.no_grad():
                    call()
                    calls[title] = call
            seconds = time_in_turns(calls, work.device, runs=2 if work.tiny else _ROUNDS[side], warmup=1)
            for title, times in seconds.items():
                found[title]["ms"] = in_ms(Timing.of(times).median)
                if title != "teacher" and "teacher" in seconds:
                    found[title]["teacher / it"] = short(Timing.of([a / b for a, b in zip(seconds["teacher"], times, strict=True)]).median)
            rows += found.values()
    return rows


def _bench(model: Model, blocks: int | None, work: Work) -> Any:
    """Return the model and its conversions, compiled, which units keep for each other as long as they want as many blocks."""
    import gc

    import torch

    if work.kept.get("blocks", blocks) != blocks:
        work.kept.pop("bench", None)
        torch.compiler.reset()
        gc.collect()
    work.kept["blocks"] = blocks
    return work.kept_as("bench", partial(_make, model, blocks, work))


def _make(model: Model, blocks: int | None, work: Work) -> Any:
    from edit_compile.bench.run import Bench
    from edit_compile.config import LinearizeConfig

    designs = list(model.designs.items())[: 1 if work.tiny else None]
    conversions = {name: LinearizeConfig(**options) for name, options in designs}
    options: dict[str, Any] = {"device": work.device.type, "dtype": work.dtype, "compiled": not work.tiny, "blocks": blocks}
    return Bench.make(model.tiny if work.tiny else model.source, conversions, **options)


def _kernels_used(bench: Any, side: int, work: Work) -> str | None:
    """Name the kernels of attention that a forward of the model runs, by the profiler: what torch did choose."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if work.seconds_left < 90:
        return None
    inputs = bench.real_inputs((side, side))
    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as found:
        bench.subjects[0].model(**inputs)
    names = {event.key for event in found.key_averages() if any(word in event.key.lower() for word in ("flash", "fmha", "cudnn", "sdpa"))}
    return "; ".join(sorted(name[:80] for name in names))[:240] or None
