"""The command line: `edit-compile inspect`, `convert`, `sample` and `distill`."""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from edit_compile.config import LinearizeConfig
from edit_compile.designs import design_names
from edit_compile.errors import EditCompileError, Interrupted

UNTRAINED = "The pictures of a converted model are wrong until it is distilled."


def _choices(option: str) -> click.Choice[Any]:
    return click.Choice(list(LinearizeConfig.model_fields[option].annotation.__args__))  # type: ignore[union-attr]


class _Size(click.ParamType):
    """`1024`, a square, or `HEIGHTxWIDTH`, in pixels."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        numbers = str(value).lower().split("x")
        if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
            self.fail(f"{value!r} is neither PX nor HEIGHTxWIDTH", param, ctx)
        return int(numbers[0]), int(numbers[-1])


def _conversion_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make a LinearizeConfig, with its defaults."""
    default = LinearizeConfig()
    options = [
        click.option("--model", required=True, help="hub id, folder, config.json, demo/NAME, arch/NAME or timm/NAME"),
        click.option("--design", type=click.Choice(["auto", *design_names()]), default=default.design, show_default=True),
        click.option("--reduction", type=click.IntRange(min=1), default=default.reduction, show_default=True),
        click.option("--eta", type=_choices("eta"), default=default.eta, show_default=True),
        click.option("--text-keys", type=_choices("text_keys"), default=default.text_keys, show_default=True),
        click.option("--include", multiple=True, default=default.include, help="glob over module paths; repeatable"),
        click.option("--exclude", multiple=True, help="glob over module paths; repeatable"),
        click.option("--json", "as_json", is_flag=True, help="print JSON on stdout and nothing else"),
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


_dtype_option = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True, help="type to load weights in"
)


def _errors_in_one_line(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except EditCompileError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)

    return wrapped


@click.group()
@click.version_option(package_name="edit_compile")
def main() -> None:
    """Compile the softmax attention of diffusion transformers to linear compressed attention."""


@main.command()
@_conversion_options
@click.option("--size", "sizes", multiple=True, type=_Size(), help="PX or HEIGHTxWIDTH to count FLOPs at; repeatable; default: usual ones")
@click.option("--text", type=click.IntRange(min=1), help="number of text tokens to count with; default: the pipeline's")
@_errors_in_one_line
def inspect(model: str, as_json: bool, sizes: tuple[tuple[int, int], ...], text: int | None, **options: Any) -> None:
    """Show what would be done to a model, site by site, and why; what it adds and saves. Needs no weights."""
    from edit_compile.adapters.load_model import load_model
    from edit_compile.api import plan_and_convert
    from edit_compile.bench import conversion_cost
    from edit_compile.report.tables import cost_summary, cost_table

    loaded = load_model(model, structure_only=True)
    plan, student = plan_and_convert(loaded.model, LinearizeConfig(**options))
    costs = conversion_cost(student, sizes or None, text=text) if student is not None else None
    _show(plan, as_json, {"source": loaded.source, "cost": costs and cost_summary(costs)})
    if costs and not as_json:
        _console().print(cost_table(costs))


@main.command()
@_conversion_options
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="folder for the checkpoint")
@_dtype_option
@_errors_in_one_line
def convert(model: str, output: Path, dtype: str, as_json: bool, **options: Any) -> None:
    """Convert a model and save the checkpoint: what was added, and the plan."""
    import torch

    from edit_compile.adapters.load_model import load_model
    from edit_compile.api import linearize, plan_of
    from edit_compile.student.checkpoint import save

    config = LinearizeConfig(**options)
    loaded = load_model(model, dtype=getattr(torch, dtype))
    if not loaded.has_weights:
        raise EditCompileError(f"{model} is structure only, without weights to convert; `edit-compile inspect` shows its plan")
    student = linearize(loaded.model, config)
    save(student, output, base=loaded.pipeline or loaded.source)
    added = sum(p.numel() for name, p in student.named_parameters() if ".edit." in name)
    _show(plan_of(student), as_json, {"source": loaded.source, "output": str(output), "parameters_added": added})
    click.echo(f"{added:,} parameters added, saved to {output}. {UNTRAINED}", err=True)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, help="what to draw; repeatable, a row each")
