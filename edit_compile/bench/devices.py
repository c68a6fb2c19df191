"""What devices can do that are not at hand: their makers' figures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edit_compile.errors import ConfigError, suggestion

USUAL_SHARE = 0.4  # of a device's peak that training transformers reaches


@dataclass(frozen=True)
class Device:
    """A device by its data sheet.

    Attributes:
        bf16_flops_per_second: of dense matrix products in bfloat16, summed in float32.
        fp32_flops_per_second: of those in float32 as torch computes them by default, without TF32.
        bytes: of memory.
    """

    name: str
    bf16_flops_per_second: float
    fp32_flops_per_second: float
    bytes: int

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """Return its peak for a type of numbers."""
        return self.fp32_flops_per_second if dtype is torch.float32 else self.bf16_flops_per_second


def _device(name: str, bf16_tera: float, fp32_tera: float, gibibytes: int) -> Device:
    return Device(name, bf16_tera * 1e12, fp32_tera * 1e12, gibibytes * 2**30)


_DEVICES = {
    device.name: device
    for device in (
        _device("a100-40gb", 312, 19.5, 40),
        _device("a100", 312, 19.5, 80),
        _device("b200", 2250, 75, 180),
        _device("h100", 989, 67, 80),
        _device("h200", 989, 67, 141),
        _device("l4", 121, 30.3, 24),
        _device("l40s", 362, 91.6, 48),
        _device("mi300x", 1307, 163.4, 192),
        _device("rtx-3090", 71, 35.6, 24),
        _device("rtx-4090", 165, 82.6, 24),
        _device("rtx-5090", 209, 104.8, 32),
    )
}


def device_names() -> tuple[str, ...]:
    """List the devices that are known."""
    return tuple(_DEVICES)


def device_named(name: str) -> Device:
    """Look up a device.

    Raises:
        ConfigError: it is not known.
    """
    found = _DEVICES.get(name.lower())
    if found is None:
        raise ConfigError(f"no device {name!r} is known; {suggestion(name.lower(), _DEVICES)}")
    return found
