"""`edit-compile sample` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edit_compile.cli.command import Command, print_json, print_table, say
from edit_compile.cli.parameters import Names, Size, check_folder, converted_model_argument, dtype_option
from edit_compile.errors import ConfigError
from edit_compile.extras import need
from edit_compile.progress import working
from edit_compile.words import counted

_BASE = "the base pipeline: hub id or folder; default: as the checkpoint says"


@click.command(
    cls=Command,
    examples="""sample distilled --prompt "a lighthouse" -o grid.png
sample distilled --prompt "a mill" --steps 28 -o grid.webp
sample sd3.5-medium --prompt "a mill" -o grid.jpg""",
)
@converted_model_argument
@click.option("--prompt", "prompts", multiple=True, required=True, help="what the images show; repeatable, a row for each")
@click.option("--height", type=click.IntRange(min=1), help="in pixels; default: the model's")
@click.option("--width", type=click.IntRange(min=1), help="in pixels; default: the model's")
@click.option("--steps", type=click.IntRange(min=1), help="sampling steps; default: the pipeline's")
@click.option("--guidance", type=float, help="classifier-free guidance scale; default: the pipeline's")
@click.option("--seed", type=int, default=0, show_default=True, help="of the first image; each further row has the next one")
@click.option("--base", help=_BASE)
@dtype_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="the PNG, JPEG, WebP or GIF file to write; videos move in a GIF"
)
def sample(model: str, prompts: tuple[str, ...], base: str | None, output: Path, as_json: bool, **options: Any) -> None:
    """Sample from teacher and student with the same noise and show their images or videos side by side.

    MODEL is a checkpoint, or demo/NAME for the samples of a demo model alone.
    """
    from edit_compile.report.image_grid import image_format

    image_format(output)
    check_folder(output.parent)
    with working("importing PyTorch"):
        from edit_compile.report.compare_samples import sample as sample_both
    made = sample_both(model, prompts, base=base, **options)
    made.save(output)
    if as_json:
        print_json({"output": str(output), "prompts": prompts, "student": bool(made.student), **options})
    who = "teacher and student" if made.student else model
    say(f"{who} for {counted(len(prompts), 'prompt')}, saved to {output}")


@click.command(
    cls=Command,
    examples="""evaluate distilled --prompts prompts.txt
evaluate distilled --prompts prompts.txt --metrics lpips
evaluate distilled --prompts prompts.txt --samples 200 --json""",
)
@converted_model_argument
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="a text file with a prompt a line")
@click.option("--images", type=click.Path(path_type=Path), help="a folder of real images for the FIDs; default: the teacher's images")
@click.option(
    "--metrics",
    type=Names(),
    default=(),
    metavar="NAMES",
    help="of clip-score, fid-inception, fid-clip and lpips, with commas; default: all",
)
@click.option("--samples", type=click.IntRange(min=1), help="images by teacher and student each; default: one a prompt")
@click.option("--size", type=Size(), help="PX or HEIGHTxWIDTH; default: the model's")
@click.option("--steps", type=click.IntRange(min=1), help="sampling steps; default: the pipeline's")
@click.option("--guidance", type=float, help="classifier-free guidance scale; default: the pipeline's")
@click.option("--seed", type=int, default=0, show_default=True, help="of the first image")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="images sampled and judged at once")
@click.option("--device", help="of the pipeline and the networks that judge; default: cuda, if there is any")
@click.option("--clip", "clip_name", metavar="MODEL", help="a CLIP model: hub id or folder; default: openai/clip-vit-large-patch14")
@click.option("--base", help=_BASE)
@dtype_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file; images go beside it; default: evaluation.json in MODEL")
def evaluate(
    model: str,
    prompts: Path,
    images: Path | None,
    metrics: tuple[str, ...],
    size: tuple[int, ...] | None,
    clip_name: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Sample from teacher and student for many prompts and judge the images: CLIP score, FIDs, LPIPS. Resumes if interrupted.

    MODEL is the folder of a converted model, of its pipeline, or of a finished run.
    """
    need("eval", "edit-compile evaluate", "torchmetrics")
    if size is not None and len(size) != 2:
        raise click.UsageError("--size: PX or HEIGHTxWIDTH; only images are evaluated")
    if not prompts.exists():
        raise ConfigError(f"--prompts {prompts}: there is no such file")
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: there is no such folder")
    with working("importing PyTorch"):
        from edit_compile.evaluation.run import evaluate as run
        from edit_compile.report.evaluation_table import evaluation_table
    height, width = size or (None, None)
    found = run(model, prompts, images=images, metrics=metrics, height=height, width=width, clip_name=clip_name, **options).to_dict()
    if as_json:
        print_json(found)
    else:
        print_table(evaluation_table(found))
