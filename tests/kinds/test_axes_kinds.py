"""Models that move, split and join their axes in every way: image tokens are followed, or what loses them is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit_compile as ec
from edit_compile.ir.tokens import TokenKind

WIDTH, HEADS = 16, 2
OPERATORS = {
    "movedim": lambda t: t.movedim(2, 1).movedim(1, 2),
    "swapaxes": lambda t: t.swapaxes(1, 2).swapdims(1, 2),
    "mT": lambda t: t.mT.mT,
    "adjoint": lambda t: t.adjoint().mH,
    "einsum with an ellipsis": lambda t: torch.einsum("...d,d->...d", t, torch.ones(t.shape[-1], device=t.device, dtype=t.dtype)),
    "einsum of two letters": lambda t: torch.einsum("bhnd->bnhd", t).permute(0, 2, 1, 3),
    "narrow channels": lambda t: torch.cat([t.narrow(-1, 0, 4), t.narrow(-1, 4, 4)], -1),
    "tensor_split": lambda t: torch.hstack([each * 0.5 for each in t.tensor_split(2, 1)]),
    "unbind and stack": lambda t: torch.stack([each * 0.7 for each in t.unbind(1)], 1),
    "repeat": lambda t: t.repeat(1, 2, 1, 1)[:, : t.shape[1]],
    "tensordot": lambda t: torch.tensordot(t, torch.eye(t.shape[-1], device=t.device, dtype=t.dtype), dims=1),
    "sorted channels": lambda t: t.sort(-1).values,
    "view_as": lambda t: t.reshape(t.shape[0], -1).view_as(t),
    "in place": lambda t: (t * 1.0).mul_(0.5),
}


class Block(nn.Module):
    def __init__(self, change=None) -> None:
        super().__init__()
        self.qkv, self.out, self.change = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), change or (lambda t: t)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(self.change(q), self.change(k), v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Patches of 2 x 2, blocks, and back."""

    def __init__(self, *blocks: nn.Module, convolution: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.patch = convolution(4, WIDTH, *[(2, 2) if convolution is nn.Conv2d else (1, 2, 2)] * 2)
        self.blocks, self.text = nn.ModuleList(blocks or [Block()]), nn.Linear(8, WIDTH)

    def tokens(self, y: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(y)
        return y

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x)
        return self.tokens(y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, y.shape[2:])


class WithText(Model):
    def joined(self, y: Tensor, text: Tensor) -> Tensor:
        return torch.cat([text, y], 1)

    def cut(self, joint: Tensor, count: int) -> Tensor:
        return joint.narrow(1, count, joint.shape[1] - count)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y, words = self.patch(x), self.text(text)
        joint = self.tokens(self.joined(y.flatten(2).transpose(1, 2), words))
        return self.cut(joint, text.shape[1]).transpose(1, 2).unflatten(2, y.shape[2:])


def images(batch: int = 2, height: int = 12, width: int = 20) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 4, height, width)}


def with_text(batch: int = 2, height: int = 12, width: int = 20, words: int = 7) -> dict[str, Tensor]:
    return {**images(batch, height, width), "text": torch.randn(batch, words, 8)}


def converted(model: nn.Module, example: dict[str, Tensor], second: dict[str, Tensor]) -> ec.Plan:
    """Convert; at both sizes the student runs and differs, and the teacher inside equals the original."""
    model.eval()
    student = ec.linearize(model, example_inputs=example)
    for given in (example, second):
        with torch.no_grad():
            original, output = model(**given), student(**given)
            assert output.shape == original.shape
            assert output.isfinite().all()
            with ec.teacher(student):
                assert (student(**given) - original).abs().max() < 1e-5
            assert not torch.allclose(output, original)
    return ec.plan_of(student)


def actions(plan: ec.Plan) -> list[str]:
    return [site.action for site in plan.sites]


# ------------------------------------------------------------------ operators that move axes


def test_queries_and_keys_behind_operators_that_move_axes():
    plan = converted(Model(*map(Block, OPERATORS.values())), images(), images(1, 16, 10))
    assert dict(zip(OPERATORS, actions(plan), strict=True)) == dict.fromkeys(OPERATORS, "edit")


