"""The open set of designs: a name, where it fits, and how its module is built. Adding one takes a file and a `register`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from edit_compile.errors import ConfigError

if TYPE_CHECKING:
    from edit_compile.config import LinearizeConfig


@dataclass(frozen=True)
class Additions:
    """What a rewritten site's design module is built from."""

    design: str
    channels: dict[str, int]
    heads: int
    head_channels: int
    scale: float | None
    before: int | None
    after: int | None


@dataclass(frozen=True)
class Design:
    """An attention design that sites can be rewritten to.

    Attributes:
        name: as in `LinearizeConfig.design` and `SitePlan.action`.
        joint: whether it is for attention in which image tokens and others take part together; if not, for image tokens alone.
        build: makes the module that a rewritten site gets. The site's graph calls its `query`, `key` and `value`, where
            they are modules, and the module itself in the place of softmax attention: with (query, key, value, mask) or, if
            joint, with (query, key, value, grid, mask, uncompressed (key, value, mask) or None).
    """

    name: str
    joint: bool
    build: Callable[[Additions, LinearizeConfig], nn.Module]


_DESIGNS: dict[str, Design] = {}


def register(design: Design) -> Design:
    """Add a design.

    Raises:
        ConfigError: its name is taken.
    """
    if design.name in ("auto", "keep", *_DESIGNS):
        raise ConfigError(f"a design named {design.name!r} exists already; choose another name")
    _DESIGNS[design.name] = design
    return design


def design_names() -> tuple[str, ...]:
    """The registered designs, in order of registration."""
    return tuple(_DESIGNS)


def find_design(name: str) -> Design:
    """The design of a name.

    Raises:
        ConfigError: there is none; lists those that are.
    """
    if name not in _DESIGNS:
        raise ConfigError(f"unknown design {name!r}; there are: {', '.join(_DESIGNS)}")
    return _DESIGNS[name]
