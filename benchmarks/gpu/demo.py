"""A demo at 128 px: a teacher of 30 million parameters by `scripts/train_demo.py`'s recipe, its distillation, and what both draw."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.step import NotDone, Row, Unit, Work, in_ms, short

if TYPE_CHECKING:
    from torch import Tensor, nn

SIDE, LARGER = 128, 256  # pixels, trained and unseen
_MARGIN = 40.0  # seconds to save in
PROMPTS, PICTURES, SAMPLING_STEPS = 200, 6, 25
NAME = "mm-dit-64"  # whose data, text and structure it has
DATA = "shape-groups"
_HEADS, _CHANNELS, _LAYERS = 6, 64, 6
STAGES = ((32, 4_000, 128, 0.0), (64, 3_000, 64, 0.5), (128, 1_500, 32, 1.0))  # side, steps, batch, shift: see `Stage`
_TINY_STAGES = ((8, 3, 2, 0.0), (16, 3, 2, 0.5))
RATE = 1e-3
DISTILLATION: dict[str, Any] = {
    "layerwise": {"resolution": 64, "steps": 400, "global_batch_size": 32, "lr": 0.002},
    "stages": [
        {"resolution": 64, "steps": 600, "global_batch_size": 32, "lr": 0.001, "min_lr_ratio": 0.2},
        {"resolution": 128, "steps": 600, "global_batch_size": 16, "lr": 0.0005},
    ],
    "validation": {"samples": 64, "batch_size": 16, "resolutions": [LARGER]},
    "save_every": 100,
}
_TINY_DISTILLATION: dict[str, Any] = {
    "layerwise": {"resolution": 8, "steps": 2, "global_batch_size": 2, "lr": 0.002},
    "stages": [
        {"resolution": 8, "steps": 2, "global_batch_size": 2, "lr": 0.001},
        {"resolution": 16, "steps": 2, "global_batch_size": 2, "lr": 0.0005},
    ],
    "validation": {"samples": 2, "batch_size": 2, "resolutions": [24], "timestep_bins": 2},
    "save_every": 2,
}


def teacher_units(tiny: bool) -> list[Unit]:
    return [Unit("training", _train_teacher)]


def student_units(tiny: bool) -> list[Unit]:
    return [Unit("distillation", _distil)]


def gallery_units(tiny: bool) -> list[Unit]:
    return [Unit("drawings", _draw), Unit("adherence", _adherence)]


def untrained(tiny: bool) -> Any:
    """Make the teacher: the 64 px demo model's structure, wider."""
    from diffusers import SD3Transformer2DModel

    from edit_compile.demo import models

    heads, layers = (2, 2) if tiny else (_HEADS, _LAYERS)
    config = dict(models.untrained(NAME).config)
    width = heads * _CHANNELS
    config |= {"num_layers": layers, "attention_head_dim": _CHANNELS, "num_attention_heads": heads, "caption_projection_dim": width}
    return SD3Transformer2DModel.from_config(config)


def _train_teacher(work: Work) -> list[Row]:
    """Train as far as the time allows; what was reached is saved."""
    import torch

    from scripts.train_demo import Stage, batch, train

    stages = [Stage(*stage) for stage in (_TINY_STAGES if work.tiny else STAGES)]
    steps, folder, began = sum(stage.steps for stage in stages), _teacher_folder(work), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = untrained(work.tiny)
    workers = 0 if work.tiny else max(1, (os.cpu_count() or 2) - 3)
    options = {"rate": RATE, "device": work.device.type, "workers": workers, "compiled": not work.tiny, "save_every": 500}
    done = train(model, stages, partial(batch, NAME, stages, 0), folder, **options, until=work.until - _MARGIN)
    clock = folder / "seconds.json"
    before = json.loads(clock.read_text()) if clock.exists() else 0.0
    clock.write_text(json.dumps(before + time.monotonic() - began))
    if done < steps:
        raise NotDone(f"{done:,} of {steps:,} steps")
    number = sum(p.numel() for p in model.parameters())
    stages_in_words = ", ".join(f"{stage.steps} steps of {stage.batch} at {stage.side} px" for stage in stages)
    return [
        {
            "model": "teacher",
            "parameters": f"{number / 1e6:.1f} M",
            "stages": stages_in_words,
            "seconds": round(json.loads(clock.read_text())),
        }
    ]


def _teacher_folder(work: Work) -> Path:
    return work.folder / "teacher"


def _student_folder(work: Work) -> Path:
    return work.folder / "student"


def _teacher_path(work: Work) -> str:
    """Return where the trained teacher is.

    Raises:
        FileNotFoundError: it was not trained.
    """
    path = _teacher_folder(work) / "model"
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path}: the step demo-teacher makes it; its checkpoints are in the work folder, which has to be kept")
    return str(path)


