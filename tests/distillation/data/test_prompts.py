"""Prompts alone: the teacher samples the images."""

from __future__ import annotations

import pytest
import torch

import data_files
import edit_compile as ec
import toy
import toy_distill
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.buckets import Buckets
from edit_compile.distillation.data.map_style import MapStyleSource
from edit_compile.distillation.data.sources.prompts import PromptDataset, PromptsData
from edit_compile.student.site import converted_sites


class Drawer:
    """Draws noise by the seeds, and notes what it was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, captions, shape, seeds):
        self.calls.append((list(captions), shape))
        size = (3, shape[0] // 2, shape[1] // 2)
        return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def source(path, model=None, draw=None, **options):
    data = PromptsData(kind="prompts", path=path, **options)
    dataset = PromptDataset(data, model or torch.nn.Identity(), data_files.Letters(), draw or Drawer(), 0)
    return MapStyleSource(dataset, 0, data.held_out, data.caption_dropout, concurrent=False)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["a cat", "", "  two dogs ", *(f"thing {i}" for i in range(6))]))
    return path


def test_a_sample_is_drawn_from_its_own_noise_wherever_it_comes(path):
    drawn = {}
    for size in (2, 3):
        data = source(path, held_out=1, caption_dropout=0)
        for step in range(20):
            batch = data.batch(BatchRequest(size * step, size, range(size), 16, 16))
            for caption, image in zip(batch.captions, batch.latents, strict=True):
                assert torch.equal(drawn.setdefault(caption, image), image)
    assert len(drawn) == 7
    assert len({float(image.mean()) for image in drawn.values()}) == 7


def test_several_samples_of_a_prompt_differ(path):
    data = source(path, samples_per_prompt=3, held_out=1, caption_dropout=0)
    images = [data.dataset.latents([index], (16, 16)) for index in (1, 9, 17)]
    assert [data.dataset.caption(index) for index in (1, 9, 17)] == ["two dogs"] * 3
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


def test_an_emptied_caption_keeps_the_image_of_its_prompt(path):
    draw = Drawer()
    batch = source(path, draw=draw, caption_dropout=1, held_out=1).batch(BatchRequest(0, 3, range(3), 16, 16))
    assert batch.captions == ("", "", "")
    assert "" not in draw.calls[0][0]


def test_shapes_are_drawn_from_the_buckets(path):
    draw = Drawer()
    data = source(path, draw=draw, buckets=Buckets(multiple=4), samples_per_prompt=10)
    for step in range(40):
        data.batch(BatchRequest(2 * step, 2, range(2), 16, 16))
    assert {shape for _, shape in draw.calls} == {(12, 20), (16, 16), (20, 12)}


def test_it_is_the_teacher_that_draws(path):
    student = toy_distill.student()
    toy.shaken(torch.nn.ModuleList(site.edit for site in converted_sites(student).values()))
    inputs = toy.inputs(2, 12, 16, toy_distill.TEXT)
    seen = []

    def draw(captions, shape, seeds):
        seen.append(student(**inputs))
        return torch.zeros(len(seeds), 3, 8, 8)

    source(path, student, draw).batch(BatchRequest(0, 2, range(2), 16, 16))
    with torch.no_grad(), ec.teacher(student):
        assert torch.equal(seen[0], student(**inputs))
    assert not torch.equal(seen[0], student(**inputs))
    assert not seen[0].requires_grad


def test_prompts_that_cannot_be_encoded_are_named(path):
    path.write_text(path.read_text() + "\na prompt that is much too long")
    data = source(path, held_out=1)
    for step in range(12):
        data.batch(BatchRequest(2 * step, 2, range(2), 16, 16))
    assert list(data.skipped) == ["prompt 'a prompt that is much too long', sample 0"]


@pytest.mark.parametrize(("content", "message"), [(b"\n \n", "has no prompts"), (b"\xff\xff", "cannot be read"), (None, "cannot be read")])
def test_a_file_without_prompts_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ec.DistillError, match=f"data.path: .*p.txt {message}"):
        source(tmp_path / "p.txt")
