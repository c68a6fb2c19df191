"""Kernels against what Inductor makes of the same formulas: windows by FlexAttention or in blocks, exact eta, the linear core, Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.step import Row, Unit, Work, in_gib, in_ms, problem_in, short

if TYPE_CHECKING:
    from torch import Tensor

HEADS = {"sd3.5-medium": (24, 64, 333), "flux-dev": (24, 128, 512), "pixart-sigma": (16, 72, 300)}  # heads, their channels, text tokens
_TINY_HEADS = {"tiny": (2, 16, 5)}
SIDES, _TINY_SIDES = (64, 128, 256), (12,)  # of the grid of image tokens
RADII = (8, 4)  # of CLEAR and of local-linear
_RUNS, _TINY_RUNS = 7, 2


def units(tiny: bool) -> list[Unit]:
    models = _TINY_HEADS if tiny else HEADS
    kinds: dict[str, Callable[..., list[Row]]] = {"windows": _windows, "eta": _eta, "linear": _linear, "Triton": _triton}
    return [Unit(f"{kind} {name}", partial(run, name, *sizes)) for kind, run in kinds.items() for name, sizes in models.items()]


def _windows(name: str, heads: int, channels: int, text: int, work: Work) -> list[Row]:
    """Time a window of softmax attention in both ways, forward and with its backward pass."""
    import torch

    from edit_compile.designs.ops.local_attention import Window, attention_in_blocks, flex_attention_within

    rows = []
    for radius in RADII[-1:] if work.tiny else RADII:
        ways = {"FlexAttention": flex_attention_within, "blocks": attention_in_blocks}
        compiled = {way: work.compile(_window_call(function, Window(radius), channels**-0.5)) for way, function in ways.items()}
        for side in _sides(work):
            shape = torch.empty((), device=work.device).expand(side, side)
            q, k, v = _operands(work, heads, side * side, channels)
            what = {"what": f"window of radius {radius}", "heads": f"{name}: {heads} x {channels}", "tokens": side * side}
            calls = {way: partial(call, q, k, v, shape) for way, call in compiled.items()}
            rows += _forward(what, calls, work, reference="blocks")
            if work.seconds_left > 60 or work.tiny:
                ways_back = ["blocks"] if work.tiny else list(ways)  # FlexAttention has no backward pass on CPUs
                training = {way: partial(_with_backward, compiled[way], q, k, v, shape) for way in ways_back}
                rows += _forward({**what, "what": f"{what['what']}, and backward"}, training, work, reference="blocks")
            del q, k, v, calls
    return rows


def _window_call(function: Callable[..., Any], window: Any, scale: float) -> Any:
    """Make a module of tensors alone, the grid as the shape of one; its own numbers are constants in the graph, as a design's are."""
    from torch import nn

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.window, self.scale = window, scale

        def forward(self, q: Tensor, k: Tensor, v: Tensor, shape: Tensor) -> Any:
            return function(q, k, v, tuple(shape.shape), self.window, self.scale)

    return Call()


