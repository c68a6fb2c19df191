"""Writes a cache: every sample encoded once, at each of the recipe's resolutions."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

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
    CachedCaption,
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
from edit_compile.distillation.processes import gathered, in_all, process
from edit_compile.errors import DistillError, some_of
from edit_compile.files import write_text
from edit_compile.progress import working

_FAILURES = (OSError, SafetensorError)


@dataclass(frozen=True)
class Encoded:
    """A sample ready to be written.

    Attributes:
        captions: their text and their tensors.
        latents: by resolution, the shape in pixels and the latents (C, h, w).
    """

    name: str
    captions: tuple[tuple[str, dict[str, Tensor]], ...]
    latents: dict[Shape, tuple[Shape, Tensor]]


class Producer(Protocol):
    """Samples in a fixed order, encoded.

    Attributes:
        skipped: what could not be read before any record was asked for, by name, with the reason.
        random_access: whether records cost nothing that are passed over.
        number: of records; None if that is not known.
    """

    skipped: dict[str, str]
    random_access: bool

    @property
    def number(self) -> int | None: ...

    def fingerprint(self) -> str:
        """Return what changes when samples are added, removed or renamed, or their files change in size."""
        ...

    def records(self, start: int) -> Iterator[Any]:
        """Yield records from the one of number `start` on, not yet encoded."""
        ...

    def encode(self, records: Sequence[Any], resolutions: Sequence[Shape]) -> tuple[list[Encoded], dict[str, str]]:
        """Encode some records; returns also, by name, why others could not be."""
        ...

    def empty_caption(self) -> dict[str, Tensor]:
        """Encode the empty caption."""
        ...


def write_cache(folder: Path, producer: Producer, header: dict[str, Any], *, shard_size: int, samples: int | None) -> Index:
    """Write a cache, or finish one that was begun the same way. Several processes, which must all call this, take a shard each at a time.

    Args:
        header: `model`, `made_from` and `resolutions` of the index.
        shard_size: records per shard. An unfinished shard is lost when a process is killed, and those of the others with it.
        samples: the maximum number of records; None for all.

    Raises:
        DistillError: the folder holds another cache, the disk is full, or nothing could be read.
    """
    rank, count = process()
    empty = trimmed({name: x[0].contiguous() for name, x in producer.empty_caption().items()})
    wanted = Header(**header, empty=digest(empty))
    if gathered([(folder / INDEX).is_file()])[0]:
        index = read_index(folder)
        _check_same(folder, wanted, index)
        return index
    try:
        shards = list(in_all(lambda: _begin(folder, wanted, empty) if rank == 0 else [], _FAILURES)[0])
        begun = sum(shard.taken for shard in shards)
        known = [number for number in (producer.number, samples) if number is not None]
        with working("caching: samples", min(known, default=None), begun) as work:
            for chunk in _own_chunks(producer, begun, shard_size, samples):
                number = len(shards) + rank
                made = in_all(partial(_encode_shard, folder, number, chunk, producer, wanted.resolutions), _FAILURES)
                new = [shard for shard in made if shard is not None]
                in_all(partial(_add, folder, new if rank == 0 else []), _FAILURES)
                shards += new
                work.note = f"{work.per_second(sum(shard.taken for shard in new)):.3g} samples/s"
                if len(new) < count or new[-1].taken < shard_size:
                    break
        finished: list[Index] = []
        in_all(lambda: finished.append(_finish(folder, wanted, shards, producer.skipped, writes=rank == 0)), _FAILURES)
        return finished[0]
    except (OSError, SafetensorError) as error:
        raise DistillError(
            f"{folder} cannot be written: {error}; finished shards stay, and the same command continues from them"
        ) from error


def _own_chunks(producer: Producer, start: int, size: int, limit: int | None) -> Iterator[list[Any]]:
    """Yield the records of this process's shards, from number `start` on, without end: where there are no more, nothing."""
    rank, count = process()
    end = sys.maxsize if limit is None else limit
    if producer.random_access:
        for first in itertools.count(start + rank * size, count * size):
            yield list(islice(producer.records(first), max(min(size, end - first), 0)))
    records = islice(producer.records(start), max(end - start, 0))
    while True:
        turns = [list(islice(records, size)) if turn == rank else sum(1 for _ in islice(records, size)) for turn in range(count)]
        yield cast("list[Any]", turns[rank])


def _begin(folder: Path, wanted: Header, empty: dict[str, Tensor]) -> list[Shard]:
    """Prepare the folder; returns the shards it has already."""
    folder.mkdir(parents=True, exist_ok=True)
    found = read_unfinished(folder)
    shards: list[Shard] = []
    if found is not None:
        header, shards = found
        _check_same(folder, wanted, header)
    elif others := sorted(path.name for path in folder.glob("[!.]*") if path.name != EMPTY):  # which is written first
        raise DistillError(f"{folder} is not empty ({some_of(others)}): choose another folder")
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


def _encode_shard(folder: Path, number: int, records: list[Any], producer: Producer, resolutions: Sequence[Shape]) -> Shard | None:
    """Write a shard's file; None if there are no records for it."""
    return _write_shard(folder, number, records, *producer.encode(records, resolutions)) if records else None


def _add(folder: Path, shards: list[Shard]) -> None:
    """Note that shards are finished, in their order."""
    for shard in shards:
        add_line(folder / UNFINISHED, shard.model_dump_json())


def _write_shard(folder: Path, number: int, records: list[Any], encoded: list[Encoded], skipped: dict[str, str]) -> Shard:
    tensors: dict[str, Tensor] = {}
    samples = []
    for place, sample in enumerate(encoded):
        captions = []
        for which, (text, conditions) in enumerate(sample.captions):
            own = {name: x.contiguous() for name, x in trimmed(conditions).items()}
            tensors |= {f"{place}/{CAPTIONS}/{which}/{name}": x for name, x in own.items()}
            captions.append(CachedCaption(text=text, digest=digest(own)))
        images = {}
        for resolution, (shape, latents) in sample.latents.items():
            key = resolution_key(resolution)
            tensors[f"{place}/{IMAGES}/{key}/{LATENTS}"] = latents
            images[key] = CachedLatents(shape=shape, digest=digest({LATENTS: latents}))
        samples.append(CachedSample(name=sample.name, captions=tuple(captions), images=images))
    file = folder / f"shard-{number:05d}.safetensors"
    write_tensors(file, tensors)
    return Shard(file=file.name, bytes=file.stat().st_size, taken=len(records), samples=tuple(samples), skipped=skipped)


def _finish(folder: Path, wanted: Header, shards: list[Shard], skipped: dict[str, str], *, writes: bool) -> Index:
    skipped = skipped | {name: reason for shard in shards for name, reason in shard.skipped.items()}
    if not any(shard.samples for shard in shards):
        for file in (UNFINISHED, EMPTY, *(shard.file for shard in shards)) if writes else ():
            (folder / file).unlink()
        raise DistillError(f"nothing could be read: {summarize(skipped)}")
    index = Index(**dict(wanted), shards=tuple(shards), skipped=skipped)
    if writes:
        write_text(folder / INDEX, index.model_dump_json())
        (folder / UNFINISHED).unlink()
    return index
