"""`make demo`: inspect, convert and distill demo/mm-dit, then draw, measure and compare. Minutes on two CPU cores, no downloads."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import edit_compile as ec
from edit_compile.adapters.load_model import load_model
from edit_compile.cli import main as command_line
from edit_compile.demo import models, motion, shapes
from edit_compile.demo.prompt_adherence import held_out_clips, held_out_scenes, prompt_adherence
from edit_compile.report.image_grid import image_grid, save_image
from edit_compile.report.tables import speed_table

MODEL = "demo/mm-dit"
SHORTER = ("--set", "layerwise.steps=400", "--set", "stages.0.steps=600")  # the whole recipe takes ten minutes by itself
PICTURES, PROMPTS = 6, 60
SIDES = (32, 64, 128)  # pixels: 256, 1,024 and 4,096 image tokens

console = Console()


def run(*arguments: str) -> None:
    """Show a command, and run it as a user would."""
    console.print(f"\n[bold]$ edit-compile {' '.join(arguments)}[/]")
    command_line(list(arguments), standalone_mode=False)


def denoising_inputs(model: nn.Module, height: int, width: int) -> dict[str, Any]:
    """Return the arguments of one denoising step of an image of height x width pixels."""
    condition = models.conditions(model, [shapes.caption(held_out_scenes(1)[0])])
    return {"hidden_states": torch.randn(1, 3, height, width), "timestep": torch.full((1,), 500.0), "return_dict": False, **condition}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    out = parser.parse_args().out
    run("inspect", "--model", MODEL)
    run("convert", "--model", MODEL, "-o", str(out / "converted"), "--overwrite")
    run("distill", "demo-mm-dit", *SHORTER, "-o", str(out / "distilled"), "--overwrite")
    run("sample", f"demo/{models.VIDEO_NAME}", "--prompt", motion.caption(held_out_clips(1)[0]), "-o", str(out / "video.gif"))

    teacher = load_model(MODEL).model
    columns = {"teacher": teacher, "untrained": ec.load(out / "converted"), "distilled": ec.load(out / "distilled")}
    captions = [shapes.caption(scene) for scene in held_out_scenes(PICTURES)]
    drawn = [(name, list(models.sample(model, captions).permute(0, 2, 3, 1).numpy())) for name, model in columns.items()]
    save_image(image_grid(captions, drawn), out / "grid.png")

    errors = json.loads((out / "distilled" / "result.json").read_text())["held_out_error"]
    found = {name: prompt_adherence(model, PROMPTS) for name, model in columns.items()}
    table = Table(title=f"Validation error, and objects drawn as described in {PROMPTS} held-out captions", title_justify="left")
    for heading in ("model", "relative output error", "colour and position", "shape"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    relative = {"teacher": 0.0, "untrained": errors["before"]["total"], "distilled": errors["after"]["total"]}
    for name, share in found.items():
        table.add_row(name, f"{relative[name]:.4f}", f"{share.colour_and_place:.1%}", f"{share.shape:.1%}")
    console.print(table)
    student = columns["distilled"]
    speed = ec.compare_speed(student, [(side, side) for side in SIDES], inputs_for=functools.partial(denoising_inputs, student))
    console.print(speed_table(speed))
    console.print(f"Images: {out / 'grid.png'}, {out / 'video.gif'}. Distilled model: edit_compile.load('{out / 'distilled'}')")


if __name__ == "__main__":
    main()
