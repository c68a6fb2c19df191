"""A cache on disk: shards of safetensors, and one JSON index with the checksum of everything in them.

    index.json                   what it was made from, the shards, their samples with shapes and checksums, what was skipped
    shard-00000.safetensors      "7/captions/0/NAME": a tensor of sample 7's first caption; "7/images/512x512/latents"
    empty.safetensors            the tensors of the empty caption
    unfinished.jsonl             instead of the index while the cache is being made: its header, then a line for each finished shard

A shard is written beside its place, flushed and moved there, then its line is added: a cache whose encoding is killed at any
point continues from its last finished shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.records import BadSample
from edit_compile.errors import DistillError
from edit_compile.files import replacing
from edit_compile.frozen import Frozen, first_problem
from edit_compile.version import __version__, made_by_another

FORMAT = 3
Content = TypeVar("Content", bound=Frozen)
INDEX, EMPTY, UNFINISHED = "index.json", "empty.safetensors", "unfinished.jsonl"
CAPTIONS, IMAGES, LATENTS = "captions", "images", "latents"


class CachedLatents(Frozen):
    """The latents of a sample at one resolution."""

    shape: Shape
    """Height and width of the image, in pixels."""
    digest: str
    """The checksum of the latents."""


class CachedCaption(Frozen):
    """A caption of a sample."""

    text: str
    digest: str
    """The checksum of its tensors."""


class CachedSample(Frozen):
    """A sample in a shard."""

    name: str
    captions: tuple[CachedCaption, ...]
    images: dict[str, CachedLatents]
    """By resolution (`512x512`)."""


class Shard(Frozen):
    """A file of samples, and what could not be read when it was made, with the reason."""

    file: str = Field(pattern=r"^shard-\d{5,}\.safetensors$")
    bytes: int
    taken: int
    """How many records of the data are in it or were skipped."""
    samples: tuple[CachedSample, ...]
    skipped: dict[str, str]


class Header(Frozen):
    """What a cache was made from, and by which version."""

    version: int = FORMAT
    package_version: str = __version__
    model: str
    """The transformer's class."""
    made_from: dict[str, Any]
    resolutions: tuple[Shape, ...]
    empty: str
    """The checksum of the empty caption's tensors."""


class Index(Header):
    """All of a finished cache."""

    shards: tuple[Shard, ...]
    skipped: dict[str, str]
    """All that could not be read, by name, with the reason."""


def resolution_key(resolution: Shape) -> str:
    """Name a resolution: `512x768`."""
    return f"{resolution[0]}x{resolution[1]}"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute a checksum of tensors with their names, types and shapes."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_index(folder: Path) -> Index:
    """Read the index of a finished cache.

    Raises:
        DistillError: there is none, or it cannot be used.
    """
    path = folder / INDEX
    if not path.is_file():
        unfinished = (folder / UNFINISHED).is_file()
        advice = "it is unfinished: run the same `edit-compile cache` again to finish it" if unfinished else f"{INDEX} is missing"
        raise DistillError(f"{folder} is not a finished cache: {advice}")
    index = _validated(Index, path.read_bytes(), str(path))
    keys = {resolution_key(resolution) for resolution in index.resolutions}
    for sample in (sample for shard in index.shards for sample in shard.samples):
        if sample.images.keys() != keys or not sample.captions:
            raise DistillError(f"{path}: {sample.name} lacks a caption or a resolution: the index is damaged; make the cache again")
    return index


def read_unfinished(folder: Path) -> tuple[Header, list[Shard]] | None:
    """Read the header and the finished shards of a cache that is being made; they end before the first incomplete one.

    None if there is no such cache.

    Raises:
        DistillError: it was begun by another version.
    """
    path = folder / UNFINISHED
    if not path.is_file():
        return None
    header, *lines = path.read_bytes().split(b"\n")
    shards = []
    for line in lines[:-1]:  # the last is empty, or torn
        shard = _validated(Shard, line, str(path))
        file = folder / shard.file
        if not file.is_file() or file.stat().st_size != shard.bytes:
            break
        shards.append(shard)
    return _validated(Header, header, str(path)), shards


def _validated(kind: type[Content], text: bytes, where: str) -> Content:
    try:
        content = json.loads(text)
        if content.get("version", FORMAT) != FORMAT:
            raise DistillError(f"{where} was {made_by_another(content.get('package_version'))}; make the cache again")
        return kind.model_validate(content)
    except ValidationError as error:
        raise DistillError(f"{where}: {first_problem(error)}") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise DistillError(f"{where} cannot be read: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors at once or not at all."""
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def add_line(path: Path, text: str) -> None:
    """Append a line and fsync it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_part(path: Path, prefix: str, expected: str) -> dict[str, Tensor]:
    """Read the tensors of a file whose names begin with a prefix, by the rest of their names.

    Raises:
        BadSample: the file or these tensors are damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadSample(f"{path} cannot be read: {error}") from error
    if digest(found) != expected:
        raise BadSample(f"{path}: {prefix} does not have the checksum that the index gives")
    return found
