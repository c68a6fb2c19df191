"""How much memory a call needs, counted in tensors: on any device, even the meta device, where nothing is allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from edit_compile.torch_internals import attention_replaced


def peak_memory(call: Callable[[], Any], device: str | None = None) -> int:
    """Count the bytes of the tensors made in a call, a backward pass included, at the moment when most of them are alive.

    Workspaces of kernels are not counted, nor what was alive before. On the meta device attention is counted as one fused kernel;
    its decomposition there would make the matrix of scores.

    Args:
        device: the type of devices whose tensors count; default: all, those on the meta device too.
    """
    counter = _Counter(device)
    with _fused_on_meta(), counter:
        call()
    return counter.peak


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow every storage from the operation that makes it to its end."""

    def __init__(self, device: str | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live: int = 0
        self.peak: int = 0
        self.known: Any = WeakIdKeyDictionary()  # storages: those counted, and those that were there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self.known.setdefault(tensor.untyped_storage(), None)
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage not in self.known and self.device in (None, storage.device.type):
                self._count(storage)
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.known[storage] = None
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, storage.nbytes())

    def _end(self, size: int) -> None:
        self.live -= size


@contextmanager
def _fused_on_meta() -> Iterator[None]:
    """Run attention on the meta device as one operation. A mode would not do: it is not active where checkpointing recomputes."""

    def fused(own: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _FusedAttention.apply(query, key, value) if query.is_meta else own(query, key, value, *args, **kwargs)

    with attention_replaced(fused):
        yield


class _FusedAttention(torch.autograd.Function):
    """Hold the tensors of a fused attention kernel: its inputs, its output, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