def _eta(name: str, heads: int, channels: int, text: int, work: Work) -> list[Row]:
    """Time softmax attention to text with its normaliser: by torch's fused kernels, by FlexAttention, and by its formula."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    from edit_compile.designs.ops.linear_attention import attention_with_normaliser, exact_scores, softmax_with_normaliser

    def by_formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_with_normaliser(exact_scores(q, k, channels**-0.5), v)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_normaliser(q, k, v, None, channels**-0.5)

    def by_flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y, beside = flex_attention(q, k, v, scale=channels**-0.5, return_aux=AuxRequest(lse=True))
        return y, beside.lse

    ways = {"fused kernel": work.compile(fused), "formula": work.compile(by_formula), "FlexAttention": work.compile(by_flex)}
    rows = []
    for side in _sides(work):
        q = _operands(work, heads, side * side, channels)[0]
        _, k, v = _operands(work, heads, text, channels)
        what = {"what": "exact eta", "heads": f"{name}: {heads} x {channels}", "tokens": side * side}
        rows += _forward(what, {way: partial(call, q, k, v) for way, call in ways.items()}, work, reference="formula")
    return rows


def _linear(name: str, heads: int, channels: int, text: int, work: Work) -> list[Row]:
    """Time the linear core against its two products alone, and the compressor against copying what it reads and writes."""
    import torch
    import torch.nn.functional as F

    from edit_compile.designs.ops.conv_modules import SpatialCompressor
    from edit_compile.designs.ops.linear_attention import linear_attention

    rows, core = [], work.compile(lambda q, k, v: linear_attention(F.relu(q), F.relu(k), v)[0])
    width = heads * channels
    compressor = SpatialCompressor(width).to(work.device, work.dtype)
    compress = work.compile(lambda x, shape: compressor(x.unflatten(1, tuple(shape.shape)).movedim(-1, 1)).flatten(2).transpose(1, 2))
    for side in _sides(work):
        q = _operands(work, heads, side * side, channels)[0]
        _, k, v = _operands(work, heads, side * side // 4, channels)
        what = {"heads": f"{name}: {heads} x {channels}", "tokens": side * side}
        ways = {"compiled": partial(core, q, k, v), "two products": lambda q=q, k=k, v=v: q @ (k.transpose(-1, -2) @ v)}
        rows += _forward({"what": "linear core", **what}, ways, work)
        x, shape = (
            torch.randn(1, side * side, width, device=work.device, dtype=work.dtype),
            torch.empty((), device=work.device).expand(side, side),
        )
        ways = {"compiled": partial(compress, x, shape), "copies": lambda x=x: (x.clone(), x[:, ::4].clone())}
        rows += _forward({"what": "compressor", **what}, ways, work)
    return rows


def _triton(name: str, heads: int, channels: int, text: int, work: Work) -> list[Row]:
    """Compare the Triton kernels with Inductor's forms, as `measure_kernels` does, and time the compressors of K and V in one kernel."""
    import torch

    from edit_compile.bench.kernels import compare
    from edit_compile.designs.ops.conv_modules import SpatialCompressor
    from edit_compile.designs.ops.kernels.choice import KernelCase

    rows, width, weight = [], heads * channels, torch.empty(1, device=work.device, dtype=work.dtype)
    linear = KernelCase(operator="linear_attention", sizes=(heads, channels, channels), features="relu")
    for case in (linear, KernelCase(operator="depthwise", sizes=(width, 2))):
        found = compare(case, weight, tuple(_sides(work)), _TINY_RUNS if work.tiny else _RUNS, **work.compiler)
        for side, triton, inductor in zip(_sides(work), found.kernel, found.inductor, strict=True):
            row = {"what": f"Triton: {case.operator}", "heads": f"{name}: {heads} x {channels}", "tokens": side**2}
            row |= {"ms": in_ms(triton), "Inductor's ms": in_ms(inductor), "is used": str(found.wins)}
            rows.append({**row, "relative error": short(found.kernel_error)})
    modules = [SpatialCompressor(width).to(work.device, work.dtype).conv for _ in range(2)]
    weights, biases = [conv.weight for conv in modules], [conv.bias for conv in modules]
    ways: dict[str, Callable[..., Any]] = {
        "convolutions": lambda *images: [conv(image) for conv, image in zip(modules, images, strict=True)],
        "a kernel each": lambda *images: [
            torch.ops.edit_compile.depthwise([image], [conv.weight], [conv.bias], 2)[0] for conv, image in zip(modules, images, strict=True)
        ],
        "one kernel": lambda *images: torch.ops.edit_compile.depthwise(images, weights, biases, 2),
    }
    compiled = {way: work.compile(call) for way, call in ways.items()}
    for side in _sides(work):
        tokens = torch.randn(2, side * side, width, device=work.device, dtype=work.dtype)
        images = [x.unflatten(1, (side, side)).movedim(-1, 1) for x in tokens.split(1)]
        what = {"what": "both compressors", "heads": f"{name}: {heads} x {channels}", "tokens": side * side}
        rows += _forward(what, {way: partial(call, *images) for way, call in compiled.items()}, work, reference="convolutions")
    return rows


def _sides(work: Work) -> Sequence[int]:
    return _TINY_SIDES if work.tiny else SIDES


def _operands(work: Work, heads: int, tokens: int, channels: int) -> list[Tensor]:
    import torch

    return [torch.randn(1, heads, tokens, channels, device=work.device, dtype=work.dtype, requires_grad=False) for _ in range(3)]


def _with_backward(call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, shape: Tensor) -> Any:
    """Return what gradients a forward gives its operands."""
    import torch

    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        y, normaliser = call(*given, shape)
        return torch.autograd.grad(y.float().square().mean() + normaliser.mean(), given)


def _forward(what: Row, calls: dict[str, Callable[[], Any]], work: Work, reference: str | None = None) -> list[Row]:
    """Time calls in turns; those that run out of memory have a problem instead.

    Args:
        reference: the call whose first result the others' are compared with.
    """
    import torch

    from edit_compile.bench.high_water import measured_peak
    from edit_compile.bench.latency import Timing
    from edit_compile.bench.turns import repeats_of, time_in_turns

    rows = {way: {**what, "way": way} for way in calls}
    working, results = {}, {}
    for way, call in calls.items():
        with problem_in(rows[way], any_error=True), torch.no_grad():
            found = call()
            results[way] = (found if isinstance(found, torch.Tensor) else found[0]).float().cpu()
            working[way] = call
    repeats = {way: repeats_of(call, work.device) for way, call in working.items()}
    seconds = time_in_turns(working, work.device, runs=_TINY_RUNS if work.tiny else _RUNS, warmup=1, repeats=repeats)
    for way, call in working.items():
        timing = Timing.of(seconds[way])
        rows[way] |= {"ms": in_ms(timing.median), "low": in_ms(timing.low), "high": in_ms(timing.high)}
        rows[way]["peak GiB"] = in_gib(measured_peak(call, work.device))
        if reference is not None and way != reference and reference in results:
            expected = results[reference]
            rows[way]["relative error"] = short(((results[way] - expected).norm() / expected.norm()).item())
    return list(rows.values())
