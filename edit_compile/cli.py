"""The command line: `edit-compile inspect`, `convert`, `rank`, `distill`, `sample` and `cache`.

Imports nothing heavy until a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edit_compile.errors import CheckpointError, ConfigError, EditCompileError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console

    from edit_compile.config import LinearizeConfig
    from edit_compile.ir.plan import Plan

UNTRAINED = "The output of a converted model is unusable until it is distilled."
BUDGETS = "all, best N, flops <= 0.5x, time <= 0.7x or error <= 0.01"
STOPPED = 130  # exit status of a run that was interrupted, as shells give it


class _Size(click.ParamType):  # type: ignore[type-arg]
    """`1024`, a square, or `HEIGHTxWIDTH`, in pixels; of videos `FRAMESxHEIGHTxWIDTH`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        numbers = str(value).lower().split("x")
        if len(numbers) > 3 or not all(number.isdecimal() and int(number) for number in numbers):
            self.fail(f"{value!r} is neither PX nor HEIGHTxWIDTH nor, of videos, FRAMESxHEIGHTxWIDTH", param, ctx)
        return tuple(map(int, numbers * 2 if len(numbers) == 1 else numbers))


class _DesignOption(click.Option):
    """`--design`, whose help names the designs that are registered when it is shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from edit_compile.designs import design_names

        self.help = f"auto, or one of: {', '.join(design_names())}"
        return super().get_help_record(ctx)


def _conversion_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the model's name and the options of a conversion; call the command with `model`, `config` and `example_inputs`."""

    @functools.wraps(command)
    def wrapped(
        model: str | None,
        model_option: str | None,
        design: str,
        settings: tuple[str, ...],
        include: tuple[str, ...],
        exclude: tuple[str, ...],
        inputs_file: Path | None,
        ranking: Path | None,
        sites: str | None,
        **options: Any,
    ) -> Any:
        if (model is None) == (model_option is None):
            raise click.UsageError("give one model, as MODEL or as --model MODEL")
        given = {**({"design": design} if design != "auto" else {}), **({"include": include} if include else {})}
        chosen = {"ranking": ranking, "sites": sites}
        config = _config(
            **given,
            **_settings(settings),
            **({"exclude": exclude} if exclude else {}),
            **{k: v for k, v in chosen.items() if v is not None},
        )
        return command(model=model or model_option, config=config, example_inputs=_example_inputs(inputs_file), **options)

    options = [
        click.argument("model", required=False),
        click.option("--model", "model_option", metavar="MODEL", help="hub id, folder, config.json, demo/NAME, arch/NAME or timm/NAME"),
        click.option("--design", cls=_DesignOption, metavar="NAME", default="auto", show_default=True),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="an option of the designs, as in YAML; repeatable"),
        click.option("--include", multiple=True, help="glob over module paths; repeatable; default: *"),
        click.option("--exclude", multiple=True, help="glob over module paths; repeatable"),
        click.option(
            "--example-inputs",
            "inputs_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="YAML with the arguments of one forward, x: {shape: [2, 4, 12, 20]}; pipelines and known models need none",
        ),
        click.option(
            "--ranking", type=click.Path(path_type=Path), metavar="FILE", help="convert the sites that a ranking chooses; see `rank`"
        ),
        click.option("--sites", metavar="BUDGET", help=f"which of them: {BUDGETS}; default: all"),
        click.option("--json", "as_json", is_flag=True, help="print JSON on stdout and nothing else"),
    ]
    return functools.reduce(lambda inner, option: option(inner), reversed(options), wrapped)


