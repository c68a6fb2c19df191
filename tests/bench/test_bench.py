"""`edit-compile bench`: teacher, conversions, bound and floor, in turns, through the command line."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from click.testing import CliRunner
from test_tables import shown
from torch.utils.flop_counter import FlopCounterMode

import edit_compile as ec
import toy
from edit_compile.adapters.inputs import inputs_for_size
from edit_compile.adapters.random_model import random_model, repeated_runs
from edit_compile.bench import high_water, run, subjects
from edit_compile.bench.primitives import as_call
from edit_compile.bench.profile import INSIDE, OTHER
from edit_compile.bench.roofline import Roofline
from edit_compile.bench.turns import time_in_turns
from edit_compile.cli import main
from edit_compile.designs import NO_ATTENTION
from edit_compile.designs.no_attention import NoAttention
from edit_compile.report.bench_table import bench_table

pytestmark = pytest.mark.usefixtures("compiled_once")

CPU = torch.device("cpu")


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Rates that are not measured."""
    conditions = {"device": "a machine", "threads": 1, "torch_version": "2", "dtype": "float32"}
    rates = Roofline(**conditions, product=1e12, softmax=5e11, depthwise=1e11, bandwidth=1e10, overhead=1e-6)
    monkeypatch.setattr(run, "roofline", lambda device, dtype: rates)


@pytest.fixture(scope="module")
def made():
    """A block of a demo model and two conversions of it."""
    conversions = {"edit": ec.LinearizeConfig(design="edit"), "small": ec.LinearizeConfig(design="edit", reduction=8)}
    return run.Bench.make("demo/dit", conversions, blocks=1)


@pytest.fixture
def ready(made, monkeypatch):
    """What the command makes is what was made before; yields how it was asked for."""
    asked = {}
    monkeypatch.setattr(run.Bench, "make", lambda source, conversions, **options: asked.update(options, conversions=conversions) or made)
    return asked


