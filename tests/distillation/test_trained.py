"""What a recipe trains beside the sites: LoRA of other Linears, and the blocks that hold sites."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import edit_compile as ec
import toy
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation import distill
from edit_compile.distillation.context import trained_parameters
from edit_compile.distillation.train import distributed
from edit_compile.student.handle import conversion_of

STAGE = {"resolution": [12, 16], "steps": 6, "global_batch_size": 2, "lr": 3e-3, "warmup_steps": 0}
LORA = {"rank": 2, "alpha": 4, "targets": ["blocks.*.ff.*", "out"]}
ADAPTED = {"blocks.0.ff.0", "blocks.0.ff.2", "blocks.1.ff.0", "blocks.1.ff.2", "out"}


class Stop(toy_distill.ToySource):
    """Stops the run at a position of the stream."""

    concurrent = False

    def batch(self, request):
        if request.split == "train" and request.position == 14:
            raise KeyboardInterrupt
        return super().batch(request)


def run(folder, model=None, source=None, resume=False, **options):
    validation = {"samples": 8, "batch_size": 8, "timestep_bins": 2}
    layerwise = {"steps": 3, "global_batch_size": 2}
    common = {"stages": [STAGE], "layerwise": layerwise, "validation": validation, "save_every": 2}
    recipe = toy_distill.recipe(**common | options)
    source, student = source or toy_distill.ToySource(), model or toy_distill.student()
    flow = NoiseSchedule("rectified-flow")
    return distill(recipe, folder, student=student, source=source, denoise=toy_distill.denoise, schedule=flow, resume=resume)


@torch.no_grad()
def output(model):
    return model(**toy.inputs(2, 12, 16, toy_distill.TEXT))


@torch.no_grad()
def teacher_output(model):
    with ec.teacher(model):
        return output(model)


KINDS = {
    "lora": {"train": "lora", "lora": LORA},
    "merged": {"train": "lora", "lora": LORA | {"merge": True}},
    "blocks": {"train": "blocks"},
}


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, run(folder, **KINDS[request.param])


def test_it_learns_and_the_teacher_stays_the_original(finished):
    _, _, result = finished
    assert result.after.total < result.before.total
    assert torch.equal(teacher_output(result.student), output(toy_distill.base()))


def test_the_folder_is_loaded_as_it_was_trained_and_saved_again(finished, tmp_path):
    _, folder, result = finished
    loaded = ec.load(folder, toy_distill.base())
    torch.testing.assert_close(output(loaded), output(result.student), rtol=0, atol=0)
    assert torch.equal(teacher_output(loaded), output(toy_distill.base()))
    ec.save(loaded, tmp_path)
    assert torch.equal(output(ec.load(tmp_path, toy_distill.base())), output(loaded))


def test_the_base_is_not_touched(tmp_path):
    for kind, options in KINDS.items():
        base = toy_distill.base()
        student = ec.linearize(base, example_inputs=toy.inputs(text=toy_distill.TEXT)) if kind == "lora" else toy_distill.student()
        before = copy.deepcopy(base.state_dict())
        run(tmp_path / kind, student, layerwise=None, **options)
        assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path):
    kind, _, whole = finished
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=Stop(), **KINDS[kind])
    resumed = run(tmp_path, resume=True, **KINDS[kind])
    expected = whole.student.state_dict()
    assert expected.keys() == resumed.student.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.student.state_dict().items())


def test_only_what_was_asked_for_is_trained(finished):
    kind, _, result = finished
    base, found = toy_distill.base().state_dict(), result.student.state_dict()
    changed = {name for name, value in found.items() if name in base and ".attn." not in name and not torch.equal(value, base[name])}
    weights = {f"{path}.weight" for path in ADAPTED}
    of_blocks = {name for name in base if name.startswith("blocks.") and ".attn." not in name}
    assert changed == {"lora": set(), "merged": weights, "blocks": of_blocks}[kind]


def test_kept_adapters_are_read_by_peft_and_diffusers(tmp_path):
    from peft import PeftModel

    result = run(tmp_path, **KINDS["lora"])
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in written} == ADAPTED
    converted = ec.load(tmp_path, toy_distill.base())
    plain = toy_distill.student()
    sites = {name: value for name, value in converted.state_dict().items() if ".attn." in name}
    plain.load_state_dict(sites, strict=False)
    assert not torch.equal(output(plain), output(result.student))
    adapted = PeftModel.from_pretrained(plain, tmp_path / "lora")
    torch.testing.assert_close(output(adapted), output(result.student), rtol=1e-5, atol=1e-6)


def test_merging_kept_adapters_later_gives_the_same_model(tmp_path):
    run(tmp_path / "kept", **KINDS["lora"])
    student = ec.load(tmp_path / "kept", toy_distill.base())
    before, teacher = output(student), teacher_output(student)
    assert set(ec.merge_lora(student)) == {f"{path}.weight" for path in ADAPTED}
    torch.testing.assert_close(output(student), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(teacher_output(student), teacher)
    ec.save(student, tmp_path / "kept")
    assert not (tmp_path / "kept" / "lora" / "adapter_model.safetensors").exists()
    assert torch.equal(output(ec.load(tmp_path / "kept", toy_distill.base())), output(student))
    with pytest.raises(ec.EditCompileError, match="has no LoRA to merge"):
        ec.merge_lora(student)
    merged = output(student)
    assert ec.add_lora(student, 2, targets=["out"]) == ["out"]
    assert torch.equal(output(student), merged)
    with pytest.raises(ec.EditCompileError, match="has LoRA already"):
        ec.add_lora(student, 2)
    ec.save(student, tmp_path / "again")
    assert torch.equal(output(ec.load(tmp_path / "again", toy_distill.base())), merged)
    assert torch.equal(teacher_output(student), teacher)


def test_a_run_goes_on_with_adapters_of_an_earlier_one(tmp_path):
    run(tmp_path / "first", **KINDS["lora"])
    first = output(ec.load(tmp_path / "first", toy_distill.base()))
    result = run(tmp_path / "second", ec.load(tmp_path / "first", toy_distill.base()), layerwise=None, **KINDS["lora"])
    assert not torch.equal(output(result.student), first)
    with pytest.raises(ec.DistillError, match="the student has LoRA of rank 2 and alpha 4 already: ask for the same"):
        run(tmp_path / "third", ec.load(tmp_path / "first", toy_distill.base()), train="lora", lora={"rank": 3})


def test_half_precision_trains_adapters_and_blocks_in_float32(tmp_path):
    for kind, options in KINDS.items():
        model = toy_distill.student()
        result = run(tmp_path / kind, model, precision="bf16", ema_decay=None, **options)
        trained = {"lora": (".attn.", ".lora_"), "merged": (".attn.",), "blocks": ("blocks.",)}[kind]
        for name, parameter in result.student.named_parameters():
            merged = kind == "merged" and name.removesuffix(".weight") in ADAPTED
            expected = torch.float32 if merged or any(part in name for part in trained) else torch.bfloat16
            assert parameter.dtype is expected, (kind, name)
        assert all(value.dtype is torch.float32 for name, value in ec.load(tmp_path / kind, toy_distill.base()).state_dict().items())


def test_recomputed_blocks_learn_the_same(finished, tmp_path):
    kind, folder, _ = finished
    run(tmp_path, gradient_checkpointing=True, **KINDS[kind])
    losses = [[json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (folder, tmp_path)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_teacher_of_blocks_copies_only_their_weights():
    from edit_compile.distillation.models import unshare_blocks
    from edit_compile.student.weights import separate_teacher

    student = toy_distill.student()
    teacher = separate_teacher(student)
    unshare_blocks(student)
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    own = {name for name, p in student.named_parameters() if id(p) not in shared}
    assert own == {name for name, _ in student.named_parameters() if name.startswith("blocks.") and ".attn." not in name}
    assert conversion_of(teacher).originals == {}
    assert set(trained_parameters(student, "blocks")) == {name for name, _ in student.named_parameters() if name.startswith("blocks.")}


def test_glob_that_matches_nothing_and_missing_peft_are_named(tmp_path, monkeypatch):
    with pytest.raises(ec.ConfigError, match=r"lora.targets: 'blocks.\*.mlp' matches no Linear outside the converted sites; there are: "):
        run(tmp_path, train="lora", lora={"targets": ["blocks.*.mlp"]})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ec.EditCompileError, match=r"distill needs peft: pip install 'edit_compile\[distill\]'"):
        run(tmp_path, train="lora")
    with pytest.raises(ec.EditCompileError, match=r"LoRA needs peft: pip install 'edit_compile\[lora\]'"):
        ec.add_lora(toy_distill.student(), rank=2)


def test_options_without_effect_are_refused():
    with pytest.raises(ValueError, match="lora: its options have no effect with train: blocks"):
        toy_distill.recipe(train="blocks", lora={"rank": 2})


def test_merging_is_refused_where_weights_are_sharded():
    class Sharded:
        distributed_type = type("Kind", (), {"value": "FSDP"})
        is_fsdp2 = True

    for options, reason in (
        ({"train": "lora", "lora": {"merge": True}}, "lora.merge: true does not support FSDP"),
        ({"optimizer": {"kind": "muon"}}, "optimizer.kind: muon does not support FSDP: choose adamw, or launch with DDP"),
    ):
        with pytest.raises(ec.DistillError, match=reason):
            distributed._check_kind(Sharded(), toy_distill.recipe(**options))