def _example_inputs(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    from edit_compile.adapters.input_file import read_example_inputs

    return read_example_inputs(file)


def _settings(settings: tuple[str, ...]) -> dict[str, Any]:
    import yaml

    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {setting!r}: write KEY=VALUE")
        if name in ("design", "include", "exclude", "ranking", "sites"):
            raise ConfigError(f"--set {setting}: this is the option --{name}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    return found


def _config(**options: Any) -> LinearizeConfig:
    from edit_compile.config import LinearizeConfig

    if "ranking" not in options and "sites" not in options:
        return LinearizeConfig(**options)
    from edit_compile.distillation.ranking.ranking import resolve_ranking

    return resolve_ranking(options)


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
@click.option("--import", "modules", multiple=True, metavar="MODULE", help="import a module or .py file that registers designs; repeatable")
@_errors_in_one_line
def main(modules: tuple[str, ...]) -> None:
    """Compile the softmax attention of diffusion transformers to linear compressed attention."""
    for name in modules:
        _import(name)


def _import(name: str) -> None:
    """Import a module, or a file under its own name, once.

    Raises:
        ConfigError: it cannot be imported.
    """
    path = Path(name)
    try:
        if path.suffix != ".py":
            importlib.import_module(name)
        elif getattr(sys.modules.get(path.stem), "__file__", None) != str(path.resolve()):
            spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
            assert spec is not None
            assert spec.loader is not None
            sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--import {name}: {type(error).__name__}: {error}") from error


@main.command()
@_errors_in_one_line
@_conversion_options
@click.option("--size", "sizes", multiple=True, type=_Size(), help="PX or [FRAMESx]HEIGHTxWIDTH to count FLOPs at; repeatable")
@click.option("--text", type=click.IntRange(min=1), help="number of text tokens to count with; default: the pipeline's")
def inspect(
    model: str,
    config: LinearizeConfig,
    example_inputs: dict[str, Any] | None,
    as_json: bool,
    sizes: tuple[tuple[int, ...], ...],
    text: int | None,
) -> None:
    """Show what would be done to a model, site by site, and why; what it adds and saves. Needs no weights."""
    from edit_compile.adapters.family import lookup_family
    from edit_compile.adapters.load_model import load_model
    from edit_compile.api import plan_and_convert
    from edit_compile.bench import cost
    from edit_compile.report.tables import cost_summary, cost_table

    loaded = load_model(model, structure_only=True)
    plan, student = plan_and_convert(loaded, config, example_inputs)
    priced = lookup_family(loaded.model) is not None or loaded.pipeline is not None
    costs = cost(student, sizes or None, text=text, pipeline=loaded.pipeline) if student is not None and priced else None
    _show(plan, as_json, {"source": loaded.source, "cost": costs and cost_summary(costs)})
    if costs and not as_json:
        _console().print(cost_table(costs))
    if sizes and not priced:
        click.echo("FLOPs are counted only of known models and pipelines: no adapter makes this model's inputs at another size", err=True)


@main.command()
@_errors_in_one_line
@_conversion_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder for the checkpoint; default: converted/ and the model's name")
@click.option("--overwrite", is_flag=True, help="replace the checkpoint that the folder holds")
@_dtype_option
def convert(
    model: str,
    config: LinearizeConfig,
    example_inputs: dict[str, Any] | None,
    output: Path | None,
    overwrite: bool,
    dtype: str,
    as_json: bool,
) -> None:
    """Convert a model and save the checkpoint: the plan, and the weights that were added."""
    output = output or Path("converted") / Path(model).resolve().name
    _check_folder(output)
    if not overwrite and (output / "edit_compile.json").exists():
        raise CheckpointError(f"{output} holds a checkpoint already; choose another folder with -o, or replace it with --overwrite")
    import torch

    import edit_compile as ec
    from edit_compile.bench.conversion_cost import added_parameters

    loaded = ec.load_model(model, dtype=getattr(torch, dtype))
    if not loaded.has_weights:
        raise EditCompileError(f"{model} is structure only, without weights to convert; `edit-compile inspect` shows its plan")
    student = ec.linearize(loaded, config, example_inputs)
    ec.save(student, output, base=loaded.pipeline or loaded.source)
    added = added_parameters(student)
    _show(ec.plan_of(student), as_json, {"source": loaded.source, "output": str(output), "parameters_added": added})
    click.echo(f"{added:,} parameters added, saved to {output}. {UNTRAINED}", err=True)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, before anything is loaded. What is made to find out is removed again.

    Raises:
        CheckpointError: it is a file, or cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder; choose another with -o")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}; choose another folder with -o") from None
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, help="what the images show; repeatable, a row for each")
@click.option("--height", type=click.IntRange(min=1), help="in pixels; default: the model's")
@click.option("--width", type=click.IntRange(min=1), help="in pixels; default: the model's")
@click.option("--steps", type=click.IntRange(min=1), help="sampling steps; default: the pipeline's")
@click.option("--guidance", type=float, help="classifier-free guidance scale; default: the pipeline's")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--base", help="the base pipeline: hub id or folder; default: as the checkpoint says")
@_dtype_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="the PNG, JPEG, WebP or GIF file to write; videos move in a GIF"
)
@_errors_in_one_line
def sample(folder: Path, prompts: tuple[str, ...], base: str | None, output: Path, **options: Any) -> None:
    """Sample from teacher and student with the same noise and show their images or videos side by side.

    FOLDER is a checkpoint, or demo/NAME for the samples of a demo model alone.
    """
    from edit_compile.report.compare_samples import sample as sample_both
    from edit_compile.report.image_grid import image_format

    image_format(output)
    made = sample_both(folder, prompts, base=base, **options)
    made.save(output)
    who = "teacher and student" if made.student else folder
    click.echo(f"{who} for {len(prompts)} prompt{'s' * (len(prompts) > 1)}, saved to {output}", err=True)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="a text file with a prompt a line")
