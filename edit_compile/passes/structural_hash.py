"""Tell whether two modules would run the same graph: everything about them except the values of their tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_PLAIN = (bool, int, float, str, bytes, type(None), type)
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"} | {"edit_path"}  # where a converted site is makes no difference


def structural_hash(module: nn.Module) -> tuple[Any, ...]:
    """Return a key that equal structures share: classes, attributes and the shapes of tensors, of the module and all below it."""
    tensors = tuple((name, tuple(t.shape)) for name, t in [*module.named_parameters(), *module.named_buffers()])
    return tensors, tuple((path, _key(sub)) for path, sub in module.named_modules())


def _key(value: Any) -> Any:
    attributes = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in _BOOKKEEPING}
    return type(value), tuple(sorted((k, repr(_plain(v))) for k, v in attributes.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return type(value) if isinstance(value, nn.Module) else _key(value)
