"""Attention designs: what the compiler can rewrite a site to. One file each; see `base` for what a design is.

Designs from outside are added with `register`, or by an entry point of the group `edit_compile.designs` whose name is the
design's. Importing this package imports no design: each is loaded when its name is used.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from edit_compile.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from edit_compile.designs.base import Design

GROUP = "edit_compile.designs"
AUTO, FAST, KEEP = "auto", "fast", "keep"
AUTOMATIC = ("mm-edit", "edit")  # what "auto" and "fast" try, in order
AUTOMATIC_OPTIONS: dict[str, dict[str, Any]] = {AUTO: {}, FAST: {"reduction": 8}}  # of theirs, other than the designs' own defaults
NO_ATTENTION = "no-attention"  # not listed: what a model costs without attention between image tokens
_SHIPPED = {
    "edit": "edit_compile.designs.edit:Edit",
    "mm-edit": "edit_compile.designs.mm_edit:MMEdit",
    "linear-mm-alpha": "edit_compile.designs.linear_mm_alpha:LinearMMAlpha",
    "linfusion": "edit_compile.designs.linfusion:LinFusion",
    "kv-compress": "edit_compile.designs.kv_compress:KVCompress",
    "sana": "edit_compile.designs.sana:Sana",
    "mix-ffn": "edit_compile.designs.mix_ffn:MixFFN",
    "clear": "edit_compile.designs.clear:Clear",
    "local-linear": "edit_compile.designs.local_linear:LocalLinear",
}
_UNLISTED = {NO_ATTENTION: "edit_compile.designs.no_attention:NoAttention"}
_registered: dict[str, type[Design]] = {}

DesignClass = TypeVar("DesignClass", bound="type[Design]")


def register(design: DesignClass) -> DesignClass:
    """Add a design; also a class decorator. Registered again, as when a notebook's cell is run twice, it replaces its predecessor.

    Raises:
        ConfigError: it is not a `Design` with a name, its options are not `Design.Options`, or the name is another design's.
    """
    from edit_compile.designs.base import Design

    if not (isinstance(design, type) and issubclass(design, Design) and isinstance(getattr(design, "name", None), str)):
        raise ConfigError(f"{design!r} cannot be registered: a design is a subclass of edit_compile.Design with a name")
    _check_statements(design)
    if design.name in (*AUTOMATIC_OPTIONS, KEEP, *_UNLISTED, *design_names()) and _home(_registered.get(design.name)) != _home(design):
        raise ConfigError(f"a design named {design.name!r} exists already; choose another name")
    _registered[design.name] = design
    return design


def _home(design: type[Design] | None) -> tuple[str, str] | None:
    return (design.__module__, design.__qualname__) if design is not None else None


def _check_statements(design: type[Design]) -> None:
    from edit_compile.designs.base import Design
    from edit_compile.frozen import Frozen

    if not (isinstance(design.Options, type) and issubclass(design.Options, Frozen)):
        raise ConfigError(f"the Options of the design {design.name!r} are not a subclass of edit_compile.Design.Options")
    flops, parts = (getattr(method, "__func__", None) for method in (design.flops, design.parts))  # None of what is no class method
    if flops is Design.flops.__func__ and parts is Design.parts.__func__:  # type: ignore[attr-defined]
        raise ConfigError(f"the design {design.name!r} says nothing of its cost: give it a `flops`, or `parts`")


def unregister(name: str) -> None:
    """Take a design away that `register` has added."""
    _registered.pop(name, None)


def design_names() -> tuple[str, ...]:
    """List the designs that can be named: shipped ones, those of installed packages, registered ones."""
    return tuple(dict.fromkeys([*_SHIPPED, *_installed(), *_registered]))


def find_design(name: str) -> type[Design]:
    """Find a design by its own name.

    Raises:
        ConfigError: there is none, lists those that are; or the package that has it cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    if name in (shipped := {**_SHIPPED, **_UNLISTED}):
        module, _, attribute = shipped[name].partition(":")
        return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
    if name in _installed():
        return _load(name)
    raise ConfigError(f"unknown design {name!r}; {suggestion(name, design_names())}")


@cache
def _installed() -> dict[str, Any]:
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in (*AUTOMATIC_OPTIONS, KEEP, *_SHIPPED)}


@cache
def _load(name: str) -> type[Design]:
    entry = _installed()[name]
    try:
        design = entry.load()
    except Exception as error:  # whatever importing somebody else's package raises
        raise ConfigError(f"the design {name!r} of {entry.value} cannot be loaded: {type(error).__name__}: {error}") from error
    from edit_compile.designs.base import Design

    if not (isinstance(design, type) and issubclass(design, Design)):
        raise ConfigError(f"the entry point {name!r} of group {GROUP} is {entry.value}, which is not a Design")
    _check_statements(design)
    return design
