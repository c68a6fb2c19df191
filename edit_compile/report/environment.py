"""What is installed here, and what it computes with: `edit-compile env`, for reports of bugs."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edit_compile.version import __version__
from edit_compile.words import bytes_in_words

_LIBRARIES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "timm",
    "peft",
    "bitsandbytes",
    "torchao",
    "torchmetrics",
    "torch-fidelity",
    "torchvision",
    "numpy",
    "pydantic",
)


def environment() -> dict[str, Any]:
    """Return versions of this package, Python and the libraries (None: not installed), the devices, and the backends of torch."""
    found = {
        "edit_compile": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    try:
        return {**found, "devices": _devices(), "backends": _backends()}
    except Exception as error:  # an installation that is broken is what such a report is for
        return {**found, "torch_error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def environment_lines(found: dict[str, Any]) -> list[str]:
    """Say it in lines of a name and a value."""
    named = {key: value for key, value in found.items() if not isinstance(value, dict | list)}
    named |= found["libraries"]
    named |= {f"device {device['name']}": device["what"] for device in found.get("devices", ())}
    named |= found.get("backends", {})
    width = max(map(len, named))
    return [f"{name:<{width}}  {_in_words(value)}" for name, value in named.items()]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, str]]:
    import torch

    from edit_compile.bench.machine import cpu

    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads, {torch.backends.cpu.get_cpu_capability()}"
    found = [{"name": "cpu", "what": f"{cpu()}, {threads}"}]
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        what = f"{device.name}, {bytes_in_words(device.total_memory)}, compute capability {device.major}.{device.minor}"
        found.append({"name": f"cuda:{number}", "what": what})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "what": "available"})
    if torch.xpu.is_available():
        found += [{"name": f"xpu:{number}", "what": torch.xpu.get_device_name(number)} for number in range(torch.xpu.device_count())]
    return found


def _backends() -> dict[str, Any]:
    import torch

    return {
        "cuda, as torch was built": torch.version.cuda,
        "rocm, as torch was built": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]
        "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
        "bfloat16 on cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "c++ compiler, for torch.compile on cpu": shutil.which(os.environ.get("CXX", "g++")),
    }


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
