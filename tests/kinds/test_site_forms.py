"""Sites in unusual forms: what their forward takes, how they project, in which order their tensors are."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit_compile as ec
from small_picture import HEADS, SIZES, WIDTH, Block, Picture, check_converted, image, reasons

pytestmark = pytest.mark.usefixtures("compiled_once")

DIM = WIDTH // HEADS


def places(x: Tensor, height: int, width: int) -> Tensor:
    """(height * width, 1): a number for every place."""
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return (rows[:, None] + 0.1 * columns).reshape(-1, 1)


class WithPlaces(Picture):
    """Blocks get what `extra` makes of the grid."""

    def extra(self, y: Tensor, height: int, width: int) -> tuple:
        return (places(y, height, width).cos().to(y.dtype),)

    def run(self, y):
        for block in self.blocks:
            y = block(y, *self.extra(y, *self.grid))
        return y

    def forward(self, x):
        self.grid = x.shape[2] // 2, x.shape[3] // 2
        return super().forward(x)


# ------------------------------------------------------------------ complex numbers


def as_complex(t: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(t.float().reshape(*t.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(t)


def of_two_parts(t: Tensor, table: Tensor) -> Tensor:
    real, imaginary = t.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.view_as_real(torch.complex(real, imaginary) * table).flatten(-2).type_as(t)


@pytest.mark.slow
@pytest.mark.parametrize("turn", [as_complex, of_two_parts])
def test_rotations_by_complex_numbers(turn):
    class Rotates(Block):
        def forward(self, x, table):
            self.attend = lambda q, k, v: F.scaled_dot_product_attention(turn(q, table), turn(k, table), v)
            return super().forward(x)

    class Model(WithPlaces):
        def extra(self, y, height, width):
            angle = places(y, height, width).float().expand(-1, DIM // 2)
            return (torch.polar(torch.ones_like(angle), angle),)

    check_converted(Model(lambda: Rotates(None)), "edit")


# ------------------------------------------------------------------ projections by convolution


class Convolves(nn.Module):
    """Attention over (B, C, h, w)."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        batch, _, height, width = x.shape
        k, v = self.kv(x).chunk(2, 1)
        q, k, v = (t.view(batch, HEADS, DIM, height * width).mT for t in (self.q(x), k, v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))


