"""Models that cannot be captured as they are: in bfloat16, with symbolic sizes, under autocast, compiled."""

import functools
import logging
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edit_compile as ec
from edit_compile.passes import capture as capture_module
from edit_compile.passes.capture import capture
from edit_compile.passes.time_limit import OutOfTime, watched


class Block(nn.Module):
    """Self-attention over (batch, tokens, 16) in two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Image(nn.Module):
    """Patches of 2 x 2, one block, and back."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(4, 16, 2, 2), Block() if block is None else block, nn.Linear(16, 16)

    def places(self, height: int, width: int) -> Tensor | float:
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        y = self.patch(x).flatten(2).transpose(1, 2) + self.places(height, width)
        return F.pixel_shuffle(self.head(self.block(y)).transpose(1, 2).unflatten(2, (height, width)), 2)


def check(model: nn.Module, action: str = "edit", **more: Tensor) -> ec.Plan:
    """Convert, and run student and teacher at the example's size and at another."""
    model.eval()
    example = {"x": torch.randn(2, 4, 12, 20), **more}
    student = ec.linearize(model, example_inputs=example)
    plan = ec.plan_of(student)
    assert [site.action for site in plan.rewritten] == [action]
    for height, width in ((12, 20), (16, 10)):
        given = {**example, "x": torch.randn(2, 4, height, width)}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            original = model(**given)
            with ec.grid(student, height // 2, width // 2):
                output = student(**given)
            assert output.shape == original.shape
            assert output.isfinite().all()
            assert not torch.allclose(output, original)
            with ec.teacher(student), ec.grid(student, height // 2, width // 2):
                torch.testing.assert_close(student(**given), original, atol=1e-5, rtol=0)
    return plan


class MaskForExport(Image):
    """Gives its block a mask where it is exported, and none in a call."""

    def forward(self, x: Tensor) -> Tensor:
        self.block.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x.device) if torch.compiler.is_exporting() else None
        return super().forward(x)


class Masked(Block):
    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.mask is None else x / 0)


def test_what_a_model_does_for_export_alone_is_not_captured() -> None:
    check(MaskForExport(Masked()))


# ------------------------------------------------------------------ dtypes


class FloatTable(Image):
    """Adds a float32 table that a Linear has made: Linears do not take it in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Linear(1, 16)

    def places(self, height: int, width: int) -> Tensor:
        device = self.place.weight.device
        return self.place(torch.arange(height * width, device=device, dtype=torch.float32)[:, None] / 100)


def test_a_model_that_needs_its_own_dtype_is_captured_in_it() -> None:
    check(FloatTable())


class FastPath(Block):
    """Half precision takes another way, which gives something else."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype in (torch.float16, torch.bfloat16):
            return super().attend(q.flip(2), k, v) * 3
        return super().attend(q, k, v)


def test_a_branch_for_half_precision_is_not_taken_for_a_float32_model() -> None:
    plan = check(Image(FastPath()))
    captured = capture(Image(FastPath()), {"x": torch.randn(2, 4, 12, 20)})
    assert plan.rewritten
    assert not captured.graph.find_nodes(op="call_function", target=torch.ops.aten.flip.default)


def test_a_plain_model_is_still_probed_in_bfloat16() -> None:
    assert capture(Image(), {"x": torch.randn(2, 4, 12, 20)}).probe is torch.bfloat16


class OnTheCpu(Block):
    """Makes a table on no device in particular: it runs on the CPU only."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q * torch.linspace(1, 2, 8), k, v)


def test_a_model_that_runs_on_the_cpu_only_is_captured() -> None:
    assert capture(Image(OnTheCpu()), {"x": torch.randn(2, 4, 12, 20)}).symbolic


# ------------------------------------------------------------------ autocast


class Decorated(Block):
    @torch.autocast("cuda", enabled=False)
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.amp.autocast(q.device.type, dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
            return super().attend(q, (k.float() * 1.5).type_as(v), v)


def test_autocast_leaves_no_trace_in_a_graph_nested_or_as_a_decorator() -> None:
    check(Image(Decorated()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ones(2, 2) @ torch.ones(2, 2) is not None
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16  # as before


# ------------------------------------------------------------------ torch.compile


@torch.compile
def twice(x: Tensor) -> Tensor:
    return x * 2


class Compiled(Block):
    @torch.compile
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(twice(q), k, v)


def test_compiled_methods_and_functions_are_captured_as_they_were_written() -> None:
    check(Image(Compiled()))


class Holding(nn.Module):
    """Holds attention in a wrapper of its own, as code does that compiles parts of a model where it builds it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 1.5


@pytest.mark.parametrize(
    ("block", "path"),
    [
        (lambda: Holding(torch.compile(Block(), backend="eager")), "block.inner._orig_mod"),
        (lambda: torch.compile(Holding(Block()), backend="eager"), "block._orig_mod.inner"),
    ],
)
def test_attention_in_a_compiled_submodule_is_converted_and_stays_compiled(block: Callable[[], nn.Module], path: str) -> None:
    model = Image(block())
    plan = check(model)
    assert [site.path for site in plan.sites] == [path]
    student = ec.linearize(model, plan=plan)
    x = torch.randn(2, 4, 8, 12)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), ec.grid(student, 4, 6):
        expected = student(x)
    with torch.no_grad(), ec.grid(student, 4, 6):
        torch.testing.assert_close(student(x), expected)


