"""Warnings of other libraries, at their import, about what this package does not use; others of theirs are heard."""

from __future__ import annotations

import logging


def silence() -> None:
    """Leave out what bitsandbytes, which diffusers imports where it is installed, says of a kernel for 4-bit weights on CPUs."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