@click.option("--images", type=click.Path(path_type=Path), help="a folder of real images for the FIDs; default: the teacher's images")
@click.option("--metrics", metavar="NAMES", help="of clip-score, fid-inception, fid-clip and lpips, with commas; default: all")
@click.option("--samples", type=click.IntRange(min=1), help="images by teacher and student each; default: one a prompt")
@click.option("--size", type=_Size(), help="PX or HEIGHTxWIDTH; default: the model's")
@click.option("--steps", type=click.IntRange(min=1), help="sampling steps; default: the pipeline's")
@click.option("--guidance", type=float, help="classifier-free guidance scale; default: the pipeline's")
@click.option("--seed", type=int, default=0, show_default=True, help="of the first image")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="images sampled and judged at once")
@click.option("--device", help="of the pipeline and the networks that judge; default: cuda, if there is any")
@click.option("--clip", "clip_name", metavar="MODEL", help="a CLIP model: hub id or folder; default: openai/clip-vit-large-patch14")
@click.option("--base", help="the base pipeline: hub id or folder; default: as the checkpoint says")
@_dtype_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file; images go beside it; default: evaluation.json in FOLDER")
@click.option("--json", "as_json", is_flag=True, help="print JSON on stdout and nothing else")
@_errors_in_one_line
def evaluate(
    folder: Path, prompts: Path, metrics: str | None, size: tuple[int, ...] | None, clip_name: str | None, as_json: bool, **options: Any
) -> None:
    """Sample from teacher and student for many prompts and judge the images: CLIP score, FIDs, LPIPS. Resumes if interrupted.

    FOLDER holds a converted model, its pipeline, or a finished run.
    """
    from edit_compile.evaluation.run import evaluate as run
    from edit_compile.report.evaluation_table import evaluation_table

    if size is not None and len(size) != 2:
        raise click.UsageError("--size: PX or HEIGHTxWIDTH; only images are evaluated")
    height, width = size or (None, None)
    names = [name.strip() for name in (metrics or "").split(",") if name.strip()]

    def progress(done: int, total: int) -> None:
        click.echo(f"{done:,} of {total:,} images", err=True)

    found = run(folder, prompts, metrics=names, height=height, width=width, progress=progress, clip_name=clip_name, **options).to_dict()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _console().print(evaluation_table(found))


