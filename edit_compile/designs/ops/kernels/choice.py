"""Where Triton kernels run in the place of what Inductor makes: only where they were measured to win on the device at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from edit_compile.errors import ConfigError
from edit_compile.frozen import Frozen
from edit_compile.measurements import keep_measurement, kept_measurement

Kernels = Literal["auto", "always", "never"]
AS_FAST = 0.97  # of Inductor's time: a kernel that takes more has not won
AS_EXACT = 2.0  # times Inductor's error
_KIND = "kernel"  # of measurement


class KernelCase(Frozen):
    """What a kernel computes in one module.

    Attributes:
        operator: which it is.
        sizes: heads and channels of their keys and values; or the channels and the stride of a depthwise convolution.
        features: of queries and keys, that are computed in it.
    """

    operator: Literal["linear_attention", "depthwise"]
    sizes: tuple[int, ...]
    features: Literal["relu", "elu"] | None = None


class Comparison(Frozen):
    """A kernel against Inductor's form of the same formula, on one device.

    Attributes:
        kernel, inductor: seconds at each number of tokens that was tried.
        kernel_error, inductor_error: relative errors against float64.
        problem: why the kernel does not run there.
    """

    conditions: dict[str, str]
    kernel: tuple[float, ...] = ()
    inductor: tuple[float, ...] = ()
    kernel_error: float = 0.0
    inductor_error: float = 0.0
    problem: str | None = None

    @property
    def wins(self) -> bool:
        """Say whether the kernel is the faster one at every size, and as exact."""
        faster = all(own <= AS_FAST * other for own, other in zip(self.kernel, self.inductor, strict=True))
        exact = self.kernel_error <= AS_EXACT * self.inductor_error + torch.finfo(torch.float32).eps
        return self.problem is None and bool(self.kernel) and faster and exact


def can_run(device: torch.device) -> bool:
    """Say whether Triton kernels can run on a device."""
    return device.type == "cuda" and find_spec("triton") is not None


def choose_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Have each module that a kernel can compute use it, or not: as was measured on its device, always, or never.

    Raises:
        ConfigError: it is none of these words, or "always" where no kernel can run.
    """
    if kernels not in get_args(Kernels):
        raise ConfigError(f"kernels={kernels!r}: it is one of {', '.join(map(repr, get_args(Kernels)))}")
    for module, case, weight in cases_in(model):
        here = can_run(weight.device)
        if kernels == "always" and not here:
            raise ConfigError(f"kernels='always' needs Triton and a model on a CUDA device; this one is on {weight.device}")
        found = known_comparison(case, weight) if kernels == "auto" and here else None
        chosen = kernels == "always" or (found is not None and found.wins)
        module.triton_kernel = function_of(case) if chosen else None


def cases_in(model: nn.Module) -> Iterator[tuple[Any, KernelCase, torch.Tensor]]:
    """Yield the modules that a kernel can compute, with what that is, and a weight that has their device and type of numbers."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    for module in model.modules():
        if isinstance(case := getattr(module, "kernel_case", None), KernelCase):
            yield module, case, next((p for p in module.parameters() if p.is_floating_point()), weights[0])


def function_of(case: KernelCase) -> Callable[..., Any]:
    """Return the function that calls an operator; it loads Triton."""
    from edit_compile.designs.ops.kernels import operators

    found: Callable[..., Any] = getattr(operators, case.operator)
    return found


def known_comparison(case: KernelCase, weight: torch.Tensor) -> Comparison | None:
    """Read how a kernel did on a device; None if that was not measured with these versions of the kernels, torch and Triton."""
    return kept_measurement(_KIND, conditions(case, weight), Comparison)


def keep(comparison: Comparison) -> None:
    """Keep a comparison in the user's cache folder, if there is one."""
    keep_measurement(_KIND, comparison.conditions, comparison)


def conditions(case: KernelCase, weight: torch.Tensor) -> dict[str, str]:
    """List what a comparison holds for."""
    device = weight.device
    return {
        "case": case.model_dump_json(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **_versions(),
    }


@cache
def _versions() -> dict[str, str]:
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    triton = version("triton") if find_spec("triton") is not None else ""
    return {"torch": torch.__version__, "triton": triton, "kernels": hashlib.sha256(sources).hexdigest()}
