"""WebDataset shards read in place."""

from __future__ import annotations

import pytest

import data_files
import edit_compile as ec
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.captioned_images import EncodedImages
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.records import BadSample, image_of
from edit_compile.distillation.data.sources.webdataset import TarShards


def members(numbers, caption="txt"):
    for number in numbers:
        yield f"{number:03d}.png", data_files.png(number)
        text = f"image {number}"
        yield f"{number:03d}.{caption}", text.encode() if caption == "txt" else data_files.as_json(prompt=text, url="x")


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        data_files.tar_of(tmp_path / f"{shard:03d}.tar", members(range(4 * shard, 4 * shard + 4)))
    return tmp_path


@pytest.mark.parametrize("pattern", ["*.tar", "{000..002}.tar"])
def test_images_and_captions_of_all_shards(shards, pattern):
    dataset = TarShards(str(shards / pattern), None, {})
    assert [dataset.record(i).caption for i in range(len(dataset))] == [f"image {i}" for i in range(12)]
    assert all(image_of(dataset.record(i)).tobytes() == data_files.image(i).tobytes() for i in range(12))
    assert dataset.name(5) == f"{shards / '001.tar'}:005"


@pytest.mark.parametrize("caption", [None, "json", "json.prompt"])
def test_captions_in_json(tmp_path, caption):
    data_files.tar_of(tmp_path / "a.tar", members(range(2), "json"))
    assert TarShards(str(tmp_path / "a.tar"), caption, {}).record(1).caption == "image 1"


def test_members_of_one_name_in_two_folders_are_two_samples(tmp_path):
    data_files.tar_of(tmp_path / "a.tar", [(f"{folder}/{name}", content) for folder in "xy" for name, content in members([7])])
    assert [TarShards(str(tmp_path / "a.tar"), None, {}).name(i)[-5:] for i in range(2)] == ["x/007", "y/007"]


@pytest.mark.parametrize(
    ("content", "caption", "message"),
    [
        ([("1.png", data_files.png(1))], None, "it has no json, but png"),
        ([("1.png", data_files.png(1)), ("1.json", b"{")], None, "its json is not valid JSON"),
        ([("1.png", data_files.png(1)), ("1.json", b"[1]")], None, "it has no caption or text or prompt, but json"),
        ([("1.png", data_files.png(1)), ("1.json", b'{"caption": 3}')], None, "its caption is not text but 3"),
        ([("1.png", data_files.png(1)), ("1.txt", b"\xff")], None, "not UTF-8"),
        ([("1.png", data_files.png(1)), ("1.txt", b"a")], "cap", "it has no cap, but png, txt"),
    ],
)
def test_a_bad_caption_says_what_is_wrong(tmp_path, content, caption, message):
    data_files.tar_of(tmp_path / "a.tar", content)
    with pytest.raises(BadSample, match=message):
        TarShards(str(tmp_path / "a.tar"), caption, {}).record(0)


def test_damaged_shards_are_named_and_what_is_left_is_used(shards):
    whole = (shards / "001.tar").read_bytes()
    (shards / "001.tar").write_bytes(whole[: len(whole) // 2 - 5000])
    (shards / "002.tar").write_bytes(b"no tar at all" * 100)
    skipped = {}
    dataset = TarShards(str(shards / "*.tar"), None, skipped)
    data = MapStyleSource(EncodedImages(dataset, data_files.Letters(), None), 0, 1, skipped=skipped)
    trained = {caption for step in range(12) for caption in data.batch(BatchRequest(4 * step, 4, range(4), 16, 16)).captions}
    assert {f"image {i}" for i in (0, 1, 3)} <= trained
    assert "cannot be read" in data.skipped[str(shards / "002.tar")]
    assert any(name.startswith(str(shards / "001.tar")) for name in data.skipped)


def test_no_shards_and_no_images_are_errors(tmp_path):
    with pytest.raises(ec.DistillError, match=r"data.path: no files match .*nowhere-\{0..3\}.tar"):
        TarShards(str(tmp_path / "nowhere-{0..3}.tar"), None, {})
    data_files.tar_of(tmp_path / "a.tar", [("1.txt", b"x")])
    with pytest.raises(ec.DistillError, match="there are no images in"):
        TarShards(str(tmp_path / "a.tar"), None, {})