@main.command()
@click.argument("recipe")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change the recipe, for example stages.0.steps=500; repeatable"
)
@click.option("--dry-run", is_flag=True, help="print the recipe, the plan, and FLOPs, memory and time of each phase, without training")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder for the student; default: runs/ and the recipe's name")
@click.option("--push-to-hub", metavar="REPO", help="upload the finished folder to this hub repository")
@click.option("--resume", is_flag=True, help="continue the run in the folder, bit for bit; start one if there is none")
@click.option("--json", "as_json", is_flag=True, help="print JSON on stdout and nothing else")
@_errors_in_one_line
def distill(
    recipe: str, overrides: tuple[str, ...], dry_run: bool, output: Path | None, push_to_hub: str | None, resume: bool, as_json: bool
) -> None:
    """Convert a model and train it to match its teacher. RECIPE: a YAML file, or the name of a shipped recipe."""
    from edit_compile.distillation.console import print_estimate, print_result, show_progress
    from edit_compile.distillation.dry_run import dry_run as estimate
    from edit_compile.distillation.output.hub import push_to_hub as push
    from edit_compile.distillation.recipe.load import load_recipe
    from edit_compile.distillation.run import distill as run

    resolved = load_recipe(recipe, overrides)
    if dry_run:
        print_estimate(estimate(resolved), as_json)
        return
    folder = output or Path("runs") / Path(recipe).stem
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, which all run this
    try:
        with show_progress(resolved, quiet=as_json or not speaks) as report:
            result = run(resolved, folder, resume=resume, report=report)
    except Interrupted as stopped:
        changes = [part for override in overrides for part in ("--set", override)]
        command = shlex.join(["edit-compile", "distill", recipe, *changes, "-o", str(folder), "--resume"])
        if speaks:
            click.echo(f"{stopped}. To continue: {command}", err=True)
        sys.exit(STOPPED)
    if not speaks:
        return
    print_result(result, as_json)
    if push_to_hub is not None:
        click.echo(f"uploaded to {push(folder, push_to_hub)}", err=True)


