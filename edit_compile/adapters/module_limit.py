"""A limit to how many modules a model may have: constructors make as many blocks as a config says, and anybody may have written that."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.utils._pytree as pytree
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

MOST_MODULES = 50_000  # models have thousands, those of many experts more; so many take ten seconds


@contextmanager
def limited_modules(config: Mapping[str, Any]) -> Iterator[None]:
    """Make a model of a config inside, in this thread.

    Raises:
        ValueError: it has more than `MOST_MODULES` modules; says which is the largest number of the config.
    """
    thread, made = threading.get_ident(), itertools.count(1)

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if threading.get_ident() == thread and next(made) > MOST_MODULES:
            leaves = pytree.tree_flatten_with_path(dict(config))[0]
            largest, where = max(((leaf, pytree.keystr(keys)) for keys, leaf in leaves if isinstance(leaf, int)), default=(0, "none"))
            raise ValueError(f"it has more than {MOST_MODULES:,} modules; the largest number of its config is {largest}, of {where}")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
