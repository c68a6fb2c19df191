"""`edit-compile compare` and `report`."""

from __future__ import annotations

from pathlib import Path

import click

from edit_compile.adapters.model_names import is_on_hub
from edit_compile.cli.command import Command, continuable, print_json, say
from edit_compile.cli.parameters import Size, converted_model
from edit_compile.distillation.recipe.names import is_recipe_file, shipped_recipes
from edit_compile.errors import ConfigError, EditCompileError
from edit_compile.extras import need
from edit_compile.progress import working


@click.command(
    cls=Command,
    examples="""compare designs-dit-64 -o study
compare study.yaml -o study --only baseline
compare runs/one runs/another --latency 1024""",
)
@click.argument("paths", nargs=-1, required=True, metavar="STUDY | RUN...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="default: runs/ and the study's name, or runs/comparison")
@click.option("--only", multiple=True, metavar="NAME", help="do the cells of this configuration alone; repeatable")
@click.option("--samples", type=click.IntRange(min=0), help="of runs: held-out captions that a demo model draws; default: 100")
@click.option(
    "--latency", "sizes", multiple=True, type=Size(), help="of runs: time a forward at PX or [FRAMESx]HEIGHTxWIDTH as well; repeatable"
)
@click.option("--table", is_flag=True, help="print what was found before, and do nothing")
def compare(
    paths: tuple[str, ...],
    output: Path | None,
    only: tuple[str, ...],
    samples: int | None,
    sizes: tuple[tuple[int, ...], ...],
    table: bool,
    as_json: bool,
) -> None:
    """Compare ways to convert and distil a model: tables and a gallery.

    STUDY: a YAML file, or the name of a shipped study; its cells are trained and measured, those that are done are not done again.
    RUN: folders of finished runs, recipes whose runs are in runs/, or the hub ids of repositories that runs were uploaded to.
    """
    recipes = [path for path in paths if path in shipped_recipes() or (len(paths) > 1 and is_recipe_file(path))]  # one file is a study's
    paths = tuple(converted_model(path) if path in recipes else path for path in paths)
    if table and (only or samples is not None or sizes):
        raise click.UsageError("--table prints what was found before: --only, --samples and --latency have no effect")
    if not table:
        need("distill", "edit-compile compare")
    with working("importing PyTorch"):
        from edit_compile.study.compare import Request, read_results, written
        from edit_compile.study.console import print_results
    parent = click.get_current_context().parent
    request = Request(paths, output, only, samples, sizes, parent.params["modules"] if parent is not None else ())
    with continuable(request.command):
        results = read_results(request.folder) if table else request.run(say)
    if as_json:
        click.echo(results.model_dump_json(indent=2))
    else:
        print_results(results)
        say(f"in {request.folder}: {', '.join(written(request.folder))}")
    if results.failed and not table:
        raise EditCompileError(f"{len(results.failed)} of the cells failed; comparing again tries them again: {request.command}")


@click.command(
    cls=Command,
    examples="""report runs/demo-dit
report user/student -o report.html""",
)
@click.argument("run")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="default: report.html in the folder")
def report(run: str, output: Path | None, as_json: bool) -> None:
    """Make one HTML page of a finished run: errors, images, losses, speed, plan and recipe. Training does so at its end.

    RUN: its folder, the name of a recipe whose run is in runs/, or the hub id of a repository that it was uploaded to.
    """
    need("distill", "edit-compile report", "matplotlib")
    name = converted_model(run)
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"-o {output}: the page is an .html file")
    if output is None and is_on_hub(name):
        raise ConfigError(f"{name} is on the hub: say where the page is written, with -o FILE.html")
    with working("importing PyTorch"):
        from edit_compile.distillation.output.html_report import write_report
        from edit_compile.student.hub import run_folder
    path = write_report(run_folder(name), output)
    if as_json:
        print_json({"report": str(path)})
    else:
        click.echo(f"written to {path}")
