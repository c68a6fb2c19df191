"""What names of models mean, before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from edit_compile.demo.names import NAMES, SOURCES
from edit_compile.errors import ModelNotFoundError, suggestion

ARCHITECTURES = Path(__file__).parent / "arch"
_ON_HUB = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([^/?#\s]+/[^/?#\s]+)(?:[/?#].*)?")


def architectures() -> tuple[str, ...]:
    """List the built-in full-size architectures, NAME of `arch/NAME`."""
    return tuple(sorted(path.stem for path in ARCHITECTURES.glob("*.json")))


def without_address(name: str) -> str:
    """Return the hub id of a hub page's address, `https://huggingface.co/ORG/NAME` or `hf://ORG/NAME`; other names as they are."""
    found = _ON_HUB.fullmatch(name)
    return found[1] if found else name


def is_on_hub(name: str) -> bool:
    """Say whether a name stands for a model of the hub, not for one of this machine's files or of this package."""
    kind, _, rest = name.partition("/")
    if kind in ("demo", "arch", "timm"):
        return kind == "timm"
    return bool(rest) and "/" not in rest and not name.startswith((".", "~", "/")) and not os.path.exists(name)  # noqa: PTH110


def check_name(name: str, others: Iterable[str] = ()) -> None:
    """Refuse a name that cannot be a model's, whatever is on the hub.

    Args:
        others: more names that might be meant.

    Raises:
        ModelNotFoundError: with the most similar name, if one is similar.
    """
    kind, _, rest = name.partition("/")
    if kind == "demo" and rest not in NAMES:
        raise ModelNotFoundError(f"no demo model {rest!r}; {suggestion(rest, NAMES)}")
    if kind == "arch" and rest not in architectures():
        raise ModelNotFoundError(f"no built-in architecture {rest!r}; {suggestion(rest, architectures())}")
    if kind in ("demo", "arch", "timm") or is_on_hub(name) or os.path.exists(Path(name).expanduser()):  # noqa: PTH110
        return
    known = (*others, *SOURCES, *(f"arch/{each}" for each in architectures()))
    similar = get_close_matches(name, known, 1) or [each for each in known if each.partition("/")[2] == name]
    hint = f": did you mean {similar[0]}?" if similar else ""
    raise ModelNotFoundError(f"{name} does not exist; give a folder, a config.json, demo/NAME, arch/NAME, timm/NAME or a hub id{hint}")