class ConvolvesTokens(nn.Module):
    """Attention over (B, N, C) by convolutions over (B, C, N)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Conv1d(WIDTH, 3 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        q, k, v = self.qkv(x.mT).unflatten(1, (3, HEADS, DIM)).mT.unbind(1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)).mT


class Rows(nn.Module):
    """Attention over (B, h, w, C)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (t.flatten(1, 2).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class TokensFirst(Rows):
    """Attention over (N, B, C)."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).permute(1, 2, 0, 3) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2))


class Map(Picture):
    """Blocks over what `there` makes of (B, C, h, w)."""

    def __init__(self, block, there, back):
        super().__init__(block)
        self.there, self.back = there, back

    def forward(self, x):
        y = self.patch(x)
        height, width = y.shape[2:]
        y = self.back(self.run(self.there(y)), height, width)
        return F.pixel_shuffle(self.head(y.movedim(1, -1)).movedim(-1, 1), 2)


LAYOUTS = {
    "channels, rows, columns": (Convolves, lambda y: y, lambda y, h, w: y),
    "rows, columns, channels": (Rows, lambda y: y.permute(0, 2, 3, 1), lambda y, h, w: y.permute(0, 3, 1, 2)),
    "tokens, batch, channels": (
        TokensFirst,
        lambda y: y.flatten(2).permute(2, 0, 1),
        lambda y, h, w: y.permute(1, 2, 0).unflatten(2, (h, w)),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_may_be_in_any_order(layout):
    check_converted(Map(*LAYOUTS[layout]), "edit")


def test_projections_by_convolutions_over_tokens():
    check_converted(Picture(ConvolvesTokens), "edit")


def test_orders_of_one_attention_give_the_same():
    """A 1 x 1 convolution with a Linear's weights is that Linear: so are the students."""
    torch.manual_seed(0)
    models = [Picture(ConvolvesTokens), Map(*LAYOUTS["rows, columns, channels"]), Map(*LAYOUTS["tokens, batch, channels"])]
    weights = {name: w.squeeze(-1) if w.ndim == 3 else w for name, w in models[0].state_dict().items()}
    for model in models[1:]:
        model.load_state_dict(weights)
    students = [ec.linearize(model.eval(), example_inputs=image(*SIZES[0])) for model in models]
    for size in SIZES:
        inputs = image(*size)
        with torch.no_grad():
            first, *others = (student(**inputs) for student in students)
        for other in others:
            torch.testing.assert_close(other, first, atol=1e-5, rtol=0)


# ------------------------------------------------------------------ arguments


class TakesMore(Block):
    def forward(self, x, *extra):
        return super().forward(x * extra[0])


class TakesMoreByName(Block):
    def forward(self, x, **extra):
        return super().forward(x * extra["table"])


class ByName(WithPlaces):
    def run(self, y):
        for block in self.blocks:
            (table,) = self.extra(y, *self.grid)
            y = block(y, table=table)
        return y


def test_arguments_without_names():
    check_converted(WithPlaces(TakesMore), "edit")


def test_arguments_by_any_name():
    check_converted(ByName(TakesMoreByName), "edit")


def test_another_number_of_arguments_is_refused():
    model = WithPlaces(TakesMore).eval()
    student = ec.linearize(model, example_inputs=image(*SIZES[0]))
    student.extra = lambda y, height, width: (places(y, height, width).to(y.dtype), None)
    with pytest.raises(ec.RewriteError, match=r"len\(extra\) != 1"):
        student(**image(*SIZES[0]))


@dataclass
class Settings:
    scale: float = 0.5


class Scale(nn.Module):
    scale = 0.5


@pytest.mark.parametrize("given", [Settings(), SimpleNamespace(scale=0.5), Scale()], ids=lambda given: type(given).__name__)
def test_a_site_that_is_given_an_object_is_kept_and_no_other(given):
    class Takes(Block):
        def forward(self, x, given):
            return super().forward(x * given.scale)

    class Model(Picture):
        def run(self, y):
            return self.blocks[1](self.blocks[0](y, given))

    model = Model(Block)
    model.blocks[0] = Takes()
    plan = ec.plan(model.eval(), example_inputs=image(*SIZES[0]))
    assert [site.action for site in plan.sites] == ["keep", "edit"]
    assert type(given).__name__ in plan.sites[0].reason


class ReturnsNothing(Block):
    """As modules do that forget a cache when they are trained."""

    def train(self, mode=True):
        super().train(mode)


def test_a_train_that_returns_nothing():
    assert all(site.action == "edit" for site in ec.plan(Picture(ReturnsNothing), example_inputs=image(*SIZES[0])).sites)


# ------------------------------------------------------------------ what a forward makes of plain numbers


class ByLength(Block):
    """Reads the batch with `len`, which gives plain numbers alone."""

    def forward(self, x):
        q, k, v = (t.view(len(x), -1, HEADS, DIM).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gains(Block):
    """A gain by channel, written down in the forward."""

    def forward(self, x):
        return super().forward(x * torch.tensor([0.3, 0.7] * (WIDTH // 2), dtype=x.dtype, device=x.device))


class ByNumpy(Block):
    """Asks numpy, which takes no open sizes: the site is captured with the example's."""

    def forward(self, x):
        return super().forward(x + float(np.sin(np.arange(x.shape[1])).sum()))


def test_a_site_that_takes_plain_sizes_alone_is_converted_for_those():
    model = Picture(ByNumpy).eval()
    student = ec.linearize(model, example_inputs=image(*SIZES[0]))
    assert [site.action for site in ec.plan_of(student).sites] == ["edit", "edit"]
    with pytest.raises(ec.RewriteError, match=r"x\.shape\[1\] != 60"):
        student(**image(2, 8, 5))


@pytest.mark.slow
@pytest.mark.parametrize("block", [ByLength, Gains])
def test_lengths_and_constants(block):
    check_converted(Picture(block), "edit")


class OneByOne(Block):
    """Goes through the images of a batch, which fixes their number."""

    def forward(self, x):
        return torch.stack(list(super().forward(torch.stack(list(x)))))


def test_a_batch_that_is_fixed_is_told():
    student = ec.linearize(Picture(OneByOne).eval(), example_inputs=image(*SIZES[0]))
    student(**image(2, 8, 5))
    with pytest.raises(ec.RewriteError, match=r"x\.shape\[0\] != 2"):
        student(**image(1, 8, 5))


def one_by_one(x: Tensor, dim: int) -> Tensor:
    """Take a dimension apart and put it together, which fixes its size."""
    return torch.stack([x.select(dim, at) for at in range(x.shape[dim])], dim)


def counted(x: Tensor) -> Tensor:
    """Count tokens in Python, which fixes their number."""
    return x.reshape(-1, len(range(x.shape[1])), WIDTH)


class SomeFixed(nn.Module):
    """Joint attention in which the numbers of some tokens are fixed."""

    def __init__(self, fixed: str):
        super().__init__()
        self.fixed = fixed
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image, text):
        image = counted(image) if "image" in self.fixed else image
        text = counted(text) if "text" in self.fixed else text
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(torch.cat([image, text], 1)).chunk(3, -1))
        return image + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, : image.shape[1]])


class WithText(Picture):
    def forward(self, x, text):
        self.text = text
        return super().forward(x)

    def run(self, y):
        for block in self.blocks:
            y = block(y, self.text)
        return y


def words(batch: int, count: int, height: int = 4, width: int = 5) -> dict[str, Tensor]:
    return {**image(batch, height, width), "text": torch.randn(batch, count, WIDTH)}


@pytest.mark.parametrize("fixed", ["image", "text"])
def test_what_is_fixed_of_a_site_is_asked_and_the_rest_stays_open(fixed):
    model = WithText(lambda: SomeFixed(fixed)).eval()
    student = ec.linearize(model, example_inputs=words(2, 7))
    assert [site.action for site in ec.plan_of(student).sites] == ["mm-edit", "mm-edit"]
    open_in, fixed_in = (words(3, 9), words(3, 7, 4, 6)) if fixed == "image" else (words(3, 7, 4, 6), words(3, 9))
    with torch.no_grad(), ec.teacher(student):
        torch.testing.assert_close(student(**open_in), model(**open_in), atol=1e-5, rtol=0)
    assert student(**open_in).isfinite().all()
    with pytest.raises(ec.RewriteError, match=rf"{fixed}\.shape\[1\] != {20 if fixed == 'image' else 7}"):
        student(**fixed_in)


class RowsOneByOne(Rows):
    def forward(self, x):
        return super().forward(one_by_one(x, 1))


def test_the_rows_of_a_grid_may_be_fixed_alone():
    _, there, back = LAYOUTS["rows, columns, channels"]
    student = ec.linearize(Map(RowsOneByOne, there, back).eval(), example_inputs=image(2, 4, 5))
    assert student(**image(1, 4, 7)).isfinite().all()
    with pytest.raises(ec.RewriteError, match=r"x\.shape\[1\] != 4"):
        student(**image(1, 6, 5))


def test_equal_sizes_are_told_where_they_are_in_the_way():
    found = reasons(WithText(lambda: SomeFixed("image, text")), example_inputs=words(2, WIDTH, 4, 8))
    assert all("32 are channels and image tokens and text tokens: give example inputs" in reason for reason in found.values()), found


# ------------------------------------------------------------------ tables


class BeforeHeads(Block):
    """Queries and keys times a table (N, 1, D), before their heads stand in front of the tokens."""

    def forward(self, z, table):
        q, k, v = (t.unflatten(-1, (HEADS, DIM)) for t in self.qkv(z).chunk(3, -1))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q * table, k * table, v)))
        return z + self.out(y.transpose(1, 2).flatten(2))


