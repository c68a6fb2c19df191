"""Bytes, durations and paths as people read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def bytes_in_words(number: float) -> str:
    """Write a number of bytes as 12 MiB or 3.4 GiB."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 / 2 else f"{number / 2**20:,.0f} MiB"


def duration_in_words(seconds: float) -> str:
    """Write a duration as 8.2 s, 12.5 min, 3.1 h or 2.4 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def counted(number: int, thing: str) -> str:
    """Write how many there are of a thing: 1 thread, 2 threads."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def two_digits(number: float) -> str:
    """Write a number with two significant digits, large ones without an exponent: 0.45, 12, 1,200."""
    return f"{float(f'{number:.2g}'):,g}"


def clock(seconds: float) -> str:
    """Write a duration that goes on as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def without_paths(value: Any) -> Any:
    """Shorten all absolute paths in plain data to their last names, for data that others will read."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")) else value
