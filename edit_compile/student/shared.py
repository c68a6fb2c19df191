"""Telling whether weights are still what they were at conversion, at no cost where nothing was written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edit_compile.student.fingerprint import TensorPrint, checksum, close, fingerprint
from edit_compile.torch_internals import change_count, is_lazy_copy, is_sharded, memory_id


class _Place(NamedTuple):
    """Where a tensor's values are, and whether and how often they were written to there."""

    memory: int
    writes: int | None
    is_lazy: bool


class _Known(NamedTuple):
    """One weight: its dtype, the sum of its bits (None if that is lost), a few values, and where these were seen last.

    `is_table` says whether a model may put another one in its place, as it does with tables of positions for other sizes.
    """

    dtype: torch.dtype
    checksum: int | None
    values: TensorPrint
    seen: _Place
    is_table: bool


class SharedWeights:
    """Knows weights by the memory that they are in, and by their values where that was moved or written to."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def copy(self) -> SharedWeights:
        """Copy what is known, for a copy of the model."""
        copied = SharedWeights()
        copied._known = dict(self._known)
        return copied

    def names(self) -> list[str]:
        """List the weights that are known."""
        return list(self._known)

    def record(self, tensors: Mapping[str, Tensor], tables: Collection[str] = ()) -> None:
        """Take what weights are now, by name, for what they are to be. Those that have no values here are left out.

        Args:
            tables: the names of buffers that are in no state dict: what is written into them counts, another one in their place does not.
        """
        found = {name: tensor for name, tensor in tensors.items() if has_values(tensor)}
        values = fingerprint(found)
        for name, tensor in found.items():
            is_table = name in tables or (name in self._known and self._known[name].is_table)
            self._known[name] = _Known(tensor.dtype, checksum(tensor), values[name], _place(tensor), is_table)

    def follow(self, tensors: Mapping[str, Tensor], lost: Collection[str]) -> None:
        """Note that weights were moved or cast.

        Args:
            tensors: by name.
            lost: names of those that had been written to before.
        """
        moved = {name: tensor for name, tensor in tensors.items() if name in self._known and has_values(tensor)}
        self.record({name: tensor for name, tensor in moved.items() if tensor.dtype != self._known[name].dtype})
        for name, tensor in moved.items():
            now = self._known[name]
            self._known[name] = now._replace(checksum=None) if name in lost else now._replace(seen=_place(tensor))

    def written(self, tensors: Mapping[str, Tensor], *, thoroughly: bool = False) -> list[str]:
        """Name the weights that are not what they were.

        Args:
            tensors: by name.
            thoroughly: compare the values of all that are no lazy copies any more; otherwise, of these, only those that were moved or
                written to since they were compared last. Writing through `.data` does not count.
        """
        known = (name for name, tensor in tensors.items() if name in self._known and (has_values(tensor) or is_of_another_class(tensor)))
        return [name for name in known if self._differs(name, tensors[name], thoroughly)]

    def _differs(self, name: str, tensor: Tensor, thoroughly: bool) -> bool:
        if is_of_another_class(tensor):
            return True
        known, place = self._known[name], _place(tensor)
        if known.checksum is None:
            return True
        if place == known.seen and (place.is_lazy or not thoroughly):
            return False
        if _has_lost(tensor, known.dtype):
            differs = not close(known.values, fingerprint({name: tensor})[name], torch.finfo(tensor.dtype).eps)
        else:
            before = tensor.detach().to(known.dtype)
            differs = checksum(before) != known.checksum or (
                tensor.dtype != known.dtype and not torch.equal(before.to(tensor.dtype), tensor)
            )
        if differs and known.is_table and place.memory != known.seen.memory:
            del self._known[name]  # the model's own from now on
            return False
        if not differs and tensor.dtype != known.dtype:
            self.record({name: tensor})  # what is written from now on is told exactly again
        elif not differs:
            self._known[name] = known._replace(seen=place)
        return differs


def _has_lost(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Say whether a tensor may have lost digits since it was in a dtype: to a coarser one."""
    if tensor.dtype == dtype or not (tensor.is_floating_point() and dtype.is_floating_point):
        return False
    now, then = torch.finfo(tensor.dtype), torch.finfo(dtype)
    return now.eps > then.eps or now.max < then.max or now.tiny > then.tiny


def _place(tensor: Tensor) -> _Place:
    return _Place(memory_id(tensor), change_count(tensor), is_lazy_copy(tensor))


def has_values(tensor: Tensor) -> bool:
    """Say whether a tensor's values are here, as plain numbers in memory."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not is_sharded(tensor)
    return plain and tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()


def is_of_another_class(tensor: Tensor) -> bool:
    """Say whether a tensor is of a class of its own, as quantization makes them of weights that were plain numbers."""
    return type(tensor) not in (Tensor, nn.Parameter) and not tensor.is_meta and not is_sharded(tensor)