class Registers(WithPlaces):
    """Three registers before the image: the sequence is joint."""

    def __init__(self, block):
        super().__init__(block)
        self.registers = nn.Parameter(torch.randn(1, 3, WIDTH))

    def extra(self, y, height, width):
        table = places(y, height, width).cos().to(y.dtype)
        return (torch.cat([table.new_ones(3, 1), table])[:, None].expand(-1, 1, DIM),)

    def run(self, y):
        return super().run(torch.cat([self.registers.expand(y.shape[0], -1, -1), y], 1))[:, 3:]


def test_a_table_by_token_with_a_dimension_for_heads():
    check_converted(Registers(BeforeHeads), "mm-edit")


class OnPatches(Block):
    """Tables for the image alone, whose number of tokens tells where the registers end: as DINOv3 does."""

    def forward(self, z, table):
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(z).chunk(3, -1))

        def on_patches(t):
            front, patches = t.split((t.shape[-2] - table.shape[-2], table.shape[-2]), -2)
            return torch.cat([front, patches * table], -2)

        y = F.scaled_dot_product_attention(on_patches(q), on_patches(k), v)
        return z + self.out(y.transpose(1, 2).flatten(2))


class RegistersApart(Registers):
    def extra(self, y, height, width):
        return WithPlaces.extra(self, y, height, width)


