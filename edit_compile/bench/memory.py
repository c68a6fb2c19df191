"""How much memory a call needs, counted in tensors: on any device, the meta device included, where nothing is held at all."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes of the tensors made in a call, at the moment when most of them are alive; a backward pass counts too.

    What a kernel uses for itself is not counted, nor what was alive before.
    """
    with _Counter() as counter:
        call()
    return counter.peak


class _Counter(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: Any = WeakIdKeyDictionary()  # storages: those counted, and those that were there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self.known.setdefault(tensor.untyped_storage(), None)
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self._count(storage)
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.known[storage] = None
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, storage.nbytes())

    def _end(self, size: int) -> None:
        self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
