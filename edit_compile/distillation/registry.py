"""Registries that other packages can add to: of losses, and of kinds of data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from edit_compile.errors import ConfigError

Item = TypeVar("Item")
log = logging.getLogger(__name__)


class Registry(Generic[Item]):
    """Items by name: those of this package, those registered by the user, and those of installed packages' entry points.

    Entry points are loaded when they are first asked for: an unknown name, or all names.
    """

    def __init__(self, what: str, group: str, register: Callable[[str, Any], object]) -> None:
        """
        Args:
            what: one of the items, in words, for errors.
            group: the group of entry points.
            register: adds what an entry point of a name refers to, unless loading it has registered it already.
        """
        self.what, self.group, self.register = what, group, register
        self._items: dict[str, Item] = {}
        self._origins: dict[str, str] = {}
        self._loaded = False

    def add(self, name: str, item: Item, defined_in: str) -> None:
        """Add an item.

        Args:
            defined_in: where its code is; the same code may be registered again, as when a notebook's cell is run twice.

        Raises:
            ConfigError: the name is taken.
        """
        if name in self._items and self._origins[name] != defined_in:
            raise ConfigError(f"{self.what} named {name!r} is already registered, by {self._origins[name]}")
        self._items[name], self._origins[name] = item, defined_in

    def names(self) -> tuple[str, ...]:
        """List the names of all items, in the order of registration."""
        self._load()
        return tuple(self._items)

    def get(self, name: str) -> Item:
        """Find an item.

        Raises:
            KeyError: there is none of this name.
        """
        if name not in self._items:
            self._load()
        return self._items[name]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for point in entry_points(group=self.group):
            try:
                item = point.load()
                if point.name not in self._items:
                    self.register(point.name, item)
            except Exception as error:  # another package's code must not stop this one's
                log.warning("%s %r of %s cannot be loaded: %s", self.what, point.name, point.value, error)