@main.command()
@click.argument("model")
@click.option(
    "--recipe", help="a YAML file or a shipped recipe's name: data, layerwise fit, validation; default: the shipped one for MODEL"
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change the recipe, for example layerwise.lr=0.001; repeatable"
)
@click.option(
    "--candidates",
    metavar="LIST",
    help="designs that compete for the sites, as in YAML: NAME, {design: NAME, option: value}; default: the recipe's",
)
@click.option("--sites", multiple=True, metavar="BUDGET", help=f"convert, measure and save what this chooses: {BUDGETS}; repeatable")
@click.option("--size", type=_Size(), help="PX or [FRAMESx]HEIGHTxWIDTH to count FLOPs at; default: the recipe's last stage's")
@click.option("--steps", type=click.IntRange(min=1), help="of the layerwise fit; default: the recipe's")
@click.option("--time", is_flag=True, help="measure every site's milliseconds as well, on this machine")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder for the ranking; default: rankings/ and the model's name")
@click.option("--json", "as_json", is_flag=True, help="print JSON on stdout and nothing else")
@_errors_in_one_line
def rank(
    model: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    candidates: str | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what converting each of MODEL's sites does to its output, and saves, and choose the best. Continues what was begun."""
    from edit_compile.distillation.console import print_ranking, show_ranking
    from edit_compile.distillation.ranking.rank import rank as run
    from edit_compile.distillation.ranking.rank import recipe_for
    from edit_compile.distillation.recipe.load import load_recipe

    folder = output or Path("rankings") / Path(model).name
    resolved = load_recipe(recipe or recipe_for(model), overrides)
    try:
        with show_ranking(quiet=as_json) as report:
            found = run(model, folder, recipe=resolved, candidates=_candidates(candidates), report=report, **options)
    except Interrupted as stopped:
        click.echo(f"{stopped}. The same command continues.", err=True)
        sys.exit(STOPPED)
    print_ranking(found, folder, as_json)


def _candidates(text: str | None) -> list[Any] | None:
    import yaml

    if text is None:
        return None
    try:
        found = yaml.safe_load(text if text.lstrip().startswith("[") else f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"--candidates {text}: not valid YAML: {' '.join(str(error).split())}") from None
    return list(found)


@main.command()
@click.argument("paths", nargs=-1, required=True, metavar="STUDY | RUN...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="default: runs/ and the study's name, or runs/comparison")
@click.option("--only", multiple=True, metavar="NAME", help="do the cells of this configuration alone; repeatable")
@click.option("--samples", type=click.IntRange(min=0), help="of runs: held-out captions that a demo model draws; default: 100")
@click.option("--table", is_flag=True, help="print what was found before, and do nothing")
@click.option("--json", "as_json", is_flag=True, help="print JSON on stdout and nothing else")
@_errors_in_one_line
def compare(paths: tuple[str, ...], output: Path | None, only: tuple[str, ...], samples: int | None, table: bool, as_json: bool) -> None:
    """Compare ways to convert and distil a model: tables and a gallery.

    STUDY: a YAML file, or the name of a shipped study; its cells are trained and measured, those that are done are not done again.
    RUN: folders of finished runs.
    """
    from edit_compile.distillation.console import show_progress
    from edit_compile.study.compare import compare as run
    from edit_compile.study.compare import output_of, read_results
    from edit_compile.study.console import print_results

    folder = output_of(paths, output)
    options = [part for name in only for part in ("--only", name)] + ([] if samples is None else ["--samples", str(samples)])
    again = shlex.join(["edit-compile", "compare", *paths, *options, "-o", str(folder)])
    try:
        results = (
            read_results(folder)
            if table
            else run(
                *paths,
                output=folder,
                only=only,
                samples=samples,
                say=lambda line: click.echo(line, err=True),
                progress=lambda title, recipe: show_progress(recipe, quiet=as_json or not sys.stderr.isatty()),
            )
        )
    except (Interrupted, KeyboardInterrupt) as stopped:
        click.echo(f"{str(stopped) or 'stopped'}. To continue: {again}", err=True)
        sys.exit(STOPPED)
    if as_json:
        click.echo(results.model_dump_json(indent=2))
    else:
        print_results(results)
        click.echo(f"results.json, results.md and gallery.png are in {folder}", err=True)
    if results.failed and not table:
        raise EditCompileError(f"{len(results.failed)} of the cells failed; comparing again tries them again: {again}")


@main.command()
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change the recipe, for example data.path=images; repeatable")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="folder for the cache")
@click.option("--samples", type=click.IntRange(min=1), help="maximum number of samples; default: all")
@click.option("--shard-size", type=click.IntRange(min=1), default=128, show_default=True, help="samples in each file")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="samples encoded or sampled at once")
@click.option("--verify", is_flag=True, help="read a finished cache completely and compare the checksums")
@click.option("--json", "as_json", is_flag=True, help="print JSON on stdout and nothing else")
@_errors_in_one_line
def cache(recipe: str, overrides: tuple[str, ...], output: Path, verify: bool, as_json: bool, **options: Any) -> None:
    """Encode a recipe's data once, as latents and text embeddings. Resumes if interrupted. RECIPE: as for `distill`."""
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
        raise EditCompileError(f"{len(made.damaged)} of {made.samples} samples in {output} are damaged; training skips them")


def _show(plan: Plan, as_json: bool, more: dict[str, Any]) -> None:
    from edit_compile.report.tables import plan_summary

    if as_json:
        click.echo(json.dumps({**more, **plan_summary(plan)}, indent=2))
    else:
        _console().print(plan)


def _console() -> Console:
    """Make a console as wide as the terminal or as $COLUMNS, and wide where output goes to a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, highlight=False)


if __name__ == "__main__":
    main()
