"""What names of models mean, before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import unquote

from edit_compile.demo.names import NAMES, SOURCES
from edit_compile.errors import ConfigError, ModelNotFoundError, suggestion

ARCHITECTURES = Path(__file__).parent / "arch"
_ON_HUB = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?!(?:datasets|spaces)/)"
    r"([^/?#\s]+/[^/?#\s]+)(?:/(?:tree|blob|resolve)/([^/?#\s]+))?(?:[/?#].*)?"
)
_ALIASES = {
    "stabilityai/sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "stabilityai/sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
}


def architectures() -> tuple[str, ...]:
    """List the built-in full-size architectures, NAME of `arch/NAME`."""
    return tuple(sorted(path.stem for path in ARCHITECTURES.glob("*.json")))


def without_address(name: str) -> str:
    """Return the hub id of a model's page, `[https://]huggingface.co/ORG/NAME` or `hf://ORG/NAME`; other names as they are.

    Of the page of a branch, a tag or a commit, `ORG/NAME@REVISION`.
    """
    found = _ON_HUB.fullmatch(name)
    if found is None:
        return name
    return found[1] if found[2] in (None, "main") else f"{found[1]}@{unquote(found[2])}"


def with_revision(name: str, revision: str | None) -> str:
    """Name a model of the hub at a branch, a tag or a commit, `ORG/NAME@REVISION`; without a revision, the name as it is.

    Raises:
        ConfigError: it is not on the hub, or has another revision already.
    """
    name = without_address(name)
    if revision is None or name.endswith(f"@{revision}"):
        return name
    if not is_on_hub(name) or name.startswith("timm/"):
        raise ConfigError(f"{name} has no revision {revision!r}: only what is on the hub has revisions")
    if "@" in name:
        raise ConfigError(f"{name} names a revision already, which is not {revision!r}: leave one of them out")
    return f"{name}@{revision}"


def hub_id(name: str) -> tuple[str, str | None]:
    """Return the hub's own id of a model, and its revision; None for the newest."""
    repository, _, revision = without_address(name).partition("@")
    return _ALIASES.get(repository, repository), revision or None


def is_on_hub(name: str) -> bool:
    """Say whether a name stands for a model of the hub, not for one of this machine's files or of this package."""
    repository = name.partition("@")[0]
    kind, _, rest = repository.partition("/")
    if kind in ("demo", "arch") or os.path.exists(Path(name).expanduser()):  # noqa: PTH110
        return False
    return bool(rest) and "/" not in rest and not name.startswith((".", "~", "/"))


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
