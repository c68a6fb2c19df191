"""Caches: what is read is what was encoded; damage is noticed; making one survives being killed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from threading import Barrier, BrokenBarrierError

import pytest
import torch

import data_files
import edit_compile as ec
from edit_compile.distillation import processes
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.buckets import Buckets
from edit_compile.distillation.data.cache import write
from edit_compile.distillation.data.cache.encode import ImageProducer, records_from
from edit_compile.distillation.data.cache.format import INDEX, UNFINISHED, read_index
from edit_compile.distillation.data.cache.write import write_cache
from edit_compile.distillation.data.captioned_images import EncodedImages
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.sources.cached import CachedDataset
from edit_compile.distillation.data.sources.images import ImageFolder
from edit_compile.progress import listening

SIZES = [(24, 24)] * 5 + [(20, 40)] * 4 + [(48, 24)] * 3
RESOLUTIONS = [(16, 16), (32, 32)]
BUCKETS = Buckets()


class PixArtTransformer2DModel(torch.nn.Module):
    """Stands for a model whose conditions need no pipeline."""


class Killed(BaseException):
    pass


@pytest.fixture
def folder(tmp_path):
    return data_files.folder_of(tmp_path / "images", SIZES)


class Shards:
    """A listener that is told in the first process how many samples are done, after each shard or one of each process."""

    def __init__(self, tell):
        self.tell, self.last = tell, None

    def began(self, work):
        if work.what.startswith("caching"):
            self.last = work.done

    def advanced(self, work):
        if not work.what.startswith("caching") or work.done == self.last:
            return
        self.last = work.done
        if write.process()[0] == 0:
            self.tell(work.done)

    def ended(self, work):
        pass

    def closed(self):
        pass


def make(images, cache, *, progress=lambda taken: None, made_from=None, samples=None, random_access=True):
    unreadable = {}
    dataset = ImageFolder(images, None, unreadable)
    producer = ImageProducer(lambda start: records_from(dataset, start), data_files.Letters(), BUCKETS, 2, dataset.fingerprint, unreadable)
    producer.random_access = random_access
    head = {"model": "PixArtTransformer2DModel", "made_from": made_from or {"data": "folder"}, "resolutions": RESOLUTIONS}
    with listening(Shards(progress)):
        return write_cache(cache, producer, head, shard_size=4, samples=samples)


def source(cache, **options):
    dataset = CachedDataset(cache, PixArtTransformer2DModel())
    return MapStyleSource(dataset, 0, skipped=dict(dataset.index.skipped), **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_processes(monkeypatch, count, act):
    """Run something in threads that take themselves for processes; returns what each gives."""
    rank, told, meeting = ContextVar("rank"), [None] * count, Barrier(count, timeout=60)

    def gathered(items):
        told[rank.get()] = items
        meeting.wait()
        found = [item for items in told for item in items]
        meeting.wait()
        return found

    def as_process(number):
        rank.set(number)
        try:
            return act()
        except BaseException:
            meeting.abort()
            raise

    for module in (processes, write):
        monkeypatch.setattr(module, "process", lambda: (rank.get(), count))
        monkeypatch.setattr(module, "gathered", gathered)
    with ThreadPoolExecutor(count) as threads:
        running = [threads.submit(copy_context().run, as_process, number) for number in range(count)]
    monkeypatch.undo()
    return [each.result() for each in running]


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_cache_gives_what_encoding_gives(folder, tmp_path, resolution, split):
    make(folder, tmp_path / "cache")
    cached = source(tmp_path / "cache", caption_dropout=0.3, held_out=3)
    direct = MapStyleSource(EncodedImages(ImageFolder(folder, None, {}), data_files.Letters(), BUCKETS), 0, 3, 0.3)
    for step in range(6):
        request = BatchRequest(4 * step if split == "train" else 0, 4, range(4), *resolution, split)
        found, expected = cached.batch(request), direct.batch(request)
        assert found.captions == expected.captions
        assert torch.equal(found.latents, expected.latents)
        mask = found.conditions["encoder_attention_mask"]
        length = mask.shape[1]
        assert torch.equal(mask, expected.conditions["encoder_attention_mask"][:, :length])
        assert not expected.conditions["encoder_attention_mask"][:, length:].any()
        assert torch.equal(
            found.conditions["encoder_hidden_states"] * mask[..., None],
            expected.conditions["encoder_hidden_states"][:, :length] * mask[..., None],
        )


def test_padding_is_trimmed(folder, tmp_path):
    make(folder, tmp_path / "cache")
    cached = source(tmp_path / "cache", caption_dropout=0)
    batch = cached.batch(BatchRequest(0, 4, range(4), 16, 16))
    assert batch.conditions["encoder_hidden_states"].shape[1] == max(map(len, batch.captions)) < data_files.Letters.length


def test_a_killed_encoding_resumes_and_ends_the_same(folder, tmp_path):
    expected = make(folder, tmp_path / "whole")

    def killed(taken):
        if taken == 8:
            raise Killed

    with pytest.raises(Killed):
        make(folder, tmp_path / "killed", progress=killed)
    with pytest.raises(ec.DistillError, match=r"is not a finished cache: it is unfinished: run the same"):
        read_index(tmp_path / "killed")
    with (tmp_path / "killed" / UNFINISHED).open("a") as file:
        file.write('{"file": "shard-0000')  # a line that the kill tore
    left = tmp_path / "killed" / ".shard-00002.safetensors.0123abcd.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))  # younger ones may be another process's
    written = []
    assert make(folder, tmp_path / "killed", progress=written.append) == expected
    assert written == [12]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("random_access", [True, False])
@pytest.mark.parametrize("samples", [None, 7, 8])
def test_several_processes_make_what_one_makes(folder, tmp_path, monkeypatch, count, random_access, samples):
    expected, written = make(folder, tmp_path / "one", samples=samples), []
    options = {"samples": samples, "random_access": random_access, "progress": written.append}
    assert in_processes(monkeypatch, count, lambda: make(folder, tmp_path / "many", **options)) == [expected] * count
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert written == sorted(set(written))


def test_one_process_continues_what_two_began_and_three_finish(folder, tmp_path, monkeypatch):
    expected = make(folder, tmp_path / "one")

    def killed(taken):
        raise Killed

    with pytest.raises((Killed, BrokenBarrierError)):
        in_processes(monkeypatch, 2, lambda: make(folder, tmp_path / "many", progress=killed))
    lines = (tmp_path / "many" / UNFINISHED).read_text().splitlines(keepends=True)
    (tmp_path / "many" / UNFINISHED).write_text("".join(lines[:2]))
    with pytest.raises(Killed):
        make(folder, tmp_path / "many", progress=killed)
    assert in_processes(monkeypatch, 3, lambda: make(folder, tmp_path / "many")) == [expected] * 3
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_shard_that_is_gone_is_made_again(folder, tmp_path):
    make(folder, tmp_path / "whole")

    def killed(taken):
        if taken == 8:
            raise Killed

    with pytest.raises(Killed):
        make(folder, tmp_path / "killed", progress=killed)
    (tmp_path / "killed" / "shard-00000.safetensors").write_bytes(b"short")
    make(folder, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_cache_is_left_alone(folder, tmp_path):
    make(folder, tmp_path / "cache")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    make(folder, tmp_path / "cache", progress=lambda taken: pytest.fail("it was made again"))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == before


def test_another_cache_is_not_overwritten(folder, tmp_path):
    make(folder, tmp_path / "cache")
    with pytest.raises(ec.DistillError, match=r"has another cache \(data differ\)"):
        make(folder, tmp_path / "cache", made_from={"data": "other"})


def test_a_foreign_folder_is_left_alone(folder, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "shard-00000.safetensors").write_text("mine")
    with pytest.raises(ec.DistillError, match=r"is not empty \(shard-00000.safetensors\): choose another folder"):
        make(folder, tmp_path / "cache")
    assert contents(tmp_path / "cache") == {"shard-00000.safetensors": b"mine"}


def test_a_limit_of_samples_holds_over_a_kill(folder, tmp_path):
    def killed(taken):
        raise Killed

    with pytest.raises(Killed):
        make(folder, tmp_path / "cache", samples=6, progress=killed)
    index = make(folder, tmp_path / "cache", samples=6)
    assert [len(shard.samples) for shard in index.shards] == [4, 2]


def test_what_cannot_be_read_is_named_in_the_cache(folder, tmp_path):
    (folder / "001.png").write_bytes(b"not an image")
    (folder / "002.txt").unlink()
    (folder / "metadata.jsonl").write_text("{")
    index = make(folder, tmp_path / "cache")
    assert sum(len(shard.samples) for shard in index.shards) == 10
    assert {os.path.basename(name) for name in index.skipped} == {"001.png", "002.png", "metadata.jsonl:1"}  # noqa: PTH119
    assert source(tmp_path / "cache").skipped == index.skipped


def test_nothing_readable_is_an_error_and_leaves_nothing(folder, tmp_path):
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(ec.DistillError, match=r"nothing could be read: .*there is no 000.txt"):
        make(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 255
    path.write_bytes(content)


def test_damaged_entries_are_replaced_and_named(folder, tmp_path):
    make(folder, tmp_path / "cache")
    flip(tmp_path / "cache" / "shard-00000.safetensors", -3)  # in the last tensor of one sample
    (tmp_path / "cache" / "shard-00001.safetensors").write_bytes(b"no tensors")
    data = source(tmp_path / "cache", held_out=1, caption_dropout=0)
    trained = {caption for step in range(30) for caption in data.batch(BatchRequest(4 * step, 4, range(4), 32, 32)).captions}
    damaged = data.dataset.damaged()
    assert len(damaged) == 5
    assert data.skipped.keys() <= damaged.keys()
    assert len(trained) in (6, 7)  # one of the other 8 is held out, and of the damaged one only some tensors are
    assert all("checksum" in reason or "cannot be read" in reason for reason in damaged.values())


def test_a_missing_shard_is_passed_over(folder, tmp_path):
    make(folder, tmp_path / "cache")
    (tmp_path / "cache" / "shard-00002.safetensors").unlink()
    data = source(tmp_path / "cache", held_out=1)
    for step in range(12):
        data.batch(BatchRequest(4 * step, 4, range(4), 16, 16))
    assert len(data.skipped) == 4


def test_a_full_disk_is_reported_and_the_rest_stays(folder, tmp_path, monkeypatch):
    import edit_compile.distillation.data.cache.write as caching

    original, calls = caching.write_tensors, []

    def full(path, tensors):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        original(path, tensors)

    monkeypatch.setattr(caching, "write_tensors", full)
    with pytest.raises(ec.DistillError, match=r"cannot be written: .*No space left on device; finished shards stay"):
        make(folder, tmp_path / "cache")
    assert make(folder, tmp_path / "cache") == make(folder, tmp_path / "cache")


def rewrite(cache, old, new):
    (cache / INDEX).write_text((cache / INDEX).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cache: (cache / INDEX).unlink(), "index.json is missing"),
        (lambda cache: (cache / INDEX).write_text("{"), "index.json cannot be read"),
        (lambda cache: (cache / INDEX).write_bytes(b"\xff"), "index.json cannot be read"),
        (lambda cache: (cache / INDEX).write_text("[" * 100_000), "index.json cannot be read"),
        (lambda cache: rewrite(cache, "16x16", "17x17"), r"000\.png lacks a caption or a resolution: the index is damaged"),
        (lambda cache: rewrite(cache, "shard-00000", "../shard-00000"), r"index.json: shards\.0\.file: String should match"),
        (lambda cache: (cache / INDEX).write_text('{"version": 9}'), "was made by version before 0.1.0 of edit_compile"),
        (lambda cache: (cache / INDEX).write_text('{"version": 3}'), "index.json: model: Field required"),
        (lambda cache: flip(cache / "empty.safetensors", -1), "empty.safetensors.* does not have the checksum"),
    ],
)
def test_a_cache_that_cannot_be_used_says_why(folder, tmp_path, change, message):
    make(folder, tmp_path / "cache")
    change(tmp_path / "cache")
    with pytest.raises(ec.DistillError, match=message):
        source(tmp_path / "cache")


def test_resolutions_and_models_must_be_those_of_the_cache(folder, tmp_path):
    make(folder, tmp_path / "cache")
    with pytest.raises(ec.DistillError, match="has no latents for 64x64 pixels, only for 16x16, 32x32"):
        source(tmp_path / "cache").batch(BatchRequest(0, 4, range(4), 64, 64))
    with pytest.raises(ec.DistillError, match="was made for a PixArtTransformer2DModel, but this model is a Linear"):
        CachedDataset(tmp_path / "cache", torch.nn.Linear(1, 1))
