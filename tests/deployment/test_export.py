"""Exported files: what they give out at several sizes against the student, what varies in them, what they say, what is refused.

Each comparison is also made here, with inputs of other seeds and sizes than the command's own.
"""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, inject_adapter_in_model

import edit_compile as ec
import toy
from edit_compile.adapters.inputs import inputs_for_size
from edit_compile.api import repeated_blocks
from edit_compile.cli import main
from edit_compile.deployment.blocks import runs_of_blocks
from edit_compile.student.site import converted_sites
from families import FAMILIES

NEEDS = {"pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "executorch": ("executorch",)}
FILES = {"pt2": "student.pt2", "onnx": "student.onnx", "executorch": "student.pte"}


def needed(name):
    for module in NEEDS[name]:
        pytest.importorskip(module)


def shaken(student):
    toy.shaken(torch.nn.ModuleList(converted_sites(student).values()), amount=0.1)
    return student


@pytest.fixture(scope="module")
def students():
    """Students by name: demo models, and small random ones of families, whose sites are away from their start."""
    made = {}

    def student(name):
        if name not in made:
            torch.manual_seed(0)
            if name.startswith("demo/"):
                made[name] = shaken(ec.linearize(ec.load_model(name).model))
            else:
                model, inputs = FAMILIES[name]()
                made[name] = shaken(ec.linearize(model, example_inputs=inputs))
        return made[name]

    return student


@torch.no_grad()
def expected(student, inputs):
    output = student(**{name: value for name, value in inputs.items() if name != "image_grid"})
    return output[0] if isinstance(output, tuple) else output


def sized(student, height, width, batch, seed=5, **options):
    torch.manual_seed(seed)
    return inputs_for_size(student, height, width, batch=batch, device="cpu", dtype=torch.float32, **options).inputs


def compare(exported, student, inputs, limit=1e-4):
    (found,), other = exported(**inputs), expected(student, inputs)
    assert found.shape == other.shape
    assert (found - other).abs().max() <= limit * other.abs().max()


# ------------------------------------------------------------------ every format


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("name", ["demo/dit", "demo/mm-dit"])
def test_a_file_gives_out_what_the_student_does_at_any_size(students, tmp_path, name, format):
    needed(format)
    student = students(name)
    report = ec.export(student, tmp_path / FILES[format], sizes=[(32, 32), (24, 40)])
    assert set(report.errors) == {"32 x 32 px, batch 2", "24 x 40 px, batch 1"}
    assert 0 < report.largest_error < 1e-4
    assert report.about.varies == ("batch", "height", "width")
    assert sum(report.about.designs.values()) == len(converted_sites(student))
    exported = ec.load_exported(tmp_path / FILES[format])
    assert exported.about == report.about
    for height, width, batch in ((32, 32, 2), (40, 16, 1), (64, 48, 3)):
        compare(exported, student, sized(student, height, width, batch))
    with pytest.raises(ec.ExportError, match=r"takes encoder_hidden_states as \(batch, \d+, \d+\) of float32, not \(2, 3, 5\)"):
        exported(**{**sized(student, 32, 32, 2), "encoder_hidden_states": torch.zeros(2, 3, 5)})


@pytest.mark.slow
def test_executorch_runs_what_the_student_does(students, tmp_path):
    """PixArt computes with its sizes as floating-point numbers, which ExecuTorch has no operators for: they are fixed."""
    needed("executorch")
    student = students("pixart")
    report = ec.export(student, tmp_path / FILES["executorch"], sizes=[(96, 144)])
    assert report.largest_error < 1e-4
    assert report.about.varies == ("batch",)
    assert "ExecuTorch has no operator for" in report.about.fixed["height"]
    compare(ec.load_exported(tmp_path / FILES["executorch"]), student, sized(student, 96, 144, 1))


@pytest.mark.slow
def test_sizes_that_a_models_code_fixes_are_named(students, tmp_path):
    """DiT computes the side of its images as a number: what its graph says of sizes beyond torch's own checks is looked at."""
    needed("onnx")
    student = students("dit")
    with pytest.raises(ec.ExportError, match=r"DiTTransformer2DModel: height cannot vary: its graph holds only where Eq\(.*hidden_states"):
        ec.export(student, tmp_path / "student.onnx", sizes=[(128, 128)], dynamic=["height", "width"])
    report = ec.export(student, tmp_path / "student.onnx", sizes=[(128, 128)])
    assert report.about.varies == ("batch",)
    assert set(report.about.fixed) == {"height", "width"}
    exported = ec.load_exported(tmp_path / "student.onnx")
    compare(exported, student, sized(student, 128, 128, 3))
    with pytest.raises(ec.ExportError, match=r"takes hidden_states as \(batch, 4, 16, 16\) of float32, not \(1, 4, 12, 12\)"):
        exported(**sized(student, 96, 96, 1))


@pytest.mark.slow
def test_the_largest_size_is_in_the_file(students, tmp_path):
    """SD3's table of positions ends at 20 tokens here."""
    needed("onnx")
    student = students("sd3")
    ec.export(student, tmp_path / "student.onnx", sizes=[(160, 224), (96, 144)])
    exported = ec.load_exported(tmp_path / "student.onnx")
    compare(exported, student, sized(student, 320, 48, 1))
    inputs = sized(student, 320, 48, 1)
    with pytest.raises(ec.ExportError, match=r"takes hidden_states\.shape\[2\] up to \d+, not 60"):
        exported(**{**inputs, "hidden_states": torch.zeros(1, 4, 60, 6)})


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_grid_that_no_graph_can_read_is_one_more_input(students, tmp_path, format):
    """FLUX's grid is in the values of its position ids."""
    needed(format)
    student = students("flux")
    report = ec.export(student, tmp_path / FILES[format], sizes=[(80, 112), (48, 96)])
    assert report.about.varies == ("batch", "height", "width")
    exported = ec.load_exported(tmp_path / FILES[format])
    inputs = sized(student, 64, 48, 1)
    with pytest.raises(ec.ExportError, match="also takes image_grid; image_grid is a tensor of any content, shaped like the grid"):
        exported(**inputs)
    compare(exported, student, {**inputs, "image_grid": torch.zeros(4, 3, dtype=torch.uint8)})


@pytest.mark.slow
def test_a_model_that_no_adapter_knows_is_exported_from_example_inputs(tmp_path):
    needed("onnx")
    model = toy.shaken(toy.Toy(joint=True).eval())
    student = shaken(ec.linearize(model, example_inputs=toy.inputs(text=5)))
    report = ec.export(student, tmp_path / "toy.onnx", example_inputs=[toy.inputs(2, 8, 12, 5, 1), toy.inputs(3, 10, 6, 5, 2)])
    assert report.about.varies == ("size",)
    compare(ec.load_exported(tmp_path / "toy.onnx"), student, toy.inputs(4, 6, 14, 5, 3))


# ------------------------------------------------------------------ blocks without weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_blocks_without_weights_run_any_student_of_the_structure(students, tmp_path, name):
    student, file = students(name), tmp_path / "blocks.pt2"
    report = ec.export(student, file, blocks=True, sizes=[(80, 112), (48, 96)])
    assert report.largest_error < 1e-4
    assert len(set(report.about.blocks.values())) == (1 if name == "pixart" else 2)
    other = shaken(copy.deepcopy(student))  # with other weights
    inputs = sized(student, 48, 64, 3)
    before = expected(other, inputs)
    assert not torch.allclose(before, expected(student, inputs), atol=1e-2)
    torch._dynamo.reset()
    ec.load_blocks(other, file)
    after = expected(other, inputs)
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]  # nothing was compiled
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    changed = expected(other, inputs)
    assert (changed - after).abs().max() > 1e-3 * after.abs().max()
    with ec.teacher(student):
        original = expected(student, inputs)
    compiled = ec.load_blocks(copy.deepcopy(student), file)
    with ec.teacher(compiled):
        assert torch.equal(expected(compiled, inputs), original)


