"""How fast this machine's own kernels are: measured in a few seconds, and kept in the user's cache folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from edit_compile.bench.machine import cpu
from edit_compile.bench.turns import seconds_of
from edit_compile.designs.ops.parts import Part, Softmax
from edit_compile.frozen import Frozen
from edit_compile.measurements import keep_measurement, kept_measurement

_SIDES = (512, 1024, 2048, 4096)  # of products
_SOFTMAX = (1, 8, 2048, 64)
_IMAGE = (1, 512, 64, 64)
_BUSY = 1.5  # times as fast as what is kept: that was measured beside other work
_LONG = 0.2  # seconds, after which larger products are not tried
_DEPTHWISE = 27  # products of so few terms are depthwise convolutions
_KIND = "roofline"  # of measurement


class Roofline(Frozen):
    """Rates of a device, for one type of numbers.

    Attributes:
        product, softmax, depthwise: FLOPs a second of matrix products, fused attention and depthwise 3x3 convolutions.
        bandwidth: bytes a second that a pointwise operation reads and writes.
        overhead: seconds that the smallest operation takes.
    """

    device: str
    threads: int
    torch_version: str
    dtype: str
    product: float
    softmax: float
    depthwise: float
    bandwidth: float
    overhead: float

    @property
    def number_type(self) -> torch.dtype:
        """The type of the numbers."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def or_better(self, other: Roofline) -> Roofline:
        """Take the better of each rate: what else runs on a machine makes them worse, and nothing makes them better."""
        rates = {name: max(getattr(self, name), getattr(other, name)) for name in ("product", "softmax", "depthwise", "bandwidth")}
        return self.model_copy(update=rates | {"overhead": min(self.overhead, other.overhead)})

    def seconds(self, part: Part) -> float:
        """Predict the seconds of a part of a design."""
        if isinstance(part, Softmax):
            return max(self.overhead, part.flops / self.softmax)
        if part.inner <= _DEPTHWISE:
            return max(self.overhead, part.flops / self.depthwise)
        written = part.count * part.rows * part.columns * self.number_type.itemsize / self.bandwidth
        return max(self.overhead, part.flops / self.product, written)


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Read the rates of a device, or measure them.

    They are measured if that was not done before with this version of torch and as many threads, or if products are much faster now,
    for then the machine was busy; the better of each rate is kept.
    """
    found = known_roofline(device, dtype)
    if found is None or _products(device, dtype, _SIDES[:1]) > _BUSY * found.product:
        measured = _measured(device, dtype)
        found = measured if found is None else found.or_better(measured)
        keep_measurement(_KIND, _conditions(device, dtype), found)
    return found


def known_roofline(device: torch.device, dtype: torch.dtype) -> Roofline | None:
    """Read the rates of a device; None if they were not measured."""
    return kept_measurement(_KIND, _conditions(device, dtype), Roofline)


def known_rates() -> Roofline | None:
    """Read the rates of this machine's GPU, or of its CPU if there is none: of the smallest type of numbers that was measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = (known_roofline(device, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    return next((rates for rates in found if rates is not None), None)


def _conditions(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu() if device.type == "cpu" else str(device)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }


@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype) -> Roofline:
    make = partial(torch.randn, device=device, dtype=dtype)
    product = _products(device, dtype, _SIDES)
    batch, heads, tokens, channels = _SOFTMAX
    query = make(*_SOFTMAX)
    softmax = Softmax(tokens, tokens, channels, channels, batch * heads).flops / _best(
        partial(F.scaled_dot_product_attention, query, query, query), device
    )
    image, kernel = make(*_IMAGE), make(_IMAGE[1], 1, 3, 3)
    depthwise = 18 * image.numel() / _best(partial(F.conv2d, image, kernel, padding=1, groups=_IMAGE[1]), device)
    numbers = make(2**24)
    bandwidth = 2 * numbers.numel() * dtype.itemsize / _best(partial(torch.add, numbers, 1), device)
    overhead = _best(partial(torch.add, make(1), 1), device, repeats=100)
    rates: dict[str, Any] = {"product": product, "softmax": softmax, "depthwise": depthwise, "bandwidth": bandwidth, "overhead": overhead}
    return Roofline(**_conditions(device, dtype), **rates)


@torch.no_grad()
def _products(device: torch.device, dtype: torch.dtype, sides: Sequence[int]) -> float:
    """Return the most FLOPs a second of products of square matrices."""
    most = 0.0
    for side in sides:
        a = torch.randn(side, side, device=device, dtype=dtype)
        seconds = _best(partial(torch.mm, a, a), device)
        most = max(most, 2 * side**3 / seconds)
        if seconds > _LONG:
            break
    return most


def _best(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    call()
    return min(seconds_of(call, device, repeats) for _ in range(3))