def test_a_table_is_the_left_factor():
    class Tabled(Model):
        def tokens(self, y: Tensor) -> Tensor:
            return super().tokens(self.table * y)

        def forward(self, x: Tensor) -> Tensor:
            rows, columns = (torch.arange(n // 2, device=x.device, dtype=x.dtype) for n in x.shape[2:])
            self.table = (1 + torch.outer(rows + 1, columns + 1).cos()).flatten()[:, None]
            return super().forward(x)

    plan = converted(Tabled(), images(), images(1, 16, 10))
    assert actions(plan) == ["edit"]


def test_a_joint_sequence_that_is_written_into_a_buffer():
    class Buffered(WithText):
        def joined(self, y: Tensor, text: Tensor) -> Tensor:
            joint = y.new_zeros(y.shape[0], text.shape[1] + y.shape[1], y.shape[2])
            joint[:, : text.shape[1]] = text
            joint[:, text.shape[1] :] = y
            return joint

    plan = ec.plan(Buffered().eval(), example_inputs=with_text())
    assert actions(plan) == ["mm-edit"]
    assert plan.sites[0].query_layout.kinds == (TokenKind.TEXT, TokenKind.IMAGE)


def test_a_joint_sequence_is_narrowed():
    plan = converted(WithText(), with_text(), with_text(1, 16, 10, 11))
    assert actions(plan) == ["mm-edit"]


# ------------------------------------------------------------------ what has no rule


@torch.library.custom_op("axes_kinds::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return x.flip(1)


@turned.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_of_another_library_is_named():
    plan = ec.plan(Model(Block(lambda t: turned(t)), Block()).eval(), example_inputs=images())
    first, second = plan.sites
    assert "axes_kinds.turned has no rule" in first.reason
    assert "no image tokens" not in second.reason
    assert second.action == "edit"


@pytest.mark.parametrize("alone", [False, True], ids=["joint", "image alone"])
def test_an_unknown_operator_beside_a_residual_connection_of_a_joint_sequence(alone):
    """Added to the joint sequence, positions stay what they were; what it makes of text and image may turn the image's into anything."""

    class Added(WithText):
        def joined(self, y: Tensor, text: Tensor) -> Tensor:
            joint = super().joined(y, text)
            return super().joined(y + turned(joint)[:, text.shape[1] :], text) if alone else joint + turned(joint)

    (site,) = ec.plan(Added().eval(), example_inputs=with_text()).sites
    assert site.action == ("keep" if alone else "mm-edit")
    assert ("axes_kinds.turned has no rule" in site.reason) is alone


class Experts(nn.Module):
    """Every expert takes the tokens that it likes best; what it makes of them is added to what a shared one makes of all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.shared = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        chosen = self.gate(x).transpose(1, 2).topk(count // 2, -1).indices
        places = (chosen + count * torch.arange(batch, device=x.device)[:, None, None]).transpose(0, 1).flatten()
        counts = torch.full((2,), batch * (count // 2), device=x.device).tolist()
        parts = x.flatten(0, 1)[places][: sum(counts)].split(counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return x + self.shared(x).flatten(0, 1).index_add(0, places, outputs).view_as(x)


def test_tokens_that_go_to_experts():
    plan = converted(Model(Experts(), Block()), images(), images(1, 16, 10))
    assert actions(plan) == ["edit"]
    assert plan.sites[0].grid_sizes == (6, 10)


def test_behind_an_operator_of_another_library_image_tokens_may_be_anywhere():
    class Before(Model):
        def tokens(self, y: Tensor) -> Tensor:
            return super().tokens(turned(y))

    plan = ec.plan(Before().eval(), example_inputs=images())
    assert [site.reason for site in plan.sites] == ["axes_kinds.turned has no rule: where it puts image tokens is unknown"]


def test_what_text_comes_through_does_not_matter_to_the_image():
    class Texted(WithText):
        def joined(self, y: Tensor, text: Tensor) -> Tensor:
            return super().joined(y, turned(text))

    assert actions(ec.plan(Texted().eval(), example_inputs=with_text())) == ["mm-edit"]


# ------------------------------------------------------------------ what is no image


class Prior(nn.Module):
    """Denoises one embedding beside a text."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual, self.block = residual, Block()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y = self.block(torch.cat([text, x[:, None]], 1))[:, -1]
        return x + y if self.residual else y


@pytest.mark.parametrize("residual", [False, True])
def test_one_embedding_is_no_image(residual):
    plan = ec.plan(Prior(residual).eval(), example_inputs={"x": torch.randn(2, WIDTH), "text": torch.randn(2, 7, WIDTH)})
    assert [(site.action, site.reason) for site in plan.sites] == [("keep", "no image tokens take part")]


# ------------------------------------------------------------------ equal numbers


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 16)], ids=["as channels", "3 times"])
def test_as_many_tokens_as_channels(height, width):
    """16 channels, 8 in a head, 48 in all three projections."""
    plan = converted(Model(), images(2, height, width), images(1, 16, 10))
    assert actions(plan) == ["edit"]
    plan = converted(WithText(), with_text(2, height, width), with_text(1, 16, 10, 11))
    assert actions(plan) == ["mm-edit"]


