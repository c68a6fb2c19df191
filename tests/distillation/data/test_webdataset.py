"""WebDataset shards read in place."""

from __future__ import annotations

import io
import os
import tarfile
import time
import tracemalloc

import pytest

import data_files
import edit_compile as ec
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.captioned_images import EncodedImages
from edit_compile.distillation.data.decode_image import image_of
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.records import BadSample
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
    assert [dataset.record(i).captions[0] for i in range(len(dataset))] == [f"image {i}" for i in range(12)]
    assert all(image_of(dataset.record(i)).tobytes() == data_files.image(i).tobytes() for i in range(12))
    assert dataset.name(5) == f"{shards / '001.tar'}:005"


def test_brackets_in_a_path_are_its_own(tmp_path):
    (tmp_path / "[ab]").mkdir()
    for shard in range(2):
        data_files.tar_of(tmp_path / "[ab]" / f"{shard}.tar", members(range(2)))
    assert [len(TarShards(str(tmp_path / "[ab]" / name), None, {})) for name in ("0.tar", "{0..1}.tar")] == [2, 4]


@pytest.mark.parametrize("caption", [None, "json", "json.prompt"])
def test_captions_in_json(tmp_path, caption):
    data_files.tar_of(tmp_path / "a.tar", members(range(2), "json"))
    assert TarShards(str(tmp_path / "a.tar"), caption, {}).record(1).captions == ("image 1",)


def test_members_of_one_name_in_two_folders_are_two_samples(tmp_path):
    data_files.tar_of(tmp_path / "a.tar", [(f"{folder}/{name}", content) for folder in "xy" for name, content in members([7])])
    assert [TarShards(str(tmp_path / "a.tar"), None, {}).name(i)[-5:] for i in range(2)] == ["x/007", "y/007"]