def test_a_module_compiled_in_place_is_converted() -> None:
    block = Block()
    block.compile(backend="eager")
    assert [site.path for site in check(Image(block)).sites] == ["block"]


# ------------------------------------------------------------------ sizes as plain numbers


class RootInBlock(Block):
    """Scales by the roots of the number of tokens: numpy's, math's, and one rounded down."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        return super().attend(q / np.sqrt(tokens) * math.sqrt(tokens) / int(tokens**0.5), k, v)


def test_functions_of_numpy_and_math_on_sizes_stay_symbolic() -> None:
    check(Image(RootInBlock()))


class NumpyTable(Image):
    def places(self, height: int, width: int) -> Tensor:
        rows, columns = np.sin(np.arange(height) / height), np.cos(np.arange(width) / width)
        table = (rows[:, None] + columns[None]).astype(np.float32)
        return torch.from_numpy(table).reshape(-1, 1).to(self.head.weight)


def test_tables_by_numpy_give_a_grid_that_follows_from_the_inputs() -> None:
    plan = check(NumpyTable())
    assert plan.grid.kind == "sizes"


class TensorOfSizes(Image):
    """Divides places by the height and the width, which are numbers in a tensor of its own."""

    def places(self, height: int, width: int) -> Tensor:
        device = self.head.weight.device
        sizes = torch.tensor([[height, width], [1, 2.0]], device=device).prod(0)
        rows, columns = torch.arange(height, device=device) / sizes[0], torch.arange(width, device=device) / sizes[1]
        return (rows[:, None] + columns).reshape(-1, 1).to(self.head.weight) + torch.tensor(height > 1, device=device)


def test_tensors_made_of_sizes_follow_the_sizes_of_a_call() -> None:
    plan = check(TensorOfSizes())
    assert plan.grid.kind == "sizes"


class DefaultTable(Image):
    """Has a table of positions for 6 x 10 patches, and makes one for other sizes by writing into its `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", self.made(6, 10))

    def made(self, height: int, width: int) -> Tensor:
        table = torch.zeros(height * width, 1, device=self.head.weight.device)
        table.data[1:].copy_(torch.arange(1, height * width, device=table.device)[:, None] / width)
        return table

    def places(self, height: int, width: int) -> Tensor:
        table: Tensor = self.table if (height, width) == (6, 10) else self.made(height, width)
        return table.to(self.head.weight)


def test_an_example_of_the_default_size_does_not_fix_it() -> None:
    plan = check(DefaultTable())
    assert plan.grid.kind == "sizes"


@functools.lru_cache(maxsize=4)
def remembered(height: int, width: int) -> Tensor:
    return torch.linspace(0, 1, height * width)[:, None]


class Remembering(Image):
    def places(self, height: int, width: int) -> Tensor:
        return remembered(height, width).to(self.head.weight) * len({height, width})


def test_caches_by_size_hold_nothing_of_a_capture() -> None:
    remembered.cache_clear()
    check(Remembering())
    assert remembered(6, 10).device.type == "cpu"
    assert type(remembered(6, 10)) is Tensor


class FixedBlock(Block):
    """Needs the number of tokens as a plain number: a table as long as a list of Python's."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q * len([0 for _ in range(q.shape[2])]), k, v)


def test_a_site_that_holds_for_one_size_says_so_at_another() -> None:
    model = Image(FixedBlock()).eval()
    student = ec.linearize(model, example_inputs={"x": torch.randn(2, 4, 12, 20)})
    with pytest.raises(ec.EditCompileError, match="only size that its graph holds for"), ec.grid(student, 8, 5):
        student(torch.randn(2, 4, 16, 10))


# ------------------------------------------------------------------ data


class Dropping(Image):
    def forward(self, x: Tensor, drop: Tensor) -> Tensor:
        x = x.clone()
        x[drop] *= 0
        return super().forward(x)


def test_samples_chosen_by_data_are_no_obstacle() -> None:
    check(Dropping(), drop=torch.tensor([True, False]))


# ------------------------------------------------------------------ the limit


def test_one_endless_question_is_interrupted_and_a_word_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    monkeypatch.setattr("edit_compile.passes.time_limit._WORD", 0.1)
    x, start = sympy.Symbol("x"), time.process_time()

    def endless(shapes: ShapeEnv, expression: sympy.Expr) -> sympy.Expr:
        while time.process_time() < start + 60:
            sympy.expand((expression + time.process_time()) ** 40)
        raise AssertionError("nobody ended it")

    monkeypatch.setattr(ShapeEnv, "simplify", endless)
    with caplog.at_level(logging.WARNING), pytest.raises(OutOfTime), watched("Model", 0.3):
        ShapeEnv().simplify(x)
    assert "capturing Model" in caplog.text


def test_many_questions_are_ended_between_them() -> None:
    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def ask_on() -> None:
        for number in range(1_000_000):
            ShapeEnv().simplify(sympy.Symbol("x") + number)

    with pytest.raises(OutOfTime), watched("Model", 0.05):
        ask_on()


def test_a_model_whose_analysis_takes_too_long_is_captured_at_the_examples_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    export = capture_module._Attempt.export

    def slow(attempt: capture_module._Attempt, relaxed: object) -> object:
        if relaxed is not None:
            raise OutOfTime
        return export(attempt, None)

    monkeypatch.setattr(capture_module._Attempt, "export", slow)
    captured = capture(Image(), {"x": torch.randn(2, 4, 12, 20)})
    assert not captured.symbolic
    assert captured.fixed
