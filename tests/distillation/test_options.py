"""What a recipe can switch on: recomputation, compilation, half precision, training all weights."""

from __future__ import annotations

import copy
import functools
import json
import sys

import pytest
import torch
from accelerate import Accelerator

import edit_compile as ec
import toy
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation import distill
from edit_compile.distillation.context import trained_parameters
from edit_compile.distillation.recipe.schema import OptimizerConfig
from edit_compile.distillation.train import distributed
from edit_compile.distillation.train.features import captured
from edit_compile.distillation.train.optimizer import check_optimizer, make_optimizers, moment_bytes
from edit_compile.student.site import converted_sites

STAGES = [{"resolution": size, "steps": 3, "global_batch_size": 2, "lr": 1e-3, "warmup_steps": 0} for size in ([12, 16], [16, 20])]


def run(folder, model=None, **options):
    recipe = toy_distill.recipe(**{"stages": STAGES, "layerwise": None} | options)
    flow, student = NoiseSchedule("rectified-flow"), model or toy_distill.student()
    return distill(recipe, folder, student=student, source=toy_distill.ToySource(), denoise=toy_distill.denoise, schedule=flow)


def losses(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in found for name in ("loss", "task", "output", "feature", "grad_norm")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run(folder)
    return losses(folder)


@pytest.mark.parametrize("weights", [{"output": 1, "feature": 1}, {"output": 0, "feature": 1}])
def test_recomputing_blocks_changes_nothing(tmp_path, weights):
    """Also where the loss is of the sites' outputs alone, so that the backward pass begins inside the model."""
    stages = [{**stage, "losses": weights} for stage in STAGES]
    run(tmp_path / "kept", stages=stages)
    run(tmp_path / "again", stages=stages, gradient_checkpointing=True)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), rel=1e-4)


def deeper(blocks):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ec.linearize(toy.Toy(blocks=blocks, joint=True).eval(), example_inputs=toy.inputs(text=toy_distill.TEXT))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
def test_recomputed_blocks_are_compiled_too_and_once(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    inputs, gradients, graphs = toy.inputs(2, 12, 16, toy_distill.TEXT), [], []
    for compiled in (False, True):
        student = deeper(1)
        counted.clear()
        recipe = toy_distill.recipe(gradient_checkpointing=True, compile=compiled)
        distributed.wrap(student, student, recipe, Accelerator())
        with captured(student) as features:
            output = student(**inputs)
        graphs.append(counted["unique_graphs"])
        sum(tensor.square().mean() for tensor in (output, *(t for tensors in features.values() for t in tensors))).backward()
        graphs.append(counted["unique_graphs"])
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    torch._dynamo.reset()
    assert graphs == [0, 0, 1, 1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
def test_compiled_blocks_learn_the_same_and_more_of_them_need_no_more_graphs(tmp_path, monkeypatch, plain):
    monkeypatch.setattr(distributed, "compile_blocks", functools.partial(ec.compile, backend="eager"))
    graphs = []
    for blocks in (2, 3):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run(tmp_path / str(blocks), toy_distill.student() if blocks == 2 else deeper(blocks), compile=True)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] == graphs[1]
    assert losses(tmp_path / "2") == pytest.approx(plain, rel=1e-4)


def test_half_precision_keeps_what_is_trained_in_full(tmp_path):
    model = toy_distill.student()
    result = run(tmp_path, model, precision="bf16", layerwise={"steps": 20, "global_batch_size": 4, "lr": 5e-3})
    for name, parameter in model.named_parameters():
        assert parameter.dtype is (torch.float32 if ".attn." in name else torch.bfloat16), name
    assert result.after.total < 0.6 * result.before.total
    assert ec.load(tmp_path, toy_distill.base()).out.weight.dtype is torch.float32


def test_half_precision_does_not_round_what_is_trained():
    model = toy_distill.student()
    before = copy.deepcopy(model.state_dict())
    trained = set(trained_parameters(model, "attention"))
    distributed.set_precision(model, trained, "bf16")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in trained else before[name].bfloat16()), name
    assert {p.dtype for site in converted_sites(model).values() for p in site.edit_teacher.parameters()} == {torch.bfloat16}


def test_a_layerwise_fit_before_training_all_stays_within_the_sites(tmp_path):
    model = toy_distill.student()
    before = copy.deepcopy(model.state_dict())
    changed = {}

    def report(row):
        if row["phase"] == "layerwise fit":
            changed[row["step"]] = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    recipe = toy_distill.recipe(train="all")
    flow, source = NoiseSchedule("rectified-flow"), toy_distill.ToySource()
    distill(recipe, tmp_path, student=model, source=source, denoise=toy_distill.denoise, schedule=flow, report=report)
    assert changed[6]
    assert all(".attn." in name for name in changed[6])
    assert not torch.equal(model.out.weight, before["out.weight"])