@click.option("--height", type=click.IntRange(min=1), help="in pixels; default: the model's")
@click.option("--width", type=click.IntRange(min=1), help="in pixels; default: the model's")
@click.option("--steps", type=click.IntRange(min=1), help="of the sampler; default: the pipeline's")
@click.option("--guidance", type=float, help="classifier-free guidance; default: the pipeline's")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--base", help="the base pipeline: hub id or folder; default: as the checkpoint says")
@_dtype_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="the PNG to write")
@_errors_in_one_line
def sample(folder: Path, prompts: tuple[str, ...], base: str | None, output: Path, **options: Any) -> None:
    """Draw with teacher and student, side by side, from the same noise."""
    from edit_compile.report.compare_samples import SampleOptions, side_by_side
    from edit_compile.report.image_grid import picture_grid, save_png

    pairs = side_by_side(folder, prompts, SampleOptions(**options), base)
    originals, students = zip(*pairs, strict=True)
    save_png(picture_grid(prompts, [("teacher", originals), ("student", students)]), output)
    click.echo(f"{len(pairs)} prompts, teacher | student, in {output}", err=True)


@main.command()
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change the recipe, such as stage.0.steps=500; repeatable")
@click.option("--dry-run", is_flag=True, help="print the recipe, the plan, and each phase's FLOPs, memory and time; stop")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder for the student; default: runs/ and the recipe's name")
@click.option("--push-to-hub", metavar="REPO", help="upload the finished folder to this repository of the hub")
@click.option("--resume", is_flag=True, help="continue what the folder holds, bit for bit; start if it holds nothing")
@click.option("--json", "as_json", is_flag=True, help="print JSON on stdout and nothing else")
@_errors_in_one_line
def distill(
    recipe: str, overrides: tuple[str, ...], dry_run: bool, output: Path | None, push_to_hub: str | None, resume: bool, as_json: bool
) -> None:
    """Convert a model and train it to do what its teacher does. RECIPE: a YAML file, or the name of a shipped recipe."""
    from edit_compile.distillation.console import print_result, print_trial, showing
    from edit_compile.distillation.dry_run import trial
    from edit_compile.distillation.output.hub import push_to_hub as push
    from edit_compile.distillation.recipe.load import load_recipe
    from edit_compile.distillation.run import distill as run

    resolved = load_recipe(recipe, overrides)
    if dry_run:
        print_trial(trial(resolved), as_json)
        return
    folder = output or Path("runs") / Path(recipe).stem
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, which all run this
    try:
        with showing(resolved, quiet=as_json or not speaks) as report:
            result = run(resolved, folder, resume=resume, report=report)
    except Interrupted as stopped:
        changes = [part for override in overrides for part in ("--set", override)]
        command = shlex.join(["edit-compile", "distill", recipe, *changes, "-o", str(folder), "--resume"])
        if speaks:
            click.echo(f"{stopped}. To continue: {command}", err=True)
        return
    if not speaks:
        return
    print_result(result, as_json)
    if push_to_hub is not None:
        click.echo(f"uploaded to {push(folder, push_to_hub)}", err=True)


@main.command()
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change the recipe, such as data.path=pictures; repeatable")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="folder for the cache")
@click.option("--samples", type=click.IntRange(min=1), help="at most so many; default: all")
@click.option("--shard-size", type=click.IntRange(min=1), default=128, show_default=True, help="samples of a file")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="samples encoded or drawn at a time")
@click.option("--verify", is_flag=True, help="read all of a finished cache and compare the checksums")
@click.option("--json", "as_json", is_flag=True, help="print JSON on stdout and nothing else")
@_errors_in_one_line
def cache(recipe: str, overrides: tuple[str, ...], output: Path, verify: bool, as_json: bool, **options: Any) -> None:
    """Encode a recipe's data once: latents, and text embeddings. Killed, it goes on where it was. RECIPE: as for `distill`."""
    from edit_compile.distillation.make_cache import make_cache, verify_cache
    from edit_compile.distillation.recipe.load import load_recipe

    def progress(written: int, skipped: int) -> None:
        click.echo(f"{written:,} samples written, {skipped:,} skipped", err=True)

    resolved = load_recipe(recipe, overrides)
    made = verify_cache(output, resolved) if verify else make_cache(resolved, output, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(made.to_dict(), indent=2))
    else:
        size, resolutions = f"{made.bytes / 2**20:,.1f} MiB", ", ".join(made.resolutions)
        click.echo(f"{made.samples:,} samples at {resolutions} px in {made.shards:,} shards, {size}, in {output}")
    for what, names in (("skipped", made.skipped), ("damaged", made.damaged)):
        for name, reason in names.items():
            click.echo(f"{what} {name}: {reason}", err=True)
    if made.damaged:
        raise EditCompileError(f"{len(made.damaged)} of {made.samples} samples in {output} are damaged; training passes them over")


def _show(plan: Any, as_json: bool, more: dict[str, Any]) -> None:
    from edit_compile.report.tables import PlanTable, plan_summary

    if as_json:
        click.echo(json.dumps({**more, **plan_summary(plan)}, indent=2))
    else:
        _console().print(PlanTable(plan))


def _console() -> Console:
    """As wide as the terminal, or as $COLUMNS; wide where output goes to a file."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


if __name__ == "__main__":
    main()
