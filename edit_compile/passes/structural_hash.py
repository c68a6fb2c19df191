"""Tell whether two modules would run the same graph: everything about them except the values of their tensors."""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_WHOLE = (type, FunctionType, MethodType, partial)  # what is told by its representation, though it has attributes
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"} | {"edit_path"}  # where a converted site is makes no difference


def structural_hash(module: nn.Module) -> tuple[Any, ...]:
    """Return a key that equal structures share: classes, attributes and the shapes of tensors, of the module and all below it."""
    tensors = tuple((name, tuple(t.shape)) for name, t in [*module.named_parameters(), *module.named_buffers()])
    return tensors, tuple((path, type(sub), repr(_attributes(sub, ()))) for path, sub in module.named_modules())


def _attributes(value: Any, around: tuple[int, ...]) -> list[tuple[str, Any]]:
    return sorted((name, _told(each, (*around, id(value)))) for name, each in vars(value).items() if name not in _BOOKKEEPING)


def _told(value: Any, around: tuple[int, ...]) -> Any:
    """Return what tells a value from others; functions and objects without attributes by their representation.

    Args:
        around: the identities of the objects that hold it: one that holds itself is not looked into again.
    """
    if id(value) in around or isinstance(value, nn.Module):
        return type(value)
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, list | tuple):
        return [_told(each, (*around, id(value))) for each in value]
    if isinstance(value, dict):
        return {str(key): _told(each, (*around, id(value))) for key, each in value.items()}
    if isinstance(value, _WHOLE) or not hasattr(value, "__dict__"):
        return repr(value)
    return type(value), _attributes(value, around)
