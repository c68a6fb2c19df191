"""Muon in recipes: which weights it updates, that it is torch's, and that a run resumes with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edit_compile as ec
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation import distill
from edit_compile.distillation.context import trained_parameters
from edit_compile.distillation.recipe.schema import OptimizerConfig
from edit_compile.distillation.train.optimizer import make_optimizers, moment_bytes, muon_matrices

MUON = {"kind": "muon", "weight_decay": 0.1, "muon": {"momentum": 0.9, "lr_ratio": 2.0}}


class Stop(toy_distill.ToySource):
    concurrent = False

    def batch(self, request):
        if request.split == "train" and request.position == 14:
            raise KeyboardInterrupt
        return super().batch(request)


def run(folder, source=None, resume=False, **options):
    stage = {"resolution": [12, 16], "steps": 6, "global_batch_size": 2, "lr": 3e-3, "warmup_steps": 0}
    layerwise = {"steps": 3, "global_batch_size": 2}
    validation = {"samples": 8, "batch_size": 8, "timestep_bins": 2}
    recipe = toy_distill.recipe(**{"stages": [stage], "layerwise": layerwise, "validation": validation, "save_every": 2} | options)
    source, student, flow = source or toy_distill.ToySource(), toy_distill.student(), NoiseSchedule("rectified-flow")
    return distill(recipe, folder, student=student, source=source, denoise=toy_distill.denoise, schedule=flow, resume=resume)


@pytest.mark.parametrize("train", ["attention", "all"])
def test_a_run_with_muon_learns_and_goes_on_bit_for_bit(tmp_path, train):
    options = {"optimizer": MUON, "train": train}
    whole = run(tmp_path / "whole", **options)
    assert whole.after.total < whole.before.total
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Stop(), **options)
    again = run(tmp_path / "stopped", resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), again.student.parameters(), strict=True))


def test_muon_updates_the_matrices_of_linears_in_the_blocks_and_adamw_the_rest():
    student = toy_distill.student()
    trained = trained_parameters(student, "all")
    matrices = muon_matrices(student, trained)
    linears = {f"{path}.weight" for path, module in student.named_modules() if isinstance(module, nn.Linear)}
    assert set(matrices) == {name for name in linears if name.startswith("blocks.")}
    assert not {"out.weight", "text.weight"} & matrices.keys()
    optimizers = make_optimizers(student, trained, OptimizerConfig.model_validate(MUON))
    muon, adamw = optimizers.optimizers
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for p in matrices.values()}
    assert {id(p) for p in adamw.param_groups[0]["params"]} == {id(p) for name, p in trained.items() if name not in matrices}


def test_a_step_is_torchs_own():
    """Also the learning rate's ratio, and the adjustment to AdamW's size of updates."""
    student = toy_distill.student()
    trained = trained_parameters(student, "attention")
    name = next(iter(muon_matrices(student, trained)))
    before = trained[name].detach().clone()
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    reference = nn.Parameter(before.clone())
    reference.grad = trained[name].grad.clone()
    torch.optim.Muon([reference], lr=2e-3, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    make_optimizers(student, trained, OptimizerConfig.model_validate(MUON)).step(1e-3)
    assert torch.equal(trained[name], reference)
    assert not torch.equal(reference, before)


def test_what_it_keeps_is_counted():
    student = toy_distill.student()
    trained = trained_parameters(student, "all")
    matrices = sum(p.numel() for p in muon_matrices(student, trained).values())
    options = OptimizerConfig(kind="muon")
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizers = make_optimizers(student, trained, options)
    optimizers.step(1e-3)
    kept = sum(value.numel() * 4 for name, value in optimizers.slots(trained).items() if value.numel() > 1 and not name.endswith("/step"))
    single = sum(8 for p in trained.values() if p.numel() == 1)
    assert moment_bytes(student, trained, options) == kept + single
    assert moment_bytes(student, trained, options) == 8 * sum(p.numel() for p in trained.values()) - 4 * matrices


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="muon: its options have no effect with kind: adamw; set kind: muon"):
        toy_distill.recipe(optimizer={"muon": {"momentum": 0.9}})
    with pytest.raises(ValueError, match=r"optimizer.muon.momentum"):
        toy_distill.recipe(optimizer={"kind": "muon", "muon": {"momentum": 1.5}})
    with pytest.raises(ec.DistillError, match=r"optimizer\.kind: muon has nothing to do"):
        run(tmp_path, optimizer={"kind": "muon"}, train="inserted")
