"""`edit-compile cache`: a recipe's data, encoded for its model at the resolutions of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edit_compile.adapters.load_model import load_model
from edit_compile.distillation.data.buckets import Shape
from edit_compile.distillation.data.cache.encode import PictureProducer, PromptProducer, records_of
from edit_compile.distillation.data.cache.format import Index, read_index, resolution_key
from edit_compile.distillation.data.cache.write import Producer, Progress, write_cache
from edit_compile.distillation.data.captioned import CaptionedData
from edit_compile.distillation.data.opening import encoder_of, prompts_of
from edit_compile.distillation.data.source import Origin
from edit_compile.distillation.data.sources.cached import Cached
from edit_compile.distillation.data.sources.hub import DatasetData, Stream
from edit_compile.distillation.data.sources.prompts import PromptsData
from edit_compile.errors import DistillError
from edit_compile.student.checkpoint import INDEX, base_of

if TYPE_CHECKING:
    from edit_compile.distillation.recipe.schema import Recipe

SHARD_SIZE, BATCH = 128, 8
_FREE = frozenset({"caption_dropout", "held_out"})  # what may be chosen again when the cache is read


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds.

    Attributes:
        skipped: what could not be read when it was made, by name, with the reason.
        damaged: the same for what can no longer be read; empty unless it was verified.
    """

    folder: Path
    samples: int
    shards: int
    bytes: int
    resolutions: tuple[str, ...]
    skipped: dict[str, str]
    damaged: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder)}


def make_cache(
    recipe: Recipe,
    folder: str | Path,
    *,
    samples: int | None = None,
    shard_size: int = SHARD_SIZE,
    batch: int = BATCH,
    progress: Progress = lambda written, skipped: None,
) -> CacheReport:
    """Encode a recipe's data. Begun and not finished, it goes on; finished, nothing is done.

    Args:
        folder: for recipes with `data: {kind: cached, path: FOLDER}`.
        samples: at most so many.
        shard_size: samples of a file, which is also what is lost when the process is killed.
        batch: samples encoded or drawn at a time.
        progress: called after each shard with the numbers of samples written and skipped.

    Raises:
        DistillError: the data cannot be encoded, the folder holds another cache or cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, base = _teacher(recipe, device)
    producer = _producer(recipe, Origin(model, recipe.seed, base, device, recipe.dtype), batch)
    data = recipe.data.model_dump(mode="json", exclude=_FREE)  # type: ignore[arg-type]
    made_from = {"model": recipe.model, "data": data, "precision": recipe.precision, "samples": samples, "shard_size": shard_size}
    if isinstance(recipe.data, PromptsData):
        made_from["seed"] = recipe.seed
    head = {"model": type(model).__name__, "made_from": made_from, "resolutions": resolutions_of(recipe)}
    index = write_cache(Path(folder), producer, head, shard_size=shard_size, samples=samples, progress=progress)
    return _report(Path(folder), index, {})


def verify_cache(folder: str | Path, recipe: Recipe) -> CacheReport:
    """Read all of a cache and compare every checksum.

    Raises:
        DistillError: there is no finished cache for the recipe's model.
    """
    model = load_model(_source(recipe), structure_only=True).model
    return _report(Path(folder), read_index(Path(folder)), Cached(Path(folder), model).damaged())


def resolutions_of(recipe: Recipe) -> list[Shape]:
    """Those that a recipe trains at, in order."""
    warm = recipe.layerwise.resolution if recipe.layerwise is not None else None
    return list(dict.fromkeys([*([warm] if warm else []), *(stage.resolution for stage in recipe.stages)]))


def _producer(recipe: Recipe, origin: Origin, batch: int) -> Producer:
    data = recipe.data
    if isinstance(data, PromptsData):
        return PromptProducer(prompts_of(data, origin), batch)
    if isinstance(data, DatasetData) and data.streaming:
        return PictureProducer(Stream(data, origin.seed, 0).records, encoder_of(data, origin), data.buckets, batch)
    if isinstance(data, CaptionedData):
        unreadable: dict[str, str] = {}
        corpus = data.corpus(unreadable)
        return PictureProducer(lambda start: records_of(corpus, start), encoder_of(data, origin), data.buckets, batch, unreadable)
    raise DistillError(f"data.kind: {data.kind} is ready to train on as it is, there is nothing to cache")


def _source(recipe: Recipe) -> str:
    """The name of the model that is the teacher."""
    converted = (Path(recipe.model) / INDEX).is_file()
    base = base_of(recipe.model) if converted else recipe.model
    if base is None:
        raise DistillError(f"{recipe.model} does not say where its base pipeline is")
    return base


def _teacher(recipe: Recipe, device: torch.device) -> tuple[nn.Module, str]:
    """The model, with weights only if it has to draw, and where its pipeline is."""
    draws = isinstance(recipe.data, PromptsData)
    loaded = load_model(_source(recipe), dtype=recipe.dtype, structure_only=not draws)
    return loaded.model.eval().to(device) if draws else loaded.model, loaded.pipeline or loaded.source


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
