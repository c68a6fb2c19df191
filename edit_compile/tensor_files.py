"""Tensors in safetensors files, written one at a time, and in pieces: each process those it holds, read again by any number of processes.

torch.distributed.checkpoint is not what writes them: its own storage keeps its index as a pickle, which runs what it is told to when it is
read, and its storage for safetensors makes one string of all that a process has, which takes as much memory again. Where a process's piece
of a tensor lies is asked by its protocol.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor

from edit_compile.torch_internals import is_sharded, place_of_shard

_PLACES = "edit_compile.places"  # in a file's metadata: where the tensors that are pieces belong
_ALIGNMENT = 8  # bytes
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where a piece lies: the shape of the whole tensor, and the piece's first index in each dimension."""

    shape: Shape
    offsets: Shape


_PLACES_OF = TypeAdapter(dict[str, Place])


class Entry(NamedTuple):
    """A tensor to be written.

    Attributes:
        shape: of what is written.
        values: gives it, when its turn comes.
        place: of a piece; None for a whole tensor.
    """

    dtype: torch.dtype
    shape: Shape
    values: Callable[[], Tensor]
    place: Place | None = None

    def copied(self) -> Entry:
        """Take the values now, to the CPU, whatever becomes of the tensor."""
        values = self.values().to("cpu", copy=True)
        return self._replace(values=lambda: values)


def entries_of(tensors: Mapping[str, Tensor], *, is_first: bool) -> dict[str, Entry]:
    """Select what this process has to write of some tensors, so that all processes together write every piece once.

    Args:
        is_first: whether this is the process that writes what all of them have.
    """
    found: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            if is_first:
                found[name] = Entry(tensor.dtype, tuple(tensor.shape), tensor.detach)
            continue
        offsets, sizes, is_copy = place_of_shard(tensor)
        if not is_copy and 0 not in sizes:
            found[name] = Entry(tensor.dtype, sizes, tensor.detach().to_local, Place(tuple(tensor.shape), offsets))  # type: ignore[attr-defined]
    return found


def in_order(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Bring entries into the order in which they are written, each aligned."""
    return dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))


def write_tensors(path: Path, entries: Mapping[str, Entry]) -> str:
    """Write a safetensors file, holding no more than one tensor besides those that are there; returns the SHA-256 of what was written.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor's dtype has no place in such a file.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in _bytes_of(in_order(entries)):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _bytes_of(entries: Mapping[str, Entry]) -> Iterator[Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if places := {name: entry.place for name, entry in entries.items() if entry.place is not None}:
        header["__metadata__"][_PLACES] = json.dumps(places)
    end = 0
    for name, entry in entries.items():
        if entry.dtype not in _NAMES:
            raise ValueError(f"{name} is of {entry.dtype}, which is not written to checkpoints")
        begin, end = end, end + math.prod(entry.shape) * entry.dtype.itemsize
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield struct.pack("<Q", len(text)) + text
    for entry in entries.values():
        yield entry.values().to("cpu").contiguous().flatten().view(torch.uint8).numpy()


class _Piece(NamedTuple):
    file: Any
    place: Place
    size: Shape


class SavedTensors:
    """The tensors in some files; nothing is read before it is asked for, and of that no more than asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """
        Raises:
            OSError, SafetensorError: a file cannot be read.
            ValueError: pieces are missing, or do not fit together.
        """
        self._pieces: dict[str, list[_Piece]] = {}
        for path in paths:
            file: Any = safe_open(path, "pt").__enter__()  # type: ignore[no-untyped-call]
            places = _PLACES_OF.validate_json((file.metadata() or {}).get(_PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                size = tuple(file.get_slice(name).get_shape())
                place = places.get(name, Place(size, (0,) * len(size)))
                self._pieces.setdefault(name, []).append(_Piece(file, place, size))
        for name, pieces in self._pieces.items():
            _check(name, pieces)

    def names(self) -> list[str]:
        """List the tensors."""
        return list(self._pieces)

    def shape(self, name: str) -> Shape:
        """Return the shape of a whole tensor."""
        return self._pieces[name][0].place.shape

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        """Read a tensor, or a part of it, on the CPU.

        Args:
            offsets, sizes: of the part: its first index and its size in each dimension.

        Raises:
            ValueError: the pieces do not cover it.
        """
        pieces = self._pieces[name]
        shape = pieces[0].place.shape
        offsets, sizes = tuple(offsets or (0,) * len(shape)), tuple(shape if sizes is None else sizes)
        found = torch.empty(sizes, dtype=DTYPES[pieces[0].file.get_slice(name).get_dtype()])
        read = 0
        for piece in pieces:
            first = [max(a, b) for a, b in zip(offsets, piece.place.offsets, strict=True)]
            last = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, piece.place.offsets, piece.size, strict=True)]
            extents = [max(b - a, 0) for a, b in zip(first, last, strict=True)]
            if not math.prod(extents):
                continue
            found[_slices(first, extents, offsets)] = _part(piece, name, _slices(first, extents, piece.place.offsets))
            read += math.prod(extents)
        if read != math.prod(sizes):
            raise ValueError(f"{name} is not whole")
        return found


def _slices(first: Sequence[int], extents: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, a - o + n) for a, n, o in zip(first, extents, origin, strict=True))


def _part(piece: _Piece, name: str, part: tuple[slice, ...]) -> Tensor:
    values: Tensor = piece.file.get_slice(name)[part] if part else piece.file.get_tensor(name)
    return values


def _check(name: str, pieces: Sequence[_Piece]) -> None:
    shape = pieces[0].place.shape
    for piece in pieces:
        dimensions = {len(shape), len(piece.place.offsets), len(piece.size)}
        inside = all(a >= 0 and a + n <= m for a, n, m in zip(piece.place.offsets, piece.size, shape, strict=False))
        if piece.place.shape != shape or len(dimensions) > 1 or not inside:
            raise ValueError(f"the pieces of {name} are not of one tensor")
    if sum(math.prod(piece.size) for piece in pieces) != math.prod(shape):
        raise ValueError(f"{name} is not whole: pieces are missing")
