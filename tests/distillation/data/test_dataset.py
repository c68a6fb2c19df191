"""Data sets through `datasets`, at random access and as streams."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

import data_files
import edit_compile as ec
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.buckets import Buckets
from edit_compile.distillation.data.captioned_images import EncodedImages
from edit_compile.distillation.data.decode_image import image_of
from edit_compile.distillation.data.iterable_style import IterableSource
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.sources.dataset import DatasetData, HubStream

datasets = pytest.importorskip("datasets")
SIZES = [(24, 24), (20, 40), (48, 24)]
PER_SHARD, SHARDS = 40, 3


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    for shard in range(SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        rows = {
            "image": [{"bytes": data_files.png(n, *SIZES[n % 3]), "path": None} for n in numbers],
            "caption": [f"image {n}" for n in numbers],
        }
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{shard}.parquet")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def data_of(folder, **options):
    return DatasetData(kind="dataset", path="parquet", data_files=str(folder / "*.parquet"), **options)


def streamed(folder, seed=0, held_out=6, **options):
    data = data_of(folder, streaming=True, **options)
    return IterableSource(HubStream(data, seed, held_out), data_files.Letters(), Buckets(multiple=4), seed, 0.0)


def numbers_of(batch):
    return [int(caption.removeprefix("image ")) for caption in batch.captions]


def test_rows_are_images_with_captions(parquet):
    rows = data_of(parquet).records({})
    assert len(rows) == PER_SHARD * SHARDS
    assert rows.record(50).captions == ("image 50",)
    assert image_of(rows.record(50)).tobytes() == data_files.image(50, *SIZES[2]).tobytes()
    batch = MapStyleSource(EncodedImages(rows, data_files.Letters(), None), 0).batch(BatchRequest(0, 4, range(4), 16, 16))
    assert batch.latents.shape == (4, 3, 8, 8)


def test_imagefolder_of_datasets(tmp_path):
    folder = data_files.folder_of(tmp_path / "images", [(24, 24)] * 3, captions=False)
    lines = [data_files.as_json(file_name=f"00{i}.png", text=f"image {i}").decode() for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = DatasetData(kind="dataset", path="imagefolder", data_dir=str(folder)).records({})
    assert sorted(rows.record(i).captions[0] for i in range(3)) == ["image 0", "image 1", "image 2"]


def test_webdataset_of_datasets_as_a_stream(tmp_path):
    members = [(f"{n}.{end}", content) for n in range(3) for end, content in (("png", data_files.png(n)), ("txt", f"image {n}".encode()))]
    data_files.tar_of(tmp_path / "a.tar", members)
    data = DatasetData(kind="dataset", path="webdataset", data_files=str(tmp_path / "a.tar"), streaming=True)
    assert [record.captions[0] for _, record in HubStream(data, 0, 0).records(0)] == ["image 0", "image 1", "image 2"]


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ec.DistillError, match=r"data.path: parquet cannot be loaded"):
        data_of(tmp_path).load()


def test_a_stream_gives_the_same_whoever_asks_and_whenever(parquet):
    requests = [BatchRequest(4 * step, 4, range(4), 16, 16) for step in (0, 1, 2, 20, 3)]
    source = streamed(parquet)
    for request in requests:
        found = source.batch(request)
        parts = [streamed(parquet).batch(BatchRequest(request.position, 4, rows, 16, 16)) for rows in (range(2), range(2, 4))]
        assert torch.equal(torch.cat([part.latents for part in parts]), found.latents)
        assert parts[0].captions + parts[1].captions == found.captions
    emptied = source.batch(replace(requests[0], empty_captions=True))
    assert torch.equal(emptied.latents, source.batch(requests[0]).latents)
    assert emptied.captions == ("",) * 4


def test_a_streams_epoch_has_all_but_the_held_out(parquet):
    source = streamed(parquet)
    held_out = set(numbers_of(source.batch(BatchRequest(0, 12, range(12), 16, 16, "validation"))))
    assert held_out == {0, 1, 40, 41, 80, 81}
    rest = set(range(PER_SHARD * SHARDS)) - held_out
    batches = [source.batch(BatchRequest(3 * step, 3, range(3), 16, 16)) for step in range(48)]
    first = [number for batch in batches for number in numbers_of(batch)][: len(rest)]
    assert set(first) <= rest
    assert {n for batch in batches for n in numbers_of(batch)} == rest
    assert {tuple(batch.latents.shape[2:]) for batch in batches} == {(8, 8), (6, 10), (10, 6)}


class Counting(data_files.Letters):
    """Notes the captions of all images that are decoded."""

    def __init__(self):
        self.seen = []

    def check(self, caption):
        self.seen.append(int(caption.removeprefix("image ")))


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_out_a_streams_images_and_go_on_in_any_number(parquet, world):
    def steps_of(processes, steps):
        """Run some steps as so many processes, each with a source of its own; returns the batches, and what each process decoded."""
        batches, encoders = [[] for _ in steps], [Counting() for _ in range(processes)]
        for rank, encoder in enumerate(encoders):
            source = IterableSource(HubStream(data_of(parquet, streaming=True), 0, 6), encoder, Buckets(multiple=4), 0, 0.0)
            size = 6 // processes
            for batch, step in zip(batches, steps, strict=True):
                found = source.batch(BatchRequest(6 * step, 6, range(rank * size, (rank + 1) * size), 16, 16))
                batch.append((found.latents, numbers_of(found)))
        return batches, [encoder.seen for encoder in encoders]

    alone, _ = steps_of(1, range(16))  # a window of batches, within an epoch
    first, decoded = steps_of(world, range(9))
    rest, more = steps_of(6 // world, range(9, 16))
    for (whole,), parts in zip(alone, first + rest, strict=True):
        assert torch.equal(torch.cat([latents for latents, _ in parts]), whole[0])
        assert [number for _, numbers in parts for number in numbers] == whole[1]
    seen = [number for each in (*decoded, *more) for number in each]
    assert len(seen) == len(set(seen)) == 96  # each image is decoded once, in one process


def test_processes_read_shards_of_their_own(parquet):
    data, seen = data_of(parquet, streaming=True, own_shards=True), set()
    for rank in range(SHARDS):
        stream, encoder, numbers = HubStream(data, 0, 6, (rank, SHARDS)), Counting(), []
        source = IterableSource(stream, encoder, Buckets(multiple=4), 0, 0.0, SHARDS)
        for step, turn in itertools.product(range(16), range(2)):  # a window of batches, each in two micro-batches
            rows = range((turn * SHARDS + rank) * 2, (turn * SHARDS + rank + 1) * 2)
            numbers += numbers_of(source.batch(BatchRequest(4 * SHARDS * step, 4 * SHARDS, rows, 16, 16)))
        records = itertools.chain.from_iterable(map(stream.epoch, itertools.count()))
        expected = [int(record.captions[0].removeprefix("image ")) for _, record in itertools.islice(records, 64)]
        assert encoder.seen == numbers
        assert sorted(numbers) == sorted(expected)
        epoch = set(expected[: PER_SHARD - 2])
        assert len({number // PER_SHARD for number in epoch}) == 1
        seen |= epoch
    assert len(seen) == SHARDS * (PER_SHARD - 2)


def test_shards_of_their_own_are_of_streams_and_enough_for_all(parquet):
    with pytest.raises(ec.DistillError, match=f"has {SHARDS} shards for {SHARDS + 1} processes"):
        HubStream(data_of(parquet, streaming=True, own_shards=True), 0, 6, (0, SHARDS + 1))
    with pytest.raises(ValidationError, match="set streaming: true"):
        data_of(parquet, own_shards=True)


def test_records_of_a_stream_can_be_resumed(parquet):
    stream = HubStream(data_of(parquet, streaming=True), 0, 0)
    assert [record.captions[0] for _, record in stream.records(70)] == [f"image {n}" for n in range(70, 120)]


def test_a_shard_that_cannot_be_read_is_named(parquet, tmp_path):
    for file in parquet.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    source = streamed(tmp_path)
    content = bytearray((tmp_path / "1.parquet").read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    (tmp_path / "1.parquet").write_bytes(content)
    seen = {n for step in range(40) for n in numbers_of(source.batch(BatchRequest(3 * step, 3, range(3), 16, 16)))}
    assert seen == {*range(2, 40), *range(82, 120)}
    assert any("shard 1" in name and "cannot be read" in reason for name, reason in source.skipped.items())


def test_bad_columns_say_what_there_is(parquet):
    for options, message in (({"image": "photo"}, "it has no photo, but image, caption"), ({"caption": "alt"}, "it has no alt, but")):
        data = data_of(parquet, **options)
        with pytest.raises(ec.DistillError, match=message):
            MapStyleSource(EncodedImages(data.records({}), data_files.Letters(), None), 0).batch(BatchRequest(0, 2, range(2), 16, 16))


def test_a_stream_without_anything_left_says_so(parquet):
    with pytest.raises(ec.DistillError, match=r"nothing readable besides the held-out samples"):
        streamed(parquet, held_out=500).batch(BatchRequest(0, 2, range(2), 16, 16))