def test_json_has_a_row_for_each_subject_and_size(ready, tmp_path):
    designs = "edit, {design: edit, reduction: 8}"
    plot = tmp_path / "speed.png"
    result = invoke("demo/dit", "--resolutions", "16,32x48", "--designs", designs, "--runs", 2, "--blocks", 3, "--plot", plot, "--json")
    assert result.exit_code == 0, result.output
    report, names = json.loads(result.stdout), ["teacher", "edit", "small", "bound"]
    assert [(row["name"], row["size"]) for row in report["rows"]] == [(name, size) for size in ([16, 16], [32, 48]) for name in names]
    assert (report["model"], report["blocks"], report["dtype"], report["compiled"], report["runs"]) == ("demo/dit", 1, "float32", False, 2)
    assert [*ready["conversions"]] == ["edit", "edit reduction=8"]
    assert (ready["blocks"], ready["dtype"], ready["compiled"]) == (3, torch.float32, False)
    for row in report["rows"]:
        assert row["predicted"] > 0
        assert row["problem"] is None
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["needs"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_floor_is_no_less_than_the_bound(made):
    teacher, edit, small, bound = made.run([(32, 48)], runs=3, warmup=1).rows
    for row in (edit, small):
        assert row.floor.median > bound.seconds.median
        assert row.of_floor.median > row.of_bound.median
    assert teacher.floor is bound.floor is None
    assert teacher.speedup.median == bound.of_bound.median == 1
    assert edit.flops > small.flops > bound.flops


def test_the_work_of_a_conversion_is_the_bounds_and_its_parts(made):
    image = inputs_for_size(made.subjects[0].model, 32, 48)
    work = {subject.name: subjects.count_work(subject, image) for subject in made.subjects}
    for name in ("edit", "small"):
        assert work[name].flops == work["bound"].flops + sum(part.flops * sites for part, sites in work[name].parts.items())
    assert not work["bound"].parts
    assert not work["teacher"].parts


@pytest.mark.slow
def test_text_takes_part_in_the_work_of_joint_attention():
    model = random_model("demo/mm-dit", blocks=1).model
    made = subjects.make_subjects(model, {"mine": ec.LinearizeConfig()})
    work = {subject.name: subjects.count_work(subject, inputs_for_size(model, 32, 32)) for subject in made}
    assert work["mine"].flops == work["bound"].flops + sum(part.flops * sites for part, sites in work["mine"].parts.items())
    assert any(isinstance(part, ec.Softmax) for part in work["mine"].parts)


def test_the_table_fits_a_narrow_terminal(ready, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke("demo/dit", "--resolutions", "16", "--runs", 1)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert " ".join(result.stdout.split()).startswith(
        "demo/dit, cut to 1 of each kind of block, random weights, float32, not compiled, 1 round"
    )
    assert [line for line in result.stdout.splitlines() if line.startswith("16 x 16") and " bound " in line]


def test_what_does_not_fit_is_told_with_the_figure_and_not_tried(made, monkeypatch):
    monkeypatch.setattr(run, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(run, "count_work", lambda *_: subjects.Work(1, 3 * 2**20, {}))
    monkeypatch.setattr(run.Bench, "real_inputs", lambda *_: pytest.fail("it was tried"))
    for row in made.run([(32, 32)]).rows:
        assert row.problem == "needs 3 MiB, 1 MiB are free: not tried"
        assert row.seconds is None
    result = invoke("demo/dit", "--blocks", 1)
    assert result.exit_code == 1
    assert re.search(r"error: demo/dit: its weights need \d MiB, 1 MiB are free on cpu; cut it with --blocks N", result.stderr)


def test_running_out_of_memory_is_told(made, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(made.subjects[0].model, "forward", fail)
    report = made.run([(16, 16)], runs=1, warmup=1)
    assert report.rows[0].problem == "ran out of memory: tried to allocate 9 GiB"
    assert report.rows[1].seconds is not None
    assert report.rows[1].speedup is None


def test_sizes_that_cannot_be_made_say_why(made):
    report = made.run([(33, 33)])
    assert report.rows == ()
    assert "multiples of" in report.impossible["33 x 33"]


def test_a_size_that_is_too_large_to_be_counted_is_said(made):
    assert made.run([(2**27, 2**27)]).impossible["134217728 x 134217728"] == (
        "134217728 x 134217728 px is too large: its attention has more numbers than fit into 64 bits"
    )


def test_what_a_compiler_says_is_told_of_the_subject_alone(made, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such instruction\nat all")

    monkeypatch.setattr(made.subjects[1].model, "forward", fail)
    teacher, edit, *_ = made.run([(16, 16)], runs=1, warmup=1).rows
    assert edit.problem == "failed: RuntimeError: no such instruction"
    assert teacher.seconds is not None


def test_a_limit_holds_for_all(made):
    assert [row.problem is not None for row in made.run([(16, 16)], limit=0).rows] == [True] * 4


def test_the_command_fails_where_no_size_can_be_measured():
    done = invoke("demo/dit", "--blocks", 1, "--resolutions", 33, "--designs", "edit")
    assert done.exit_code == 1
    assert "no size could be measured: " in done.output
    assert "multiples of" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--designs", "edt"), "unknown design 'edt'; did you mean edit"),
        (("--designs", ""), "names no design"),
        (("--plot", "."), "File '.' is a directory"),
        (("--device", "nowhere"), "there is no device 'nowhere'"),
        (("--resolutions", "big"), "'big' is neither PX nor HEIGHTxWIDTH"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    result = invoke("demo/dit", *arguments)
    assert result.exit_code
    assert message in result.stderr


def test_a_profile_tells_parts_of_sites_apart(made):
    rows = made.run([(16, 16)], runs=1, warmup=1, profiled=True).rows
    for row in rows:
        assert sum(share.share for share in row.profile) == pytest.approx(1)
    parts = {row.name: {share.part for share in row.profile} for row in rows}
    assert {"to_q", "to_out.0", OTHER, INSIDE} <= parts["teacher"]
    assert "edit.query.reduce" in parts["edit"]
    assert "edit.query.reduce" not in parts["bound"]
    assert any((share.part, share.kind) == ("edit.query.reduce", "convolution") for share in rows[1].profile)
    report = dataclasses.replace(made.run([(33, 33)]), rows=rows, impossible={})
    text = shown(bench_table(report), 80)
    assert "shares of the time at 16 x 16 px" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_design_that_takes_no_site_is_refused(made):
    with pytest.raises(ec.PlanError, match=r"mm-edit converts no site of .*: transformer_blocks\.0\.attn1: "):
        subjects.make_subjects(made.subjects[0].model, {"mm-edit": ec.LinearizeConfig(design="mm-edit")})


@pytest.mark.parametrize("name", ["demo/dit", "demo/mm-dit"])
def test_a_model_is_cut_to_its_first_blocks(name):
    whole, cut = random_model(name, device="meta").model, random_model(name, blocks=1, device="meta").model
    ((path, blocks),) = repeated_runs(whole)
    kept = cut.get_submodule(path)
    assert len(blocks) > len(kept) == 1
    shapes = {key: value.shape for key, value in whole.state_dict().items() if not key.startswith(f"{path}.")}
    assert shapes == {key: value.shape for key, value in cut.state_dict().items() if not key.startswith(f"{path}.")}


# ------------------------------------------------------------------ the bound

BOUNDED = {
    "image": {},
    "joint": {"joint": True},
    "grouped": {"heads": 4, "key_heads": 2},
    "normalised": {"qk_norm": True},
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_the_bound_has_projections_and_no_product_of_image_tokens(kind):
    options = BOUNDED[kind]
    inputs = toy.inputs(text=4 if options.get("joint") else None)
    bound = ec.linearize(toy.Toy(blocks=1, **options).eval(), ec.LinearizeConfig(design=NO_ATTENTION), inputs)
    site, tokens = bound.blocks[0].attn, []
    site.to_q.register_forward_hook(lambda module, x, y: tokens.append(y.shape[0] * y.shape[1]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bound(**inputs)
    linears = sum(2 * tokens[0] * module.weight.numel() for module in site.modules() if isinstance(module, torch.nn.Linear))
    assert {str(name): count for name, count in counter.get_flop_counts()["Toy.blocks.0.attn"].items()} == {"aten.addmm": linears}
    assert ec.audit(bound).findings == ()


def test_torch_compile_keeps_the_bounds_projections():
    """A graph that Inductor gets has as many products as the model has Linears."""
    model = toy.Toy(blocks=1).eval()
    bound = ec.linearize(model, ec.LinearizeConfig(design=NO_ATTENTION), toy.inputs())
    seen = []

    def backend(graph, example):
        from torch._dynamo.backends.common import aot_autograd

        def kept(lowered, _):
            seen.append(sum("mm" in str(node.target) for node in lowered.graph.nodes))
            return lowered.forward

        return aot_autograd(fw_compiler=kept)(graph, example)

    with torch.no_grad():
        bound.blocks[0].compile(backend=backend, dynamic=True, fullgraph=True)
        expected = bound(**toy.inputs())
    linears = sum(isinstance(module, torch.nn.Linear) for module in bound.blocks[0].modules())
    assert seen
    assert seen[0] == linears
    assert expected.isfinite().all()


def test_the_bound_reads_every_number_of_queries_and_keys():
    bound = ec.linearize(toy.Toy(blocks=1).eval(), ec.LinearizeConfig(design=NO_ATTENTION), toy.inputs())
    attention = bound.blocks[0].attn
    bound(**toy.inputs()).square().sum().backward()
    for linear in (attention.to_q, attention.to_k, attention.to_v):
        assert (linear.weight.grad.abs().sum(1) > 0).all()


def test_keys_without_queries_and_heads_of_two_widths_are_read_too():
    """Text of which image queries see the keys alone; values wider than queries."""
    query, key, value = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9, 4, requires_grad=True), torch.randn(1, 2, 9, 5, requires_grad=True)
    tokens = ec.Tokens(("image",), (6,), (2, 3), keys=ec.Tokens(("text", "image"), (3, 6), (2, 3)))
    y = NoAttention.forward(None, ec.QKV(query, key, value), tokens)
    assert y.shape == (1, 2, 6, 5)
    y.square().sum().backward()
    assert (key.grad != 0).all()
    assert (value.grad != 0).all()


# ------------------------------------------------------------------ the floor's parts


def test_parts_of_designs_are_timed_as_they_are_stated():
    for part in (ec.Product(6, 5, 4), ec.Product(6, 5, 4, 3), ec.Softmax(7, 9, 4, 4, 2)):
        call, times = as_call(part, CPU, torch.float32)
        assert times == 1
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            call()
        assert counter.get_total_flops() == part.flops


def test_of_large_parts_a_share_is_timed():
    part = ec.Product(2**22, 8, 2)
    call, times = as_call(part, CPU, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        call()
    assert times * counter.get_total_flops() == pytest.approx(part.flops)
    assert times > 100


def test_calls_take_turns():
    log = []
    calls = {name: lambda name=name: log.append(name) for name in "ab"}
    found = time_in_turns(calls, CPU, runs=2, warmup=1, repeats={"b": 3})
    assert "".join(log) == "ab" + "abbb" * 2
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}


def test_peaks_are_measured_where_the_system_tells():
    peak = high_water.measured_peak(lambda: torch.ones(2**26, dtype=torch.uint8), CPU)
    assert peak is None or 0.9 * 2**26 < peak < 2**27
    free = high_water.free_memory(CPU)
    assert free is None or free > 2**20