def test_training_all_leaves_the_base_alone_and_is_saved(tmp_path):
    base = toy_distill.base()
    before = copy.deepcopy(base.state_dict())
    model = ec.linearize(base, example_inputs=toy.inputs(text=toy_distill.TEXT))
    result = run(tmp_path, model, train="all", gradient_checkpointing=True)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert not torch.equal(model.out.weight, base.out.weight)
    assert result.after.total < result.before.total
    loaded = ec.load(tmp_path, base)
    inputs = toy.inputs(2, 12, 16, toy_distill.TEXT)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs), result.student(**inputs))
        assert torch.equal(base(**inputs), toy_distill.base()(**inputs))
    with torch.no_grad(), ec.teacher(loaded):
        assert torch.equal(loaded(**inputs), base(**inputs))
    ec.save(loaded, tmp_path / "again")
    assert torch.equal(ec.load(tmp_path / "again", base).out.weight, loaded.out.weight)


def test_an_optimizer_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ec.DistillError, match="pip install bitsandbytes"):
        make_optimizers(toy_distill.student(), {"p": torch.nn.Parameter(torch.zeros(1))}, OptimizerConfig(kind="adamw-8bit"))


class FindsItsRate(torch.optim.Optimizer):
    """As Prodigy and schedule-free optimizers do, it keeps what it has found in its groups: a number, a flag and a tensor."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr, "d": 1.0, "warm": False, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["d"] *= 1.5
            group["total"] = group.get("total", torch.zeros(())) + group["d"] * (2 if group["warm"] else 1)
            group["warm"] = True
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 0.5)
                parameter.sub_(mean * group["lr"] * group["d"] / group["total"])


class KeepsAList(FindsItsRate):
    def step(self):
        super().step()
        self.param_groups[0]["seen"] = [1]


@pytest.mark.parametrize(
    ("kind", "options", "slots"),
    [
        ("sgd", {"momentum": 0.9}, 4),
        ("nadam", {}, 8),
        ("adafactor", {}, 0.03),
        ("torch.optim.RMSprop", {"alpha": 0.9}, 4),
        ("adam", {}, 8),
        ("test_options.FindsItsRate", {}, 4),
    ],
)
def test_any_optimizer_trains_and_continues(kind, options, slots):
    chosen = OptimizerConfig(kind=kind, options=options)
    check_optimizer(chosen)
    weights = {name: torch.nn.Parameter(torch.ones(16, 16)) for name in ("a", "b")}
    first = make_optimizers(toy_distill.student(), weights, chosen)

    def step(optimizers, own):
        for number, parameter in enumerate(own.values()):
            parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
        optimizers.step(1e-2)

    step(first, weights)
    others = {name: torch.nn.Parameter(p.detach().clone()) for name, p in weights.items()}
    second = make_optimizers(toy_distill.student(), others, chosen)
    kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in first.slots(weights).items()}
    second.set_slots(others, kept)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    step(first, weights)
    step(second, others)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert not torch.equal(weights["a"], torch.ones(16, 16))
    assert moment_bytes(toy_distill.student(), weights, chosen) == pytest.approx(slots * 512, rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "admaw"}, "did you mean adamw"),
        ({"kind": "sgd", "betas": (0.8, 0.9)}, "betas is of adamw; with kind: sgd give it as one of the options"),
        ({"kind": "muon", "options": {"momentum": 0.9}}, "those of Muon are given as muon"),
        ({"kind": "lbfgs"}, "unknown optimizer"),
    ],
)
def test_impossible_optimizers_are_refused_by_the_recipe(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sgd", "options": {"momentun": 0.9}}, "SGD does not take momentun; did you mean momentum"),
        ({"kind": "nowhere.Best"}, "nowhere.Best cannot be imported"),
        ({"kind": "torch.nn.Linear"}, "torch.nn.Linear is not a torch.optim.Optimizer"),
        ({"kind": "adam", "options": {"betas": [2, 3]}}, "Adam cannot be used: ValueError: Invalid beta"),
        ({"kind": "test_options.KeepsAList"}, "KeepsAList keeps 'seen', neither a tensor nor a number: a checkpoint cannot hold it"),
    ],
)
def test_optimizers_that_cannot_be_made_are_named_before_training(options, message):
    with pytest.raises(ec.DistillError, match=message):
        check_optimizer(OptimizerConfig(**options))
