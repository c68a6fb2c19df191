"""Models that get the images of a batch one by one, and pad their sequences to one length: each call has one grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import edit_compile as ec
import toy

WIDTH, HEADS = 16, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OneByOne(nn.Module):
    """Every pixel of each image is a token, all in one batch; the tokens of captions behind them."""

    batch_first = True

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text, self.head = nn.Linear(4, WIDTH), nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.image, self.joint = Block(), Block()

    def together(self, samples: list[Tensor]) -> Tensor:
        padded = pad_sequence(samples, batch_first=self.batch_first)
        return padded if self.batch_first else padded.transpose(0, 1)

    def forward(self, images: list[Tensor], captions: list[Tensor]) -> list[Tensor]:
        pixels = [image.flatten(1).T for image in images]
        tokens = self.image(self.together([self.embed(each) for each in pixels]))
        lengths = [len(each) for each in pixels]
        joint = [torch.cat([tokens[i, :n], self.text(caption)]) for i, (n, caption) in enumerate(zip(lengths, captions, strict=True))]
        output = self.head(self.joint(self.together(joint)))
        return [output[i, :n].T.unflatten(1, image.shape[1:]) for i, (n, image) in enumerate(zip(lengths, images, strict=True))]


class TokensFirst(OneByOne):
    batch_first = False


def given(*sizes: tuple[int, int], words: tuple[int, ...] = (5, 5, 5)) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(4, height, width, generator=generator) for height, width in sizes]
    return {"images": images, "captions": [torch.randn(n, 6, generator=generator) for n in words[: len(sizes)]]}


@pytest.mark.parametrize(("kind", "count"), [(OneByOne, 1), (OneByOne, 2), (TokensFirst, 2)])
def test_images_of_one_size_are_converted(kind: type[OneByOne], count: int):
    torch.manual_seed(0)
    model = toy.shaken(kind().eval())
    student = ec.linearize(model, example_inputs=given(*[(6, 10)] * count))
    plan = ec.plan_of(student)
    assert {site.path: site.action for site in plan.sites} == {"image": "edit", "joint": "mm-edit"}
    assert plan.sites[0].grid_sizes == (6, 10)
    assert "Max" not in str(plan.sites[0].query_layout)
    for call in (given(*[(6, 10)] * count), given((8, 4)), given(*[(4, 8)] * 3)):
        with torch.no_grad():
            original, output = model(**call), student(**call)
            with ec.teacher(student):
                taught = student(**call)
        for a, b, c in zip(original, output, taught, strict=True):
            torch.testing.assert_close(c, a, atol=1e-5, rtol=0)
            assert b.shape == a.shape
            assert not torch.allclose(b, a, atol=1e-3)


@pytest.mark.slow
def test_a_call_with_images_of_several_sizes_is_refused():
    """As many tokens, other rows: nothing but the sizes of the inputs tells."""
    for count in (1, 2):
        student = ec.linearize(OneByOne().eval(), example_inputs=given(*[(6, 10)] * count))
        for sizes in ([(6, 10), (10, 6)], [(6, 10), (6, 10), (4, 10)]):
            with pytest.raises(ec.GridError, match=r"the images in images are of several sizes, 6 x 10 and (10 x 6|4 x 10)"):
                student(**given(*sizes))


@pytest.mark.slow
def test_images_of_several_sizes_in_the_example_are_kept():
    plan = ec.plan(OneByOne().eval(), example_inputs=given((6, 10), (4, 8)))
    reason = "aten.pad_sequence of samples of different lengths has no rule: where it puts image tokens is unknown"
    assert [(site.action, site.reason) for site in plan.sites] == [("keep", reason)] * 2


@pytest.mark.slow
def test_captions_of_several_lengths_behind_images_of_one_size():
    plan = ec.plan(OneByOne().eval(), example_inputs=given((6, 10), (6, 10), words=(5, 9)))
    assert [site.action for site in plan.sites] == ["edit", "mm-edit"]


class Apart(OneByOne):
    """Two images, arguments of their own."""

    def forward(self, a: Tensor, b: Tensor, captions: list[Tensor]) -> list[Tensor]:
        return super().forward([a, b], captions)


def test_images_that_are_arguments_of_their_own_have_one_size_too():
    def call(*sizes: tuple[int, int]) -> dict[str, object]:
        (a, b), captions = given(*sizes).values()
        return {"a": a, "b": b, "captions": captions}

    student = ec.linearize(Apart().eval(), example_inputs=call((6, 10), (6, 10)))
    student(**call((4, 8), (4, 8)))
    with pytest.raises(ec.GridError, match="the images in a, b are of several sizes"):
        student(**call((6, 10), (10, 6)))