# ------------------------------------------------------------------ videos


class Cut(Model):
    """Treats parts of a video's tokens apart."""

    def __init__(self, *starts: int) -> None:
        super().__init__(convolution=nn.Conv3d)
        self.starts = starts

    def tokens(self, y: Tensor) -> Tensor:
        ends = [start * self.frame for start in self.starts]
        parts = [y[:, a:b] for a, b in zip([0, *ends], [*ends, y.shape[1]], strict=True)]
        return super().tokens(torch.cat([part * (1 + i) for i, part in enumerate(parts)], 1))

    def forward(self, x: Tensor) -> Tensor:
        self.frame = (x.shape[3] // 2) * (x.shape[4] // 2)
        return super().forward(x)


def video(batch: int = 2, frames: int = 4, height: int = 12, width: int = 20) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 4, frames, height, width)}


@pytest.mark.parametrize("starts", [(1,), (1, 2)], ids=["first frame", "each of two"])
def test_a_video_cut_in_time_and_joined_again_is_a_video(starts):
    plan = ec.plan(Cut(*starts).eval(), example_inputs=video())
    assert [site.grid_sizes for site in plan.sites] == [(4, 6, 10)]


def test_a_video_whose_frames_changed_places_is_never_an_image():
    class Swapped(Cut):
        def tokens(self, y: Tensor) -> Tensor:
            return Model.tokens(self, torch.cat([y[:, self.frame :], y[:, : self.frame]], 1))

    plan = ec.plan(Swapped(1).eval(), example_inputs=video())
    assert all(site.action == "keep" or len(site.grid_sizes) == 3 for site in plan.sites), [site.reason for site in plan.sites]


# ------------------------------------------------------------------ sequences that are no image


class Sound(nn.Module):
    """(batch, channels, length): filters before the blocks and behind them, of a number of taps each."""

    def __init__(self, before: int = 1, behind: int = 1) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv1d(4, WIDTH, before, before), nn.ConvTranspose1d(WIDTH, 4, behind, behind)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.block(self.enter(x).transpose(1, 2)).transpose(1, 2))


class Latents(Sound):
    """(batch, tokens, channels), packed; filters of one tap are Linears."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Pooled(Latents):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2))


class Flattened(Model):
    """An image, whose tokens pass a filter of one tap between the blocks."""

    def __init__(self) -> None:
        super().__init__(Block(), Block())
        self.mixing = nn.Conv1d(WIDTH, WIDTH, 1)

    def tokens(self, y: Tensor) -> Tensor:
        return super().tokens(y + self.mixing(y.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("model", [Sound(), Sound(2, 2), Latents(behind=2), Pooled()], ids=["one tap", "two", "behind", "pooled"])
def test_what_a_one_dimensional_filter_runs_along_is_no_image(model):
    x = torch.randn(2, 120, 4) if isinstance(model, Latents) else torch.randn(2, 4, 120)
    (site,) = ec.plan(model.eval(), example_inputs={"x": x}).sites
    assert (site.action, "a one-dimensional convolution or pooling" in site.reason) == ("keep", True)


def test_a_filter_of_one_tap_is_a_linear_for_packed_latents_and_images():
    plan = ec.plan(Latents().eval(), example_inputs={"x": torch.randn(2, 60, 4)})
    assert (actions(plan), plan.grid.kind) == (["edit"], "given")
    assert actions(ec.plan(Flattened().eval(), example_inputs=images())) == ["edit", "edit"]
