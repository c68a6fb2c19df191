"""What exported files take: sizes that belong together, tensors where the file runs, arguments that are not tensors. All else is refused in
a line, for compiled code checks nothing, and would read beyond its inputs.

The files are graphs of torch.export, made in seconds; what is checked is the same in every format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import edit_compile as ec
from edit_compile.adapters.inputs import inputs_for_size
from edit_compile.deployment import formats
from edit_compile.deployment.size_conditions import SizeConditions
from families import FAMILIES


class Graph(formats.Format):
    """Stands for a format whose files torch runs, and which checks nothing itself: the graphs stay in memory."""

    name, suffix, for_torch = "pt2", ".pt2", True

    def __init__(self) -> None:
        self.programs: dict[str, torch.export.ExportedProgram] = {}

    def write(self, program, path, described):
        self.programs[path.name] = program.exported
        path.write_text(described)

    def read(self, path):
        program = self.programs[path.name]
        module, spec = program.module(check_guards=False), program.call_spec.in_spec

        def run(tensors):
            args, kwargs = pytree.tree_unflatten(list(tensors), spec)
            return list(module(*args, **kwargs))

        return run, path.read_text()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[..., tuple[nn.Module, Any]]:
    """Students with their files, by a family's name."""
    made: dict[str, tuple[nn.Module, Any]] = {}

    def export(name: str) -> tuple[nn.Module, Any]:
        if name not in made:
            student = ec.linearize(FAMILIES[name]()[0])
            path = tmp_path_factory.mktemp("files") / f"{name}.pt2"
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(formats.FORMATS, "pt2", Graph())
                ec.export(student, path, sizes=[(80, 112)])
                made[name] = student, ec.load_exported(path)
        return made[name]

    return export


def sized(student: nn.Module, height: int, width: int, batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(3)
    return inputs_for_size(student, height, width, batch=batch, device="cpu", dtype=torch.float32).inputs


@torch.no_grad()
def check_same(file: Any, student: nn.Module, inputs: dict[str, Any], **more: Tensor) -> None:
    (found,), (wanted,) = file(**inputs, **more), student(**inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_inputs_whose_sizes_do_not_belong_together_are_refused(exported):
    student, file = exported("pixart")
    for size in ((80, 112, 2), (96, 96, 1), (112, 80, 3)):
        check_same(file, student, sized(student, *size))
    inputs = sized(student, 80, 112)
    with pytest.raises(ec.ExportError, match=r"pixart\.pt2 takes sizes with timestep\.shape\[0\] == hidden_states\.shape\[0\]$"):
        file(**{**inputs, "timestep": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ec.ExportError, match=r"takes sizes with .*encoder_attention_mask\.shape\[0\]"):
        file(**{**inputs, "encoder_attention_mask": inputs["encoder_attention_mask"][:1]})


@pytest.mark.slow
def test_a_grid_that_is_not_that_of_the_tokens_is_refused(exported):
    student, file = exported("flux")
    inputs = sized(student, 64, 48)
    check_same(file, student, inputs, image_grid=torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(ec.ExportError, match=r"takes sizes with .*image_grid\.shape\[0\]"):
        file(**inputs, image_grid=torch.zeros(4, 4, dtype=torch.uint8))


def test_tensors_of_another_device_are_refused(exported):
    student, file = exported("pixart")
    inputs = sized(student, 80, 112)
    with pytest.raises(ec.ExportError, match=r"pixart\.pt2 takes timestep on cpu, not on meta"):
        file(**{**inputs, "timestep": inputs["timestep"].to("meta")})


@pytest.mark.slow
def test_sizes_that_a_model_takes_as_numbers_are_fixed(exported):
    """Qwen-Image is told the grids of its images in a list, as long as the batch."""
    student, file = exported("qwen-image")
    assert file.about.varies == ()
    assert file.about.fixed == dict.fromkeys(("batch", "height", "width"), "it is a number in img_shapes")
    inputs = sized(student, 80, 112)
    check_same(file, student, inputs)  # numbers in tuples, which files hold as lists
    with pytest.raises(ec.ExportError, match=r"was made with img_shapes=.*: export it again with that"):
        file(**sized(student, 64, 48))


@pytest.mark.slow
def test_a_file_of_a_model_that_takes_sizes_as_numbers_holds_for_one(exported, tmp_path):
    student, _ = exported("qwen-image")
    with pytest.raises(ec.GridError, match=r"QwenImageTransformer2DModel: a file holds for one size: it is a number in img_shapes"):
        ec.export(student, tmp_path / "qwen.pt2", sizes=[(80, 112), (64, 48)])
    with pytest.raises(ec.ExportError, match=r"height cannot vary: it is a number in img_shapes; leave it out of dynamic"):
        ec.export(student, tmp_path / "qwen.pt2", sizes=[(80, 112)], dynamic=["height"])


def test_equations_of_sizes():
    held = SizeConditions(["x1_0 == x0_0", "x0_1 % 2 == 0", "x0_1 == 3 * (x1_1 // 2)"])
    names = ["x", "grid"]
    assert held.broken([torch.zeros(2, 6), torch.zeros(2, 5)], names) is None
    assert held.broken([torch.zeros(2, 9), torch.zeros(2, 7)], names) == "x.shape[1] % 2 == 0"
    assert held.broken([torch.zeros(3, 6), torch.zeros(2, 5)], names) == "grid.shape[0] == x.shape[0]"
    assert SizeConditions(["x0_0 % x0_1 == 0"]).broken([torch.zeros(2, 0)], names) == "x.shape[0] % x.shape[1] == 0"


@pytest.mark.parametrize("text", ["__import__('os')", "x0_0.real == 1", "y == 1", "x0_0 == 1.5", "9 ** 9 == x0_0", "x0_0 ==", "(" * 5000])
def test_text_that_is_no_equation_of_sizes_is_refused(text: str):
    with pytest.raises(ValueError, match="no equation of sizes"):
        SizeConditions([text])