def _distil(work: Work) -> list[Row]:
    """Distil, or go on: a signal at the end of the time saves a checkpoint."""
    import shutil

    from edit_compile.distillation import distill, load_recipe
    from edit_compile.errors import Interrupted

    chosen = _TINY_DISTILLATION if work.tiny else DISTILLATION
    losses = {"losses": {"task": 0, "output": 1, "feature": 0.5}}
    changes: list[tuple[str, Any]] = [("model", _teacher_path(work)), ("prediction", "rectified-flow"), ("data", {"kind": DATA})]
    changes += [("precision", "fp32" if work.tiny else "bf16"), ("compile", not work.tiny)]
    changes += [*{**chosen, "stages": [{**stage, **losses} for stage in chosen["stages"]]}.items()]
    changes += [("samples", {"steps": 2 if work.tiny else 16, "count": 2 if work.tiny else 4})]
    began = time.monotonic()
    try:
        result = distill(load_recipe("demo-mm-dit-64", changes), _student_folder(work), resume=True)
    except Interrupted as reason:
        raise NotDone(str(reason)) from reason
    folder = _student_folder(work)
    for source, name in (("losses.png", "demo-losses.png"), ("report.html", "demo-report.html")):
        if (folder / source).exists():
            shutil.copyfile(folder / source, work.out / name)
    before, after = result.before, result.after
    rows: list[Row] = [{"model": "student", "seconds": round(result.seconds), "this run": round(time.monotonic() - began)}]
    rows[0] |= {"error before": short(before.total), "after": short(after.total)}
    for speed in result.speeds:
        times = {
            "teacher ms": in_ms(speed.teacher),
            "student ms": in_ms(speed.student),
            "ratio": short(speed.teacher / speed.student),
        }
        rows.append({"px": speed.size, **times})
    return rows


def _models(work: Work) -> dict[str, Any]:
    """Load teacher, untrained student and student."""
    from edit_compile import linearize, load
    from edit_compile.adapters.load_model import load_model
    from edit_compile.config import LinearizeConfig

    teacher = load_model(_teacher_path(work)).model.to(work.device)
    untrained_student = linearize(teacher, LinearizeConfig(reduction=4))
    return {"teacher": teacher, "untrained": untrained_student, "student": load(_student_folder(work)).to(work.device)}


def _draw(work: Work) -> list[Row]:
    """Draw held-out captions at the trained size and at an unseen one."""
    from edit_compile.demo import groups
    from edit_compile.demo.prompt_adherence import held_out_groups
    from edit_compile.report.image_grid import image_grid, save_image

    captions = [groups.caption(scene) for scene in held_out_groups(2 if work.tiny else PICTURES)]
    models, rows = work.kept_as("models", partial(_models, work)), []
    for side in (16, 24) if work.tiny else (SIDE, LARGER):
        columns = [(name, list(_sampled(model, captions, side, work).permute(0, 2, 3, 1).numpy())) for name, model in models.items()]
        file = work.out / f"demo-gallery-{side}.png"
        save_image(image_grid(captions, columns), file)
        rows.append({"px": side, "gallery": file.name})
    return rows


def _adherence(work: Work) -> list[Row]:
    """Check what is drawn, at half the size: the checker reads images of 64 px."""
    import torch.nn.functional as F

    from edit_compile.demo import models as demo
    from edit_compile.demo.prompt_adherence import held_out

    asked = held_out(demo.GROUPS, 2 if work.tiny else PROMPTS)
    rows = []
    for name, model in work.kept_as("models", partial(_models, work)).items():
        side = 16 if work.tiny else SIDE
        drawn = _sampled(model, asked.captions, side, work)
        found = asked.check(F.interpolate(drawn, (demo.GROUPS.side, demo.GROUPS.side), mode="area"))
        rows.append({"model": name, "px": side, **{what: round(value, 4) for what, value in found.to_dict().items()}})
    return rows


def _sampled(model: nn.Module, captions: Any, side: int, work: Work) -> Tensor:
    """Sample in batches that fit, always from the same noise."""
    import torch

    from edit_compile.demo import models as demo

    size, parts = max(1, 50 * SIDE**2 // side**2), list[Any]()
    torch.set_float32_matmul_precision("high")
    for start in range(0, len(captions), size):
        with torch.autocast(work.device.type, torch.bfloat16, enabled=not work.tiny):
            options = {"seed": start, "steps": 2 if work.tiny else SAMPLING_STEPS, "height": side, "width": side}
            parts.append(demo.sample(model, list(captions[start : start + size]), **options))
    return torch.cat(parts).float()
