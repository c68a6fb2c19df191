"""A cache on the disk: shards of safetensors, and one JSON index with the checksum of everything in them.

    index.json                   what it was made from, the shards, their samples with shapes and checksums, what was skipped
    shard-00000.safetensors      "7/captions/NAME": a tensor of sample 7's caption; "7/pictures/512x512/latents"
    empty.safetensors            the tensors of the empty caption
    unfinished.jsonl             instead of the index while the cache is made: its head, then a line for each finished shard

A shard is written beside its place, flushed and moved there, then its line is added: so a cache whose making was killed
at any point goes on from its last finished shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.records import Unreadable
from edit_compile.errors import DistillError
from edit_compile.files import replacing
from edit_compile.frozen import Frozen

VERSION = 1
INDEX, EMPTY, UNFINISHED = "index.json", "empty.safetensors", "unfinished.jsonl"
CAPTIONS, PICTURES, LATENTS = "captions", "pictures", "latents"


class Latents(Frozen):
    """A sample's latents at one resolution: the height and width of its picture in pixels, and the checksum."""

    shape: Shape
    digest: str


class Sample(Frozen):
    """A sample in a shard. `captions`: the checksum of its caption's tensors; `pictures`: by resolution, such as "512x512"."""

    name: str
    caption: str
    captions: str
    pictures: dict[str, Latents]


class Shard(Frozen):
    """A file of samples, and what could not be read when it was made, with the reason.

    Attributes:
        taken: records of the data that are in it or were skipped.
    """

    file: str
    bytes: int
    taken: int
    samples: tuple[Sample, ...]
    skipped: dict[str, str]


class Head(Frozen):
    """What a cache was made from. `model`: the transformer's class; `empty`: the checksum of the empty caption's tensors."""

    version: int = VERSION
    model: str
    made_from: dict[str, Any]
    resolutions: tuple[Shape, ...]
    empty: str


class Index(Head):
    """All of a finished cache. `skipped`: all that could not be read, by name, with the reason."""

    shards: tuple[Shard, ...]
    skipped: dict[str, str]


def resolution_key(resolution: Shape) -> str:
    return f"{resolution[0]}x{resolution[1]}"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of tensors with their names, types and shapes."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_index(folder: Path) -> Index:
    """The index of a finished cache.

    Raises:
        DistillError: there is none, or it cannot be used.
    """
    path = folder / INDEX
    if not path.is_file():
        unfinished = (folder / UNFINISHED).is_file()
        advice = "it is unfinished: run the same `edit-compile cache` again to finish it" if unfinished else f"{INDEX} is missing"
        raise DistillError(f"{folder} holds no cache: {advice}")
    return _validated(Index, path.read_text(), str(path))


def read_unfinished(folder: Path) -> tuple[Head, list[Shard]] | None:
    """The head and the finished shards of a cache that is being made; they end before the first that is not whole.

    None if there is no such cache.

    Raises:
        DistillError: it was begun by another release.
    """
    path = folder / UNFINISHED
    if not path.is_file():
        return None
    head, *lines = path.read_text().split("\n")
    shards = []
    for line in lines[:-1]:  # the last is empty, or torn
        shard = _validated(Shard, line, str(path))
        file = folder / shard.file
        if not file.is_file() or file.stat().st_size != shard.bytes:
            break
        shards.append(shard)
    return _validated(Head, head, str(path)), shards


def _validated(kind: type[Any], text: str, where: str) -> Any:
    try:
        content = json.loads(text)
        version = content.get("version", VERSION)
        if version != VERSION:
            raise DistillError(f"{where} has version {version!r}, this release reads version {VERSION}")
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise DistillError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, AttributeError) as error:
        raise DistillError(f"{where} cannot be read: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors at once or not at all."""
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def add_line(path: Path, text: str) -> None:
    """Append a line, and see it to the disk."""
    with path.open("a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_part(path: Path, prefix: str, expected: str) -> dict[str, Tensor]:
    """The tensors of a file whose names begin with a prefix, by the rest of their names.

    Raises:
        Unreadable: the file or these tensors are damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    if digest(found) != expected:
        raise Unreadable(f"{path}: {prefix} does not have the checksum that the index gives")
    return found
