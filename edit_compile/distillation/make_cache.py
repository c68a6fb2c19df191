"""`edit-compile cache`: a recipe's data, encoded for its model at the resolutions of its stages."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.cache.format import INDEX, Index, read_index, resolution_key
from edit_compile.distillation.data.cache.write import write_cache
from edit_compile.distillation.data.source import SourceContext
from edit_compile.distillation.data.sources.cached import CachedDataset
from edit_compile.distillation.models import load_original
from edit_compile.distillation.processes import join_processes, process
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.peers import watching_peers
from edit_compile.errors import DistillError
from edit_compile.files import alone_in
from edit_compile.frozen import dump_except

SHARD_SIZE, BATCH = 128, 8


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds.

    Attributes:
        skipped: what could not be read when it was made, by name, with the reason.
        damaged: what can no longer be read, likewise; empty unless the cache was verified.
    """

    folder: Path
    samples: int
    shards: int
    bytes: int
    resolutions: tuple[str, ...]
    skipped: dict[str, str]
    damaged: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {**vars(self), "folder": str(self.folder)}


def make_cache(
    recipe: Recipe,
    folder: str | Path,
    *,
    samples: int | None = None,
    shard_size: int = SHARD_SIZE,
    batch: int = BATCH,
) -> CacheReport:
    """Encode a recipe's data. An unfinished cache is continued, a finished one left alone.

    Under `accelerate launch` all processes encode, each a shard at a time; the cache is what one process would have made.

    Args:
        folder: for recipes with `data: {kind: cached, path: FOLDER}`.
        samples: the maximum number of samples.
        shard_size: samples per file; that many may be lost when the process is killed.
        batch: samples encoded or sampled at a time.

    Raises:
        DistillError: the data cannot be encoded, or the folder has another cache or cannot be written.
    """
    device, data = join_processes(), recipe.data
    model, base = load_original(recipe, structure_only=not data.sampled_by_teacher)
    if data.sampled_by_teacher:
        model.eval().to(device)
    producer = data.producer(SourceContext(model, recipe.seed, base, device, recipe.dtype), batch)
    made_from: dict[str, Any] = {"model": recipe.model, "data": dump_except(data, "cache"), "precision": recipe.precision}
    made_from |= {"samples": samples, "shard_size": shard_size} | ({"seed": recipe.seed} if data.sampled_by_teacher else {})
    made_from["fingerprint"] = producer.fingerprint()
    header = {"model": type(model).__name__, "made_from": made_from, "resolutions": resolutions_of(recipe)}
    with watching_peers(lambda: f"finished shards stay in {folder}, and the same command continues from them"), _alone(Path(folder)):
        index = write_cache(Path(folder), producer, header, shard_size=shard_size, samples=samples)
    return _report(Path(folder), index, {})


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Keep other commands out of a cache that is not finished."""
    is_read = process()[0] != 0 or (folder / INDEX).is_file()
    return nullcontext() if is_read else alone_in(folder, "makes a cache in", DistillError)


def verify_cache(folder: str | Path, recipe: Recipe) -> CacheReport:
    """Read all of a cache and compare every checksum.

    Raises:
        DistillError: there is no finished cache for the recipe's model.
    """
    model, _ = load_original(recipe, structure_only=True)
    return _report(Path(folder), read_index(Path(folder)), CachedDataset(Path(folder), model).damaged())


def resolutions_of(recipe: Recipe) -> list[Shape]:
    """List the resolutions that a recipe trains at, in order."""
    return list(dict.fromkeys((phase.height, phase.width) for phase in phases_of(recipe)))


def _report(folder: Path, index: Index, damaged: dict[str, str]) -> CacheReport:
    return CacheReport(
        folder,
        sum(len(shard.samples) for shard in index.shards),
        len(index.shards),
        sum(shard.bytes for shard in index.shards),
        tuple(map(resolution_key, index.resolutions)),
        index.skipped,
        damaged,
    )
