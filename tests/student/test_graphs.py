"""torch.compile over several resolutions: a converted model needs no more graphs than the model it was made from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import edit_compile as ec
from edit_compile.adapters.inputs import inputs_for_size, pixels_per_token
from edit_compile.api import repeated_blocks
from families import FAMILIES, build

GRIDS = [(4, 6), (5, 7), (9, 3)]
SIZES = {
    "sd3-dual": {"num_layers": 2, "dual_attention_layers": (0,)},
    "pixart": {"num_layers": 2},
    "flux": {"num_layers": 1, "num_single_layers": 1},
}
OPTIONS: dict[str, Any] = {"dynamic": True, "fullgraph": True, "backend": "eager"}


class Pair(NamedTuple):
    teacher: nn.Module
    student: nn.Module
    inputs: list[dict[str, Any]]


@functools.cache
def pair(name: str) -> Pair:
    """A family cut to one or two blocks, converted, and inputs for every grid."""
    whole, example = FAMILIES[name]()
    model = build(type(whole), **{**whole.config, **SIZES[name]})
    inputs = []
    for rows, columns in GRIDS:
        step = pixels_per_token(model)
        torch.manual_seed(0)
        made = inputs_for_size(model, rows * step, columns * step, batch=2, text=11, device="cpu", dtype=torch.float32)
        inputs.append(made.inputs)
    return Pair(model, ec.linearize(model, plan=ec.plan(model, example_inputs=example)), inputs)


@pytest.fixture(scope="module", params=SIZES)
def any_pair(request):
    return pair(request.param)


def graphs(run: Callable[[int], Any]) -> tuple[int, list[torch.Tensor]]:
    """How many graphs the forwards at all grids take, one after the other, and their outputs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        outputs = [run(i)[0] for i in range(len(GRIDS))]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], outputs


@pytest.mark.slow
def test_blocks_compiled_one_by_one(any_pair):
    teacher, student, inputs = any_pair
    blocks, compiled = copy.deepcopy(teacher), ec.compile(copy.deepcopy(student), **OPTIONS)
    for path in repeated_blocks(student):
        blocks.get_submodule(path).compile(**OPTIONS)
    before, _ = graphs(lambda i: blocks(**inputs[i]))
    after, outputs = graphs(lambda i: compiled(**inputs[i]))
    assert 0 < after <= before
    check(student, inputs, outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
def test_all_that_a_block_is_compiled_for_fits_in_one_process():
    """Blocks with a second attention, without, and the last one; trained, run, run as the teacher and below `min_tokens`: more than
    torch's limit of eight graphs.
    """
    whole, example = FAMILIES["sd3-dual"]()
    model = build(type(whole), **{**whole.config, "num_layers": 3, "dual_attention_layers": (0,)})
    student = ec.compile(ec.linearize(model, example_inputs=example), backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    student(**example)[0].mean().backward()
    with torch.no_grad():
        converted = student(**example)[0]
        with ec.teacher(student):
            original = student(**example)[0]
        ec.set_min_tokens(student, 10**6)
        below = student(**example)[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8
    torch.testing.assert_close(original, below)
    assert not torch.allclose(converted, original)


@pytest.mark.slow
def test_flux_compiled_whole_with_its_grid_stated():
    teacher, student, inputs = pair("flux")
    before, _ = graphs(lambda i: torch.compile(teacher, **OPTIONS)(**inputs[i]))
    compiled = torch.compile(student, **OPTIONS)

    def run(i: int) -> Any:
        with ec.grid(student, *GRIDS[i]):
            return compiled(**inputs[i])

    after, outputs = graphs(run)
    assert 0 < after <= before
    check(student, inputs, outputs)


def check(student: nn.Module, inputs: list[dict[str, Any]], outputs: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for i, output in enumerate(outputs):
            torch.testing.assert_close(output, student(**inputs[i])[0], atol=1e-4, rtol=1e-4)
