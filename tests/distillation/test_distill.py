"""Whole distillations, small."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner
from diffusers.optimization import get_scheduler

import edit_compile as ec
import toy
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.cli import main
from edit_compile.demo import models
from edit_compile.distillation import Recipe, distill
from edit_compile.distillation.recipe.schema import Stage
from edit_compile.distillation.train.optimizer import MovingAverage, learning_rate
from edit_compile.errors import DistillError

pytestmark = pytest.mark.usefixtures("compiled_once")


def run(folder, model=None, **options):
    flow = NoiseSchedule("rectified-flow")
    source = toy_distill.ToySource()
    return distill(
        toy_distill.recipe(**options),
        folder,
        student=model or toy_distill.student(),
        source=source,
        denoise=toy_distill.denoise,
        schedule=flow,
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_the_folder_holds_the_student(tmp_path):
    model = toy_distill.student()
    with ec.teacher(model):
        expected = model(**toy.inputs(2, 12, 16, toy_distill.TEXT))
    layerwise = {"steps": 40, "global_batch_size": 8, "lr": 5e-3}
    stage = {"resolution": [12, 16], "steps": 30, "global_batch_size": 8, "lr": 2e-3}
    result = run(tmp_path, model, layerwise=layerwise, stages=[stage])
    assert result.after.total < 0.3 * result.before.total
    assert all(after.error < before.error for after, before in zip(result.after.bins, result.before.bins, strict=True))
    loaded = ec.load(tmp_path, toy_distill.base())
    inputs = toy.inputs(2, 12, 16, toy_distill.TEXT)
    assert torch.equal(loaded(**inputs), result.student(**inputs))
    with ec.teacher(result.student):
        assert torch.equal(result.student(**inputs), expected)
    assert json.loads((tmp_path / "result.json").read_text())["held_out_error"]["after"]["total"] == result.after.total


def test_below_min_tokens_what_conversion_put_there_is_trained_and_measured_all_the_same(tmp_path):
    model, inputs = toy_distill.student(), toy.inputs(2, 12, 16, toy_distill.TEXT)
    ec.set_min_tokens(model, 1000)
    result = run(tmp_path, model)
    assert result.before.total > result.after.total > 0
    assert any(value > 0 for name, value in rows(tmp_path)[0].items() if name.startswith("feature/"))
    for student in (result.student, ec.load(tmp_path, toy_distill.base())):
        assert ec.plan_of(student).min_tokens == 1000
        with torch.no_grad():
            assert torch.equal(student(**inputs), toy_distill.base()(**inputs))
    assert "below 1,000 image tokens it runs as the original" in (tmp_path / "README.md").read_text()


def test_the_error_is_measured_at_further_resolutions(tmp_path):
    stage = {"resolution": [12, 16], "steps": 2, "global_batch_size": 2}
    further = run(tmp_path / "a", stages=[stage], validation={"samples": 8, "resolutions": [[8, 24], 20]})
    assert list(further.after.resolutions) == ["8 x 24", "20 x 20"]
    alone = run(tmp_path / "b", stages=[{**stage, "resolution": [8, 24]}], validation={"samples": 8})
    assert further.before.resolutions["8 x 24"] == alone.before.total
    assert further.before.total not in further.before.resolutions.values()
    assert "| all, at 20 x 20 px |" in (tmp_path / "a" / "README.md").read_text()
    found = json.loads((tmp_path / "a" / "result.json").read_text())["held_out_error"]
    assert found["after"]["resolutions"] == further.after.resolutions


def test_a_further_resolution_that_the_data_cannot_give_is_refused_before_training(tmp_path, monkeypatch):
    def check(self, height, width):
        if height % 4:
            raise DistillError(f"no images of height {height}")

    monkeypatch.setattr(toy_distill.ToySource, "check", check)
    with pytest.raises(DistillError, match=r"validation\.resolutions: 13 x 16: no images of height 13"):
        run(tmp_path, stages=[{"resolution": [12, 16], "steps": 2}], validation={"samples": 8, "resolutions": [[13, 16]]})


def test_metrics_have_every_loss_on_its_own(tmp_path):
    stages = [
        {"resolution": [12, 16], "steps": 2, "global_batch_size": 4},
        {"resolution": [16, 12], "steps": 3, "global_batch_size": 2, "losses": {"task": 1}},
    ]
    run(tmp_path, stages=stages)
    found = rows(tmp_path)
    assert [row["phase"] for row in found] == ["layerwise fit"] * 6 + ["stage 0"] * 2 + ["stage 1"] * 3
    assert [row["samples"] for row in found] == [4, 8, 12, 16, 20, 24, 28, 32, 34, 36, 38]
    assert {"loss", "task", "output", "feature", "feature/blocks.0.attn", "feature/blocks.1.attn", "grad_norm", "lr"} <= found[-1].keys()


def test_runs_repeat_bit_for_bit(tmp_path):
    first, second = (run(tmp_path / name, toy_distill.student()) for name in "ab")
    for a, b in zip(first.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulation_changes_nothing_but_memory(tmp_path):
    def losses(name, micro):
        options = {"global_batch_size": 4, "micro_batch_size": micro, "lr": 1e-3, "warmup_steps": 0}
        run(tmp_path / name, layerwise={"steps": 3, **options}, stages=[{"resolution": [12, 16], "steps": 3, **options}])
        return [row["feature"] for row in rows(tmp_path / name)]

    assert losses("whole", 4) == pytest.approx(losses("parts", 1), rel=1e-4)


def test_only_what_is_chosen_is_trained(tmp_path):
    model = toy_distill.student()
    before = {name: p.clone() for name, p in model.named_parameters()}
    run(tmp_path, model, train="inserted")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".attn.edit." in name for name in changed)


def test_a_batch_that_does_not_divide_is_refused():
    stages = [{"resolution": 12, "steps": 1, "global_batch_size": 4, "micro_batch_size": 2}]
    context = toy_distill.context(toy_distill.student(), SimpleNamespace(num_processes=3, process_index=0), stages=stages)
    with pytest.raises(ec.DistillError, match="global_batch_size 4 is not divisible by 3 processes times micro_batch_size 2"):
        context.local_batch_slices(4, 2)


def test_a_model_that_is_not_converted_is_refused(tmp_path):
    with pytest.raises(ec.DistillError, match="Toy is not converted"):
        run(tmp_path, toy.Toy())


def test_learning_rate_rises_then_falls():
    stage = Stage(resolution=8, steps=100, lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, stage) for step in range(100)]
    assert max(rates) == rates[10] == 1.0
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert rates[-1] == pytest.approx(0.1, abs=0.001)
    assert learning_rate(0, Stage(resolution=8, steps=1, lr=1.0)) == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial", "cosine_with_restarts", "constant_with_warmup", "constant"])
def test_schedules_are_those_of_diffusers(name):
    options = {"cosine_with_restarts": {"lr_cycles": 3}, "polynomial": {"lr_power": 2.0}}.get(name, {})
    stage = Stage(resolution=8, steps=40, lr=0.5, warmup_steps=0.2, lr_schedule=name, **options)
    assert stage.warmup == (0 if name == "constant" else 8)
    parameter = torch.nn.Parameter(torch.zeros(1))
    given = {"num_cycles": 3} if name == "cosine_with_restarts" else {"power": 2.0} if name == "polynomial" else {}
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    theirs, expected = get_scheduler(name, optimizer, num_warmup_steps=8, num_training_steps=40, **given), []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    found = [learning_rate(step, stage) for step in range(40)]
    assert found[8:] == pytest.approx(expected[8:], abs=1e-6)
    assert found[:8] == (expected[:8] if name == "constant" else sorted(found[:8]))
    assert all(found)


def test_options_of_other_schedules_are_refused():
    for options in ({"lr_cycles": 2}, {"lr_power": 2.0, "lr_schedule": "linear"}, {"min_lr_ratio": 0.5, "lr_schedule": "constant"}):
        with pytest.raises(ValueError, match="has no effect with lr_schedule"):
            Stage(resolution=8, steps=4, **options)
    with pytest.raises(ValueError, match="snr_gamma has no effect"):
        Stage(resolution=8, steps=4, snr_gamma=5)


def test_moving_average_is_the_recurrence():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average, expected = MovingAverage({"p": parameter}, 0.5), torch.zeros(3)
    for n in range(20):
        with torch.no_grad():
            parameter.add_(1)
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
    torch.testing.assert_close(average.average["p"], expected)
    with average.applied():
        torch.testing.assert_close(parameter.data, expected)
    assert torch.equal(parameter.data, torch.full((3,), 20.0))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    toy.shaken(models.untrained("mm-dit"), 0, 0.02).save_pretrained(folder)
    return folder


@pytest.fixture
def demo_recipe(untrained, tmp_path):
    path = tmp_path / "small.yaml"
    stage = {"resolution": [16, 24], "steps": 2, "global_batch_size": 2}
    validation = {"samples": 4, "batch_size": 4}
    recipe = {"model": str(untrained), "prediction": "rectified-flow", "stages": [stage], "layerwise": {"steps": 2, "global_batch_size": 2}}
    path.write_text(yaml.safe_dump(recipe | {"validation": validation}))
    return path


def test_the_command_distills_a_demo_model(demo_recipe, tmp_path):
    result = CliRunner().invoke(main, ["distill", str(demo_recipe), "-o", str(tmp_path / "out"), "--set", "stages.0.steps=1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["held_out_error"]["after"]["samples"] == 4
    student = ec.load(tmp_path / "out")
    assert models.sample(student, [""], steps=1).isfinite().all()
    recipe = Recipe.model_validate(yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()))
    assert recipe.stages[0].steps == 1


def test_of_several_processes_one_speaks(demo_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as in the second process; that there is no first one does not matter here
    reports = []
    monkeypatch.setattr("edit_compile.distillation.run.distill", lambda *args, announce, **options: reports.append(announce))
    result = CliRunner().invoke(main, ["distill", str(demo_recipe), "-o", str(tmp_path / "out"), "--push-to-hub", "me/student"])
    assert (result.exit_code, result.output) == (0, "")
    assert reports == [None]


def test_a_dry_run_trains_nothing(demo_recipe, tmp_path):
    result = CliRunner().invoke(main, ["distill", str(demo_recipe), "-o", str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "parameters are trained" in result.stdout
    assert "resolution:" in result.stdout
    assert not (tmp_path / "out").exists()


def test_errors_of_the_command_are_one_line(tmp_path):
    result = CliRunner().invoke(main, ["distill", "nowhere"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no recipe 'nowhere'")
    assert len(result.stderr.splitlines()) == 1
