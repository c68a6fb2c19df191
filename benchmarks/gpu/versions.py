"""What this machine has, and what is missing."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

NEEDED = ("torch", "diffusers", "pydantic", "safetensors", "accelerate", "huggingface_hub", "numpy", "pyyaml", "rich", "click")
OPTIONAL = (  # and what is left out without it
    ("triton", "compiled code on a GPU"),
    ("transformers", ""),
    ("timm", ""),
    ("matplotlib", "figures"),
    ("pillow", "images"),
    ("tensorboard", ""),
    ("pytest", "the step tests"),
    ("hypothesis", "the step tests"),
    ("pytest-timeout", ""),
    ("flash-attn", "its time beside torch's softmax kernels"),
    ("flash-attn-3", "its time beside torch's softmax kernels"),
    ("torchao", ""),
    ("cache-dit", ""),
)


def found() -> list[str]:
    """Say in lines what is installed."""
    lines = [f"python          {platform.python_version()}, {platform.platform()}", _gpu()]
    for name, without in (*((name, "everything") for name in NEEDED), *OPTIONAL):
        is_there = _version(name)
        lines.append(f"{name:<15} {is_there or 'missing'}{f' (for {without})' if is_there is None and without else ''}")
    return lines


def missing() -> list[str]:
    """List the packages without which nothing runs."""
    return [name for name in NEEDED if _version(name) is None]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> str:
    """Name the GPU and its driver by a process of its own, so that this one holds no memory there."""
    asks = (
        "import torch; p = torch.cuda.get_device_properties(0); "
        "print(f'{p.name}, {p.total_memory / 2**30:.0f} GiB, {p.major}.{p.minor}, cuda {torch.version.cuda}, "
        "cudnn {torch.backends.cudnn.version()}')"
    )
    answer = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=False)
    said = answer.stdout.strip() or (answer.stderr.strip().splitlines() or ["nothing"])[-1]
    return f"gpu             {said}"