class OnPatchesByNumbers(Block):
    """The grid's rows and columns tell where the registers end, and the table is made on the spot."""

    def forward(self, z, rows, columns):
        table = places(z, rows, columns).cos().to(z.dtype)
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(z).chunk(3, -1))
        q, k = (torch.cat([t[:, :, : -rows * columns], t[:, :, -rows * columns :] * table], 2) for t in (q, k))
        return z + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class RegistersAndNumbers(Registers):
    def extra(self, y, height, width):
        return height, width


def test_a_table_for_the_patches_alone():
    student = check_converted(RegistersApart(OnPatches), "mm-edit")
    same = RegistersAndNumbers(OnPatchesByNumbers).eval()
    same.load_state_dict(RegistersApart(OnPatches).state_dict())
    again = ec.linearize(same, example_inputs=image(*SIZES[0]))
    for size in SIZES:
        inputs = image(*size)
        torch.testing.assert_close(again(**inputs), student(**inputs), atol=1e-5, rtol=0)


class TakesTable(Picture):
    """A table of rotations by row, column and channel is one of its inputs, as Lumina's is."""

    def forward(self, x, table):
        height, width = x.shape[2] // 2, x.shape[3] // 2
        self.table = table[:height, :width].flatten(0, 1)
        return super().forward(x)

    def run(self, y):
        for block in self.blocks:
            y = block(y, self.table)
        return y


class Turned(Block):
    def forward(self, x, table):
        self.attend = lambda q, k, v: F.scaled_dot_product_attention(q * table, k * table, v)
        return super().forward(x)


def test_channels_of_a_table_that_is_an_input_are_no_tokens():
    """Neither in the plan nor in the audit of the whole student, which finds them multiplied by image tokens."""
    model = TakesTable(lambda: Turned(None)).eval()
    inputs = {**image(*SIZES[0]), "table": torch.randn(24, 24, DIM)}
    student = ec.linearize(model, example_inputs=inputs)
    assert [site.action for site in ec.plan_of(student).sites] == ["edit", "edit"]
    assert ec.audit(student).findings == ()
    with torch.no_grad(), ec.teacher(student):
        torch.testing.assert_close(student(**inputs), model(**inputs), atol=1e-5, rtol=0)


# ------------------------------------------------------------------ heads


class Grouped(Block):
    """Two heads of keys and values for four of queries, norms over all heads, a gated output; keys and values by another Linear."""

    def __init__(self, shared):
        super().__init__()
        self.shared, self.norms = shared, nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(2 * DIM)])
        self.query, self.kv, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * DIM), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm(x)
        k, v = self.kv(y).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in (self.norms[0](self.query(y)), self.norms[1](k), v))
        y = self.shared(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y * self.gate(x).sigmoid())


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeated(q, k, v):
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def expanded(q, k, v):
    k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], HEADS, -1, DIM) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("shared", [grouped, repeated, expanded])
def test_heads_of_keys_may_be_shared(shared):
    check_converted(Picture(lambda: Grouped(shared)), "edit")


def test_a_sum_of_two_projections_is_kept_for_what_it_is():
    class Twice(Grouped):
        def forward(self, x):
            q, v = self.query(x), self.gate(x)
            q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (q, q + v, v))
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    assert all("comes from 2 projections of image tokens" in reason for reason in reasons(Picture(lambda: Twice(grouped))).values())
