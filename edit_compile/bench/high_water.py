"""How much memory a call takes, measured, and how much of it there is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # what Linux takes, written to clear_refs, to begin anew with the peak of a process
_GROUPS = Path("/sys/fs/cgroup")


@torch.no_grad()
def measured_peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Measure the bytes that a call has at most beyond those there were before: on GPUs of tensors, on Linux of the process.

    Returns:
        None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _give_back()
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _give_back() -> None:
    """Return what the C library keeps of freed memory, which a call would take without more being in use."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """Read a number of bytes of this process."""
    lines = dict(line.split(":", 1) for line in (_PROCESS / "status").read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def free_memory(device: torch.device) -> int | None:
    """Tell how many bytes of a device's memory are free, and of this machine's for a CPU; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return min(int(lines["MemAvailable"].split()[0]) * 1024, *_left_to_groups())
    except (OSError, KeyError):
        return None


def _left_to_groups() -> Iterator[int]:
    """Yield what the limits of containers leave."""
    for most, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with suppress(OSError, ValueError):
            yield int((_GROUPS / most).read_text()) - int((_GROUPS / used).read_text())
    yield 2**62
