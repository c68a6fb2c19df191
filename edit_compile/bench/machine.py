"""This machine in words, for what is measured on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from edit_compile.frozen import Frozen
from edit_compile.version import __version__
from edit_compile.words import counted


def processor() -> str:
    """Name the GPU, or the CPU if there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()


def cpu() -> str:
    """Name the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def machine_in_words() -> str:
    """Name what times depend on: the processor, and how many threads compute."""
    return f"{processor()}, {counted(torch.get_num_threads(), 'thread')}"


class Machine(Frozen):
    """What it was measured on, and with."""

    processor: str
    cores: int
    threads: int
    python: str
    versions: dict[str, str]

    @classmethod
    def this(cls) -> Machine:
        """Describe this machine."""
        from importlib.metadata import version

        names = ("torch", "diffusers", "accelerate", "numpy")
        return cls(
            processor=processor(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            versions={"edit_compile": __version__, **{name: version(name) for name in names}},
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.processor}, {counted(self.cores, 'core')}, {counted(self.threads, 'thread')}; Python {self.python}, {versions}"