@pytest.mark.parametrize(
    ("content", "caption", "message"),
    [
        ([("1.png", data_files.png(1))], None, "it has no json, but png"),
        ([("1.png", data_files.png(1)), ("1.json", b"{")], None, "its JSON is not valid"),
        ([("1.png", data_files.png(1)), ("1.json", b"[1]")], None, r"its JSON is not an object but \[1\]"),
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


def captions_of(path):
    skipped = {}
    dataset = TarShards(str(path), None, skipped)
    return {dataset.samples[i].key: dataset.record(i).captions[0] for i in range(len(dataset))}, skipped


def test_names_with_dots_are_samples_of_their_own_or_parts(tmp_path):
    files = [("v1.0/photo.final.png", data_files.png(1)), ("v1.0/photo.final.txt", b"image 1")]
    files += [("2.png", data_files.png(2)), ("2.depth.png", data_files.png(3)), ("2.txt", b"image 2")]
    files += [("4.rgb.png", data_files.png(4)), ("4.txt", b"image 4")]
    found, skipped = captions_of(data_files.tar_of(tmp_path / "a.tar", files))
    assert found == {"v1.0/photo.final": "image 1", "2": "image 2"}
    assert skipped == {f"{tmp_path}/a.tar:4": "it has rgb.png, txt, but no image of a kind that is read"}


def test_links_within_a_shard_are_what_they_lead_to(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in [
            ("pool/x.png", None, data_files.png(1)),
            ("a/1.png", tarfile.SYMTYPE, "../pool/x.png"),
            ("a/1.txt", None, b"image 1"),
            ("a/2.png", tarfile.LNKTYPE, "pool/x.png"),
            ("a/2.txt", None, b"image 2"),
            ("a/3.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("a/3.txt", None, b"image 3"),
            ("a/._4.png", None, b"resource fork"),
            ("a/5.png", tarfile.CHRTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            if kind is None:
                info.size = len(target)
                tar.addfile(info, io.BytesIO(target))
            else:
                info.type, info.linkname = kind, target
                tar.addfile(info)
    skipped = {}
    dataset = TarShards(str(tmp_path / "a.tar"), None, skipped)
    assert [sample.key for sample in dataset.samples] == ["pool/x", "a/1", "a/2"]
    assert [dataset.record(i).captions for i in (1, 2)] == [("image 1",), ("image 2",)]
    assert image_of(dataset.record(1)).tobytes() == data_files.image(1).tobytes()
    reasons = {name.removeprefix(f"{tmp_path}/a.tar:"): reason for name, reason in skipped.items()}
    assert reasons == {
        "a/3.png": "it is a link to /etc/passwd, which is no file of the shard",
        "a/3": "it has txt, but no image of a kind that is read",
        "a/._4.png": "it is hidden, or not a regular file",
        "a/5.png": "it is hidden, or not a regular file",
    }


@pytest.mark.parametrize("size", [10**9, 10**15, 8**11 - 1])
def test_a_member_that_claims_more_than_there_is_costs_itself_alone(tmp_path, size):
    header = tarfile.TarInfo("99.png")
    header.size = size
    whole = data_files.tar_of(tmp_path / "a.tar", [*members(range(3)), ("99.txt", b"image 99")]).read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    (tmp_path / "a.tar").write_bytes(whole + header.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    skipped = {}
    dataset = TarShards(str(tmp_path / "a.tar"), None, skipped)
    assert [dataset.record(i).captions[0] for i in range(3)] == ["image 0", "image 1", "image 2"]
    with pytest.raises(BadSample, match=r"its png (is cut off|has [\d,]+ bytes, more than)"):
        dataset.record(3)


def header(name, kind=None, size=0, fill=b""):
    info = tarfile.TarInfo(name)
    info.size = abs(size)
    info.type = kind or info.type
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:  # as a number in base 256
        raw[124:136] = size.to_bytes(12, "big", signed=True)
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw) + fill


@pytest.mark.parametrize(
    "damage",
    [
        header("x.png", size=-512),
        header("x", tarfile.XHDTYPE, -1024),
        header("x", tarfile.GNUTYPE_LONGNAME, 2**33),
        header("x", tarfile.XHDTYPE, 2**33),
        header("x", tarfile.XHDTYPE, 13, b"13 path=a.png\n".ljust(512, b"\0")) * 1100,
        header("x", tarfile.GNUTYPE_SPARSE, 512),
        header("x", tarfile.XHDTYPE, 30, b"30 GNU.sparse.map=1,2,three,4\n".ljust(512, b"\0")) + header("x.png"),
        header("x", tarfile.XHDTYPE, 8, b"99999999".ljust(512, b"\0")),
    ],
    ids=["back", "header back", "long name", "long header", "headers of headers", "cut sparse", "sparse", "length"],
)
def test_headers_that_are_none_end_their_shard_soon(tmp_path, damage):
    whole = data_files.tar_of(tmp_path / "a.tar", members(range(3))).read_bytes().rstrip(b"\0")
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(whole + bytes(-len(whole) % 512) + damage)
        file.truncate(2**34)  # sparse: what is claimed is there
    skipped = {}
    before = time.process_time()
    tracemalloc.start()
    dataset = TarShards(str(tmp_path / "a.tar"), None, skipped)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert time.process_time() - before < 10
    assert [dataset.record(i).captions[0] for i in range(3)] == ["image 0", "image 1", "image 2"]
    for index in range(3, len(dataset)):
        with pytest.raises(BadSample):
            dataset.record(index)


@pytest.mark.parametrize("pattern", ["{0..999999999}.tar", "{000..999}/{000..999}.tar", "{0..99999999999999999999}.tar"])
def test_ranges_that_stand_for_too_much_are_refused(tmp_path, pattern):
    with pytest.raises(ec.DistillError, match=r"stands for more than 100,000 files|no files match"):
        TarShards(str(tmp_path / pattern), None, {})


def test_captions_of_a_shard_are_small(tmp_path):
    data_files.tar_of(tmp_path / "a.tar", [("1.png", data_files.png(1)), ("1.json", b'{"caption": "' + b"x" * 2**24 + b'"}')])
    with pytest.raises(BadSample, match=r"its json has 16,777,231 bytes, more than 16,777,216"):
        TarShards(str(tmp_path / "a.tar"), None, {}).record(0)


def test_shards_that_are_no_files_are_named(tmp_path):
    data_files.tar_of(tmp_path / "a.tar", members(range(2)))
    os.mkfifo(tmp_path / "b.tar")
    (tmp_path / "c.tar").mkdir()
    skipped = {}
    assert len(TarShards(str(tmp_path / "*.tar"), None, skipped)) == 2
    assert skipped == {str(tmp_path / f"{name}.tar"): "it cannot be read: it is not a regular file" for name in "bc"}


def test_names_that_are_no_utf8_are_printable(tmp_path):
    data_files.tar_of(tmp_path / "a.tar", [(os.fsdecode(b"\xff.png"), data_files.png(1)), (os.fsdecode(b"\xff.txt"), b"image 1")])
    skipped = {}
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo(os.fsdecode(b"b.\xfe")))
    dataset = TarShards(str(tmp_path / "a.tar"), None, skipped)
    assert dataset.name(0) == f"{tmp_path}/a.tar:\\xff"
    assert dataset.fingerprint()
    assert skipped == {f"{tmp_path}/a.tar:b": "it has \\xfe, but no image of a kind that is read"}