@pytest.fixture(scope="module")
def blocks(students, tmp_path_factory):
    """The code of a model's blocks."""
    file = tmp_path_factory.mktemp("blocks") / "pixart.pt2"
    ec.export(students("pixart"), file, blocks=True, sizes=[(80, 112), (48, 96)])
    return file


def compare_with_written(student, compiled=True):
    """Holds a call to one as the blocks are written, which is what runs where gradients may be needed."""
    inputs = sized(student, 48, 64, 3)
    before = sum(blocks_run(student))
    with torch.enable_grad():
        wanted = student(**inputs)[0].detach()
    assert sum(blocks_run(student)) == before
    found = expected(student, inputs)
    assert (sum(blocks_run(student)) > before) is compiled
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    return found


def blocks_run(student):
    return runs_of_blocks(student, repeated_blocks(student)).values()


@pytest.mark.slow
def test_code_of_blocks_follows_their_weights(blocks):
    """Also where a weight was shared with the original until it was written to, and in copies."""
    model, inputs = FAMILIES["pixart"]()
    student = ec.load_blocks(ec.linearize(model, example_inputs=inputs), blocks)
    first = compare_with_written(student)
    with torch.no_grad():
        for parameter in student.transformer_blocks[0].ff.parameters():
            parameter.mul_(1.5)
    second = compare_with_written(student)
    assert (second - first).abs().max() > 1e-3 * first.abs().max()
    copied = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    compare_with_written(copied, compiled=False)
    compare_with_written(ec.load_blocks(copied, blocks))
    assert torch.equal(compare_with_written(student), second)


