"""Writes a cache: every sample encoded once, at each of the recipe's resolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor

from edit_compile.adapters.encoders import trimmed
from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.cache.format import (
    CAPTIONS,
    EMPTY,
    IMAGES,
    INDEX,
    LATENTS,
    UNFINISHED,
    CachedLatents,
    CachedSample,
    Header,
    Index,
    Shard,
    add_line,
    digest,
    read_index,
    read_unfinished,
    resolution_key,
    write_tensors,
)
from edit_compile.distillation.data.records import summarize
from edit_compile.errors import DistillError
from edit_compile.files import write_text

Progress = Callable[[int, int], None]  # samples written and skipped so far


@dataclass(frozen=True)
class Encoded:
    """A sample ready to be written.

    Attributes:
        captions: the tensors of its caption.
        latents: by resolution, the shape in pixels and the latents (C, h, w).
    """

    name: str
    caption: str
    captions: dict[str, Tensor]
    latents: dict[Shape, tuple[Shape, Tensor]]


class Producer(Protocol):
    """Samples in a fixed order, encoded.

    Attributes:
        skipped: what could not be read before any record was asked for, by name, with the reason.
    """

    skipped: dict[str, str]

    def records(self, start: int) -> Iterator[Any]:
        """Yield records from the one of number `start` on, not yet encoded."""
        ...

    def encode(self, records: Sequence[Any], resolutions: Sequence[Shape]) -> tuple[list[Encoded], dict[str, str]]:
        """Encode some records; returns also, by name, why others could not be."""
        ...

    def empty_caption(self) -> dict[str, Tensor]:
        """Encode the empty caption."""
        ...


def write_cache(
    folder: Path, producer: Producer, header: dict[str, Any], *, shard_size: int, samples: int | None, progress: Progress
) -> Index:
    """Write a cache, or finish one that was begun the same way.

    Args:
        header: `model`, `made_from` and `resolutions` of the index.
        shard_size: records per shard. An unfinished shard is lost when the process is killed.
        samples: the maximum number of records; None for all.

    Raises:
        DistillError: the folder holds another cache, the disk is full, or nothing could be read.
    """
    empty = trimmed({name: x[0].contiguous() for name, x in producer.empty_caption().items()})
    wanted = Header(**header, empty=digest(empty))
    if (folder / INDEX).is_file():
        index = read_index(folder)
        _check_same(folder, wanted, index)
        return index
    try:
        shards = _begin(folder, wanted, empty)
        taken = sum(shard.taken for shard in shards)
        records = islice(producer.records(taken), None if samples is None else max(samples - taken, 0))
        while chunk := list(islice(records, shard_size)):
            shards.append(_write_shard(folder, len(shards), chunk, *producer.encode(chunk, wanted.resolutions)))
            progress(sum(len(shard.samples) for shard in shards), sum(len(shard.skipped) for shard in shards))
        return _finish(folder, wanted, shards, producer.skipped)
    except (OSError, SafetensorError) as error:
        raise DistillError(
            f"{folder} cannot be written: {error}; finished shards stay, and the same command continues from them"
        ) from error


def _begin(folder: Path, wanted: Header, empty: dict[str, Tensor]) -> list[Shard]:
    """Prepare the folder; returns the shards it has already."""
    folder.mkdir(parents=True, exist_ok=True)
    found = read_unfinished(folder)
    shards: list[Shard] = []
    if found is not None:
        header, shards = found
        _check_same(folder, wanted, header)
    write_tensors(folder / EMPTY, empty)
    lines = [wanted.model_dump_json(), *(shard.model_dump_json() for shard in shards)]
    write_text(folder / UNFINISHED, "\n".join(lines) + "\n")
    return shards


def _check_same(folder: Path, wanted: Header, found: Header) -> None:
    now, then = ({name: header.model_dump(mode="json")[name] for name in Header.model_fields} for header in (wanted, found))
    different = [name for name in now if name not in ("made_from", "package_version") and now[name] != then[name]]
    different += [name for name in now["made_from"] if now["made_from"][name] != then["made_from"].get(name)]
    if different:
        raise DistillError(f"{folder} has another cache ({', '.join(different)} differ): remove it or choose another folder")


def _write_shard(folder: Path, number: int, records: list[Any], encoded: list[Encoded], skipped: dict[str, str]) -> Shard:
    tensors: dict[str, Tensor] = {}
    samples = []
    for place, sample in enumerate(encoded):
        captions = {name: x.contiguous() for name, x in trimmed(sample.captions).items()}
        tensors |= {f"{place}/{CAPTIONS}/{name}": x for name, x in captions.items()}
        images = {}
        for resolution, (shape, latents) in sample.latents.items():
            key = resolution_key(resolution)
            tensors[f"{place}/{IMAGES}/{key}/{LATENTS}"] = latents
            images[key] = CachedLatents(shape=shape, digest=digest({LATENTS: latents}))
        samples.append(CachedSample(name=sample.name, caption=sample.caption, captions=digest(captions), images=images))
    file = folder / f"shard-{number:05d}.safetensors"
    write_tensors(file, tensors)
    shard = Shard(file=file.name, bytes=file.stat().st_size, taken=len(records), samples=tuple(samples), skipped=skipped)
    add_line(folder / UNFINISHED, shard.model_dump_json())
    return shard


def _finish(folder: Path, wanted: Header, shards: list[Shard], skipped: dict[str, str]) -> Index:
    skipped = skipped | {name: reason for shard in shards for name, reason in shard.skipped.items()}
    if not any(shard.samples for shard in shards):
        for file in (UNFINISHED, EMPTY, *(shard.file for shard in shards)):
            (folder / file).unlink()
        raise DistillError(f"nothing could be read: {summarize(skipped)}")
    index = Index(**dict(wanted), shards=tuple(shards), skipped=skipped)
    write_text(folder / INDEX, index.model_dump_json())
    (folder / UNFINISHED).unlink()
    return index
