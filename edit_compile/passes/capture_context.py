"""What is different while a model is captured: everything that would hide its computation from a graph is off.

Nothing here changes what a model computes. Regions of autocast are entered without effect, so a graph holds what is computed
in the dtypes that the tensors have: autocast that surrounds a call of the converted model acts on it as on any other.
Functions that were compiled run as they were written, and a model that asks whether it is being exported learns that it is not.
Functions of Python and numpy on sizes stay symbolic.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn

from edit_compile.passes.native_attention import native_attention
from edit_compile.torch_internals import (
    autocast_without_effect,
    constants_with_content,
    counting_plain_numbers,
    eager_instead_of_compiled,
    export_unseen,
    hashable_sizes,
    symbolic_float,
    symbolic_int,
    symbolic_len,
    symbolic_math,
)

_NOT_OF_MODELS = ("torch", "sympy", "numpy", "mpmath", "builtins")  # packages whose functions are left alone


one_at_a_time = threading.RLock()  # what is changed inside belongs to the process


@dataclass
class Relaxed:
    """What a capture with symbolic sizes does for code that wants plain numbers.

    Attributes:
        hashable: sizes may be in sets, dicts' keys and caches; they are then fixed to the example's.
        open_numbers: `int(size)`, `float(size)` and `len(tensor)` in the model's own code stay symbolic.
        frozen: how often a size has been made a plain number; filled while capturing.
    """

    hashable: bool = False
    open_numbers: bool = False
    frozen: list[int] = field(default_factory=lambda: [0])


@contextmanager
def capturing(module: nn.Module, relaxed: Relaxed | None = None, *, one_device: bool = False) -> Iterator[None]:
    """Run a module inside as a graph can hold it.

    Args:
        module: the one that is captured; the packages of its classes are taken for its own code.
        relaxed: what to do for code that wants sizes as plain numbers; None where sizes are plain anyway.
        one_device: make tensors on the meta device that the module makes on none in particular, as it may if it runs on the CPU only.
    """
    with one_at_a_time, ExitStack() as stack:
        stack.enter_context(native_attention(module))
        stack.enter_context(eager_instead_of_compiled())
        stack.enter_context(export_unseen())
        stack.enter_context(constants_with_content())
        stack.enter_context(autocast_without_effect())
        stack.enter_context(_caches_as_before())
        if one_device:
            stack.enter_context(torch.device("meta"))
        if relaxed is not None:
            stack.enter_context(symbolic_math())
            stack.enter_context(counting_plain_numbers(relaxed.frozen))
            if relaxed.hashable:
                stack.enter_context(hashable_sizes())
            if relaxed.open_numbers:
                stack.enter_context(_symbolic_numbers(module))
        yield


# ------------------------------------------------------------------ caches


@contextmanager
def _caches_as_before() -> Iterator[None]:
    """Clear the caches of functions that were called inside: what they hold belongs to the capture, not to the model."""
    before = [(cache, cache.cache_info().misses) for cache in _caches()]
    try:
        yield
    finally:
        for cache, misses in before:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


_found: tuple[int, list[weakref.ref[Any]]] = (0, [])  # with so many modules loaded: all objects are looked at for them


def _caches() -> list[Any]:
    global _found
    if _found[0] != len(sys.modules):
        kind = type(functools.lru_cache(_is_of_models))
        _found = len(sys.modules), [weakref.ref(each) for each in gc.get_objects() if type(each) is kind and _is_of_models(_module(each))]
    return [cache for each in _found[1] if (cache := each()) is not None]


def _module(function: Any) -> str:
    return str(getattr(function, "__module__", None) or _NOT_OF_MODELS[0])


# ------------------------------------------------------------------ int(), float() and len()


@contextmanager
def _symbolic_numbers(module: nn.Module) -> Iterator[None]:
    """Have `int`, `float` and `len` leave sizes symbolic in the files of a module's own packages."""
    names: dict[str, Any] = {"int": symbolic_int(), "float": symbolic_float(), "len": symbolic_len}
    changed: list[tuple[dict[str, Any], str]] = []
    try:
        for scope in _own_scopes(module):
            for each in names.keys() - scope.keys():
                scope[each] = names[each]
                changed.append((scope, each))
        yield
    finally:
        for scope, each in changed:
            scope.pop(each, None)


def _own_scopes(module: nn.Module) -> list[dict[str, Any]]:
    """List the global names of a module's own packages, and those of its methods, which need not be in a package that is loaded."""
    kinds = {type(each) for each in module.modules() if _is_of_models(type(each).__module__)}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    loaded = [vars(each) for name, each in list(sys.modules.items()) if each is not None and name.partition(".")[0] in packages]
    methods = [function.__globals__ for kind in kinds for function in vars(kind).values() if isinstance(function, FunctionType)]
    return [*loaded, *methods]


def _is_of_models(module: str) -> bool:
    return module.partition(".")[0] not in _NOT_OF_MODELS


# ------------------------------------------------------------------ which functions a forward calls

_OF_DTYPES = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "__get__", "is_floating_point")


class _Calls(torch.overrides.TorchFunctionMode):
    """Notes the names of torch's functions that are called inside, but for those that only concern dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _OF_DTYPES:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def functions_called(module: nn.Module, inputs: dict[str, Any]) -> list[str] | None:
    """List the functions of torch that a forward calls, casts left out; None if it fails."""
    with torch.no_grad(), capturing(module), _Calls() as calls:
        try:
            module(**inputs)
        except Exception:
            return None
    names: list[str] = calls.names
    return names