@pytest.mark.slow
def test_blocks_with_other_weights_than_the_code_knows_run_as_written(blocks):
    model, inputs = FAMILIES["pixart"]()
    student = ec.load_blocks(ec.linearize(model, example_inputs=inputs), blocks)
    plain = compare_with_written(student)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["net.2"], init_lora_weights=False), student)
    adapted = compare_with_written(student, compiled=False)
    assert (adapted - plain).abs().max() > 1e-3 * plain.abs().max()
    half = ec.linearize(model, example_inputs=inputs).to(torch.bfloat16)
    with pytest.raises(ec.ExportError, match=r"in transformer_blocks\.0, .* is bfloat16 \(.*\), not float32"):
        ec.load_blocks(half, blocks)


def test_blocks_are_pt2_files(students, tmp_path):
    with pytest.raises(ec.ExportError, match=r"code of blocks is for torch: a \.pt2 file, not onnx"):
        ec.export(students("pixart"), tmp_path / "blocks.onnx", blocks=True)


# ------------------------------------------------------------------ what is refused


def test_formats_are_told_by_their_names_or_endings(students, tmp_path):
    with pytest.raises(ec.ExportError, match=r"student\.tflite: there is no such format; there are: pt2 \(\.pt2\), onnx"):
        ec.export(students("pixart"), tmp_path / "student.tflite")


@pytest.mark.parametrize("format", ["onnx", "executorch"])
def test_missing_packages_are_named_before_anything_is_done(students, tmp_path, monkeypatch, format):
    find = importlib.util.find_spec

    def without(name, *others):
        return None if name in NEEDS[format] else find(name, *others)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr("edit_compile.extras.find_spec", without)
    with pytest.raises(ec.EditCompileError, match=r"needs (onnx, onnxruntime, onnxscript|executorch).*: pip install"):
        ec.export(students("pixart"), tmp_path / FILES[format])


def test_a_file_that_is_there_is_not_replaced_unasked(students, tmp_path):
    (tmp_path / "student.pt2").write_text("mine")
    with pytest.raises(ec.ExportError, match=r"student\.pt2 exists already; .* replace it with --overwrite"):
        ec.export(students("pixart"), tmp_path / "student.pt2")
    assert (tmp_path / "student.pt2").read_text() == "mine"


def test_a_type_of_numbers_that_a_format_is_not_run_in_is_refused_at_once(students, tmp_path):
    needed("onnx")
    student = copy.deepcopy(students("pixart")).to(torch.bfloat16)
    with pytest.raises(ec.ExportError, match=r"onnx files are not run in bfloat16: export the student in float32"):
        ec.export(student, tmp_path / "student.onnx")


def test_what_cannot_vary_is_said_in_one_line(students, tmp_path):
    with pytest.raises(ec.ConfigError, match=r"dynamic=\['hight'\]: a list of names, of batch, frames, height, width, text"):
        ec.export(students("pixart"), tmp_path / "student.pt2", dynamic=["hight"])


def test_no_file_is_left_of_one_that_is_not_the_student(students, tmp_path, monkeypatch):
    """A format whose writer loses a weight: the file must not be kept, and one that was there stays."""
    from edit_compile.deployment import formats

    class Wrong(formats.Format):
        name, suffix = "pt2", ".pt2"

        def write(self, program, path, described):
            path.write_text(described)

        def read(self, path):
            return lambda tensors: [torch.zeros(len(tensors[0]), 8, *tensors[0].shape[2:])], path.read_text()

    monkeypatch.setitem(formats.FORMATS, "pt2", Wrong())
    (tmp_path / "student.pt2").write_text("mine")
    with pytest.raises(
        ec.ExportError, match=r"student\.pt2 is not the student: at .* its output differs by 1\.0e\+00 of the largest value"
    ):
        ec.export(students("pixart"), tmp_path / "student.pt2", sizes=[(80, 112)], overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt2"]
    assert (tmp_path / "student.pt2").read_text() == "mine"


# ------------------------------------------------------------------ the command


@pytest.mark.slow
def test_the_command_writes_compares_and_says_what_varies(students, tmp_path):
    needed("onnx")
    student = students("demo/dit")
    ec.save(student, tmp_path / "student", base="demo/dit")
    arguments = ["export", str(tmp_path / "student"), "-o", str(tmp_path / "s.onnx"), "--size", "32", "--size", "24x40"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert "largest relative error" in result.stdout
    assert "may vary: batch, height, width" in result.stderr
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert again.stderr.startswith("error: ")
    assert "exists already" in again.stderr
    replaced = CliRunner().invoke(main, [*arguments, "--overwrite", "--json"])
    found = json.loads(replaced.stdout)
    assert max(found["errors"].values()) < 1e-4
    compare(ec.load_exported(tmp_path / "s.onnx"), student, sized(student, 40, 16, 1))
