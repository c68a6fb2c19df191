"""Captioned images of a folder, through buckets and an encoder."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

import data_files
import edit_compile as ec
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.buckets import Buckets
from edit_compile.distillation.data.captioned_images import EncodedImages
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.records import BadSample, write_skipped
from edit_compile.distillation.data.sources.images import ImageFolder

SIZES = [(24, 24)] * 8 + [(20, 40)] * 6 + [(48, 24)] * 6
SQUARE = BatchRequest(0, 4, range(4), 16, 16)


def source(path, buckets=None, **options):
    skipped = {}
    return MapStyleSource(EncodedImages(ImageFolder(path, None, skipped), data_files.Letters(), buckets), 0, skipped=skipped, **options)


def caption_numbers(batch):
    return [int(caption.removeprefix("image ")) for caption in batch.captions]


@pytest.fixture
def folder(tmp_path):
    return data_files.folder_of(tmp_path / "images", SIZES)


def test_images_and_captions_belong_together(folder):
    batch = source(folder).batch(SQUARE)
    assert batch.latents.shape == (4, 3, 8, 8)
    letters = batch.conditions["encoder_hidden_states"][:, :, 0]
    for row, number in enumerate(caption_numbers(batch)):
        colour = torch.tensor([37 * number % 200, 91 * number % 200, 53 * number % 200]) / 127.5 - 1
        assert (batch.latents[row].mean((1, 2)) - colour).abs().max() < 0.45
        assert "".join(chr(int(code)) for code in letters[row] if code) == f"image {number}"


def test_a_batch_is_of_one_bucket_whichever_process_asks(folder):
    buckets = Buckets(max_ratio=2, multiple=4)
    seen = set()
    for step in range(20):
        whole = source(folder, buckets).batch(BatchRequest(100 + 4 * step, 4, range(4), 16, 16))
        parts = [source(folder, buckets).batch(BatchRequest(100 + 4 * step, 4, rows, 16, 16)) for rows in (range(2), range(2, 4))]
        assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
        assert parts[0].captions + parts[1].captions == whole.captions
        seen.add(whole.latents.shape[2:])
    assert seen == {(8, 8), (6, 10), (10, 6)}


def test_an_answer_depends_on_the_request_alone(folder):
    first = source(folder, Buckets())
    requests = [BatchRequest(4 * step, 4, range(4), 16, 16) for step in range(8)]
    expected = [first.batch(request).latents for request in requests]
    for request, images in reversed(list(zip(requests, expected, strict=True))):
        assert torch.equal(source(folder, Buckets()).batch(request).latents, images)


def test_held_out_images_are_never_trained_on(folder):
    data = source(folder, Buckets(), held_out=5, caption_dropout=0)
    held_out = {n for i in range(0, 10, 2) for n in caption_numbers(data.batch(BatchRequest(0, 10, range(i, i + 2), 16, 16, "validation")))}
    trained = {n for step in range(40) for n in caption_numbers(data.batch(BatchRequest(4 * step, 4, range(4), 16, 16)))}
    assert len(held_out) == 5
    assert held_out | trained == set(range(20))
    assert not held_out & trained


def test_captions_are_emptied_by_position(folder):
    def empty(position):
        return [
            not caption for caption in source(folder, caption_dropout=0.3).batch(BatchRequest(position, 200, range(200), 16, 16)).captions
        ]

    assert 30 < sum(empty(0)) < 90
    assert empty(0) != empty(200)
    assert empty(0) == empty(0)
    request = BatchRequest(0, 3, range(3), 16, 16, "validation")
    own, emptied = (source(folder).batch(replace(request, empty_captions=empty)) for empty in (False, True))
    assert torch.equal(own.latents, emptied.latents)
    assert all(own.captions)
    assert emptied.captions == ("", "", "")


def test_what_cannot_be_read_is_replaced_and_named(folder):
    (folder / "003.png").write_bytes(data_files.png(3)[:60])  # the header is whole, the image is not
    (folder / "004.png").write_bytes(b"not an image")
    (folder / "005.txt").unlink()
    (folder / "006.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "007.txt").write_text("a caption that is too long for this encoder")
    (folder / "008.txt").write_text(" ")
    data = source(folder, Buckets(multiple=4), held_out=1, caption_dropout=0)
    trained = {n for step in range(40) for n in caption_numbers(data.batch(BatchRequest(4 * step, 4, range(4), 16, 16)))}
    assert trained == set(range(20)) - {3, 4, 5, 6, 7, 8, 10}
    reasons = {name[-7:-4]: reason for name, reason in data.skipped.items()}
    assert reasons.keys() == {"003", "004", "005", "006", "007", "008"}
    assert "truncated" in reasons["003"]
    assert "cannot identify image" in reasons["004"]
    assert "there is no 005.txt" in reasons["005"]
    assert "not UTF-8" in reasons["006"]
    assert "too long" in reasons["007"]
    assert "empty" in reasons["008"]


def test_a_bucket_of_which_nothing_is_left_is_passed_over(folder):
    for number in range(8):
        (folder / f"{number:03d}.png").write_bytes(data_files.png(number)[:60])
    data = source(folder, Buckets(multiple=4), held_out=1, caption_dropout=0)
    shapes = {data.batch(BatchRequest(4 * step, 4, range(4), 16, 16)).latents.shape[2:] for step in range(20)}
    assert shapes == {(6, 10), (10, 6)}


def test_nothing_to_read_says_why(folder):
    for file in folder.glob("*.png"):
        file.write_bytes(b"not an image")
    with pytest.raises(ec.DistillError, match=r"none of the 20 samples could be read: .*png: its image cannot be read: cannot identify"):
        source(folder).batch(SQUARE)


def test_captions_from_metadata(tmp_path):
    folder = data_files.folder_of(tmp_path, SIZES[:4], captions=False)
    lines = [json.dumps({"file_name": f"00{i}.png", "text": f"image {i}"}) for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"file_name": "gone.png", "text": "x"})]))
    data = source(folder, held_out=1, caption_dropout=0)
    trained = {n for step in range(10) for n in caption_numbers(data.batch(BatchRequest(4 * step, 4, range(4), 16, 16)))}
    assert trained < {0, 1, 2}
    assert str(folder / "metadata.jsonl:4") in data.skipped
    assert "No such file" in data.skipped[str(folder / "gone.png")]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_captions_from_tables(tmp_path, ending):
    folder = data_files.folder_of(tmp_path, SIZES[:4], captions=False)
    rows = [{"file_name": f"00{i}.png", "text": f"image {i}", "score": "1"} for i in range(3)]
    if ending == "csv":
        lines = ["file_name,text,score", *(f'{row["file_name"]},"{row["text"]}",1' for row in rows), ",nothing,"]
        (folder / "metadata.csv").write_text("\n".join(lines))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {"file_name": None, "text": "x"}]), folder / "metadata.parquet")
    skipped = {}
    found = ImageFolder(folder, None, skipped)
    assert [found.record(number).captions for number in range(3)] == [(f"image {i}",) for i in range(3)]
    assert len(found) == 4
    assert list(skipped) == [f"{folder}/metadata.{ending}:{5 if ending == 'csv' else 4}"]
    before = found.fingerprint()
    (folder / f"metadata.{ending}").write_bytes(b"\xff")
    skipped = {}
    assert ImageFolder(folder, None, skipped).fingerprint() != before
    assert skipped[f"{folder}/metadata.{ending}"].startswith("it cannot be read: ")


@pytest.mark.parametrize("sizes", [[], [(24, 24)]])
def test_too_few_images_are_refused(tmp_path, sizes):
    folder = data_files.folder_of(tmp_path / "few", sizes)
    with pytest.raises(ec.DistillError, match="has no images" if not sizes else "1 of 1 samples would be held out"):
        source(folder)


def test_no_folder_is_named(tmp_path):
    with pytest.raises(ec.DistillError, match=r"data.path: .*nowhere does not exist"):
        source(tmp_path / "nowhere")


def test_hidden_files_links_and_other_kinds_are_left_out_and_named(tmp_path):
    folder = data_files.folder_of(tmp_path / "images", SIZES[:4])
    data_files.folder_of(folder / ".ipynb_checkpoints", SIZES[:2])
    data_files.folder_of(folder / "deep" / "deeper", SIZES[:1])
    (folder / ".hidden.png").write_bytes(data_files.png(1))
    (folder / "photo.heic").write_bytes(b"whatever")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    (folder / "README.md").write_text("not an image")
    skipped = {}
    dataset = ImageFolder(folder, None, skipped)
    names = [str(file.relative_to(folder)) for file in dataset.files]
    assert names == ["000.png", "001.png", "002.png", "003.png", "deep/deeper/000.png"]
    assert {name.removeprefix(f"{folder}/"): reason for name, reason in skipped.items()} == {
        ".ipynb_checkpoints": "it is hidden; 2 images in it",
        ".hidden.png": "it is hidden",
        "photo.heic": "images of kind .heic are not read: save it as another kind",
        "gone.png": "it is a link to nowhere",
        "linked": "it is a link to a folder, which is not followed",
        "pipe.png": "it is not a regular file",
    }


def test_each_draw_of_an_image_has_one_of_its_captions(tmp_path):
    folder = data_files.folder_of(tmp_path, SIZES[:4], captions=False)
    lines = [{"file_name": f"00{i}.png", "text": [f"image {i}", f"image {i + 10}"]} for i in range(3)]
    lines += [{"file_name": "./003.png", "text": f"image {i}"} for i in (3, 13, 23)]  # three lines of one image
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = source(folder, held_out=1, caption_dropout=0)
    assert data.dataset.name(len(data.dataset) - 1) == str(folder / "003.png")
    seen = [n for step in range(40) for n in caption_numbers(data.batch(BatchRequest(4 * step, 4, range(4), 16, 16)))]
    (held_out,) = set(range(4)) - {n % 10 for n in seen}
    counts = {n: seen.count(n) for n in set(seen)}
    assert set(counts) == {n for n in (0, 10, 1, 11, 2, 12, 3, 13, 23) if n % 10 != held_out}
    assert max(counts.values()) < 4 * min(counts.values())
    validated = data.batch(BatchRequest(0, 4, range(4), 16, 16, "validation")).captions
    assert validated == (f"image {held_out}",) * 4


@pytest.mark.parametrize("line", ["[" * 100_000, '{"file_name": 3}', '{"file_name": null, "text": "x"}', "[1]", "3", '{"text": "x"}'])
def test_lines_of_metadata_that_say_nothing_are_named(tmp_path, line):
    folder = data_files.folder_of(tmp_path, SIZES[:2])
    (folder / "metadata.jsonl").write_text(f"\n{line}\n")
    skipped = {}
    assert len(ImageFolder(folder, None, skipped)) == 2
    assert list(skipped) == [f"{folder}/metadata.jsonl:2"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": "half of an emoji \ud83d"}, r"its text is not text: .*surrogates not allowed"),
        ({"text": "x" * 2**20 + "y"}, r"its text has 1,048,577 bytes, more than 1,048,576"),
        ({"text": ["fine", "\ud83d"]}, "its text is not text"),
        ({f"{number}\ud83d": 1 for number in range(99)}, r"it has no caption or text or prompt, but file_name, 0\\ud83d, .* and 92 more"),
    ],
)
def test_captions_that_no_tokenizer_takes_are_named(tmp_path, fields, reason):
    folder = data_files.folder_of(tmp_path, SIZES[:1], captions=False)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "000.png"} | fields))
    with pytest.raises(BadSample, match=reason) as error:
        ImageFolder(folder, None, {}).record(0)
    write_skipped(tmp_path, {"000.png": str(error.value)})
    assert json.loads((tmp_path / "unreadable.json").read_text())


@pytest.mark.parametrize("name", ["\ud83d.png", "a" * 5000 + ".png", "a\0b.png", "x/" * 2000 + "y.png", None])
def test_metadata_that_names_what_no_file_can_be_called(tmp_path, name):
    folder = data_files.folder_of(tmp_path / "images", SIZES[:3])
    longest = "x/" * ((4088 - len(str(folder))) // 2) + "y.png"  # beside it, metadata would have too long a name
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": longest if name is None else name, "text": "x"}))
    data = source(folder, held_out=1)
    assert data.fingerprint()
    data.batch(SQUARE)
    assert len(data.skipped) == 1
    write_skipped(tmp_path, data.skipped)


def test_captions_and_metadata_without_end_are_not_read_whole(tmp_path):
    folder = data_files.folder_of(tmp_path, SIZES[:3])
    for name in ("000.txt", "metadata.jsonl"):
        (folder / name).write_text("x")
        os.truncate(folder / name, 2**28)
    skipped = {}
    tracemalloc.start()
    dataset = ImageFolder(folder, None, skipped)
    with pytest.raises(BadSample, match=r"its caption has 1,048,577 bytes or more"):
        dataset.record(0)
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()
    assert dataset.record(1).captions == ("image 1",)
    assert f"{folder}/metadata.jsonl:1" in skipped


def test_a_caption_that_vanishes_is_a_sample_less(tmp_path, monkeypatch):
    folder = data_files.folder_of(tmp_path, SIZES[:2])
    dataset = ImageFolder(folder, None, {})
    (folder / "000.txt").unlink()
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    with pytest.raises(BadSample, match=r"its caption cannot be read: .*No such file"):
        dataset.record(0)


def test_metadata_that_names_a_device_is_not_read(tmp_path):
    folder = data_files.folder_of(tmp_path, SIZES[:3])
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "/dev/zero", "text": "zeros"}))
    data = source(folder, held_out=1)
    data.batch(SQUARE)
    assert data.skipped["/dev/zero"] == "it is not a regular file"


def test_names_that_are_no_utf8_are_printable(tmp_path):
    folder = data_files.folder_of(tmp_path / "images", SIZES[:3])
    (folder / os.fsdecode(b"\xff.png")).write_bytes(data_files.png(1))
    dataset = ImageFolder(folder, None, {})
    assert dataset.name(3) == f"{folder}/\\xff.png"
    assert dataset.fingerprint()


def test_a_summary_counts_everything(folder):
    (folder / "004.png").write_bytes(b"not an image")
    data = source(folder, Buckets(multiple=4), held_out=5)
    found = data.summary(16, 16)
    assert (found.found, found.held_out, found.skipped) == (20, 5, 1)
    assert sum(found.shapes.values()) == 14
    assert str(found).startswith("data: 20 found, 14 to train on (12 x 20: ")


def test_a_fingerprint_changes_with_names_and_sizes_alone(folder, tmp_path):
    def now():
        return ImageFolder(folder, None, {}).fingerprint()

    before = now()
    os.utime(folder / "003.png")
    assert now() == before
    (folder / "003.txt").write_text("image 33")
    added = now()
    assert added != before
    (folder / "003.txt").write_text("image 3")
    assert now() == before
    (folder / "020.png").write_bytes(data_files.png(20))
    assert now() not in (before, added)
    (folder / "020.png").unlink()
    assert now() == before
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert ImageFolder(moved, None, {}).fingerprint() == before


def test_what_was_held_out_stays_so_when_images_are_added(folder):
    before = source(folder, held_out=5)
    names = before.held_out_names()
    for number in range(20, 30):
        (folder / f"a{number}.png").write_bytes(data_files.png(number))
        (folder / f"a{number}.txt").write_text(f"image {number}")
    data = source(folder, held_out=5, caption_dropout=0)
    data.hold_out(names)
    trained = {n for step in range(60) for n in caption_numbers(data.batch(BatchRequest(4 * step, 4, range(4), 16, 16)))}
    assert trained == set(range(30)) - {int(name[-7:-4]) for name in names}
    with pytest.raises(ec.DistillError, match="0 of 30 samples are those that were held out"):
        data.hold_out(["gone"])
