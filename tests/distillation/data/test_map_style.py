"""Captioned images of a folder, through buckets and an encoder."""

from __future__ import annotations

import json

import pytest
import torch

import data_files
import edit_compile as ec
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.buckets import Buckets
from edit_compile.distillation.data.captioned_images import EncodedImages
from edit_compile.distillation.data.map_style import MapStyleSource
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


@pytest.mark.parametrize("sizes", [[], [(24, 24)]])
def test_too_few_images_are_refused(tmp_path, sizes):
    folder = data_files.folder_of(tmp_path / "few", sizes)
    with pytest.raises(ec.DistillError, match="has no images" if not sizes else "1 of 1 samples would be held out"):
        source(folder)


def test_no_folder_is_named(tmp_path):
    with pytest.raises(ec.DistillError, match=r"data.path: .*nowhere does not exist"):
        source(tmp_path / "nowhere")
