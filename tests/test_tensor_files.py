"""Tensors in pieces: what any number of processes wrote, any number reads."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from edit_compile.distillation.train.distributed import read_like
from edit_compile.tensor_files import Entry, Place, SavedTensors, entries_of, write_tensors

FULL = {
    "weight": torch.randn(5, 3),
    "bias": torch.randn(5).to(torch.bfloat16),
    "one": torch.randn(1, 2),  # fewer rows than processes
    "steps": torch.tensor(7.0),
    "table": torch.arange(9, dtype=torch.uint8),
}
SHARDED = ("weight", "bias", "one")


@pytest.fixture
def as_process():
    """Act as one process of several, without the others."""

    def begin(rank, count):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)

    yield begin
    torch.distributed.destroy_process_group()


def shards(rank, count, values, shape=None, placements=None):
    mesh = init_device_mesh("cpu", shape or (count,))
    parts = {}
    for name, value in values.items():
        pieces = list(value.chunk(mesh.size(-1))) if name in SHARDED else []
        own = rank % mesh.size(-1)
        local = pieces[own] if own < len(pieces) else value[:0] if name in SHARDED else value
        like = {"run_check": False, "shape": value.shape, "stride": value.stride()}
        parts[name] = DTensor.from_local(local.clone(), mesh, placements or (Shard(0),), **like) if name in SHARDED else value
    return parts


def written(folder, as_process, count, values, **options):
    folder.mkdir()
    for rank in range(count):
        as_process(rank, count)
        write_tensors(folder / f"{rank}", entries_of(shards(rank, count, values, **options), is_first=rank == 0))
    return SavedTensors(sorted(folder.iterdir()))


@pytest.mark.parametrize("counts", [(2, 1, 2), (3, 2, 4), (1, 3, 1)])
def test_what_some_processes_write_others_read_bit_for_bit(tmp_path, as_process, counts):
    values = FULL
    for turn, count in enumerate(counts):
        saved = written(tmp_path / str(turn), as_process, count, values)
        assert sorted(saved.names()) == sorted(FULL)
        for others in counts:
            for rank in range(others):
                as_process(rank, others)
                for name, like in shards(rank, others, {name: torch.zeros_like(value) for name, value in FULL.items()}).items():
                    expected = shards(rank, others, FULL)[name]
                    found = read_like(saved, name, like)
                    assert found.shape == expected.shape
                    local, own = (t.to_local() if isinstance(t, DTensor) else t for t in (found, expected))
                    assert local.dtype == own.dtype
                    assert torch.equal(local, own)
        values = {name: saved.read(name) for name in FULL}


def test_copies_of_a_shard_are_written_once(tmp_path, as_process):
    saved = written(tmp_path / "saved", as_process, 4, FULL, shape=(2, 2), placements=(Replicate(), Shard(0)))
    assert all(torch.equal(saved.read(name), value) for name, value in FULL.items())
    assert not any(name in load_file(tmp_path / "saved" / "2") for name in FULL)


def test_one_process_writes_an_ordinary_file(tmp_path):
    digest = write_tensors(tmp_path / "file", entries_of(FULL, is_first=True))
    found = load_file(tmp_path / "file")
    assert found.keys() == FULL.keys()
    assert all(torch.equal(found[name], value) for name, value in FULL.items())
    assert len(digest) == 64


@pytest.mark.parametrize(
    "places",
    [
        None,
        {"x": {"shape": [4], "offsets": [-1]}},
        {"x": {"shape": [2, 2], "offsets": [0, 0]}},
        {"x": {"shape": [4], "offsets": [3]}},
        {"x": [[8], [0]]},
        {"x": [[2**70], [0]]},
        [],
        {"x": [[4]]},
    ],
)
def test_pieces_that_are_no_whole_are_refused(tmp_path, places):
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"edit_compile.places": json.dumps(places)}}
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=r"x|places|valid"):
        SavedTensors([tmp_path / "file"])


def test_pieces_that_overlap_are_not_taken_for_a_whole(tmp_path):
    entry = Entry(torch.float32, (2,), lambda: torch.ones(2), Place((4,), (0,)))
    for name in ("a", "b"):
        write_tensors(tmp_path / name, {"x": entry})
    saved = SavedTensors([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="x is not whole"):
        saved.read("x", [2], [2])
