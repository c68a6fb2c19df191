"""`edit-compile distill`, `cache` and `rank`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from edit_compile.cli.command import Command, continuable, is_quiet, print_json, same_command, say
from edit_compile.cli.parameters import RECIPE, Size, check_folder, original_model_argument, overrides_option, read_list, recipe_argument
from edit_compile.distillation.ranking.budget import BUDGET_FORMS
from edit_compile.distillation.recipe.names import find_recipe
from edit_compile.errors import EditCompileError
from edit_compile.extras import need
from edit_compile.progress import working
from edit_compile.words import bytes_in_words


@click.command(
    cls=Command,
    examples="""distill sd3.5-medium --dry-run --device h100
distill recipe.yaml -o runs/mine --set stages.0.steps=500
distill recipe.yaml -o runs/mine --resume""",
)
@recipe_argument
@click.option("--dry-run", is_flag=True, help="print the recipe, the plan, and FLOPs, memory and time of each phase, without training")
@click.option("--devices", type=click.IntRange(min=1), metavar="N", help="with --dry-run: share the work among so many")
@click.option("--device", metavar="NAME", help="with --dry-run: count for a device that is not at hand, for example h100")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder for the student; default: runs/ and the recipe's name")
@click.option("--overwrite", is_flag=True, help="replace what the folder holds")
@click.option("--push-to-hub", metavar="REPO", help="upload the finished folder to this hub repository")
@click.option("--resume", is_flag=True, help="continue the run in the folder, bit for bit; start one if there is none")
@click.option("--accept-changed-data", is_flag=True, help="resume although the data changed; what was held out is still never trained on")
def distill(
    recipe: str,
    overrides: tuple[Any, ...],
    dry_run: bool,
    devices: int | None,
    device: str | None,
    output: Path | None,
    overwrite: bool,
    push_to_hub: str | None,
    resume: bool,
    accept_changed_data: bool,
    as_json: bool,
) -> None:
    """Convert a model and train it to match its teacher.

    RECIPE: a YAML file, or the name of a shipped recipe; `edit-compile recipe` lists them.
    """
    if not dry_run and (devices is not None or device is not None):
        raise click.UsageError("--devices and --device are for --dry-run; `accelerate launch` trains on several devices")
    folder = output or Path("runs") / Path(recipe).stem
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, which all run this
    if not dry_run:
        need("distill", "edit-compile distill")
    if not dry_run and speaks:
        check_folder(folder)
    with working("importing PyTorch"):
        from edit_compile.distillation.console import print_estimate, print_result
        from edit_compile.distillation.dry_run import dry_run as estimate
        from edit_compile.distillation.output.hub import make_repository
        from edit_compile.distillation.output.hub import push_to_hub as push
        from edit_compile.distillation.recipe.load import load_recipe
        from edit_compile.distillation.run import distill as run
    resolved = load_recipe(recipe, overrides)
    if dry_run:
        print_estimate(estimate(resolved, devices=devices or 1, device=device), as_json)
        return
    if push_to_hub is not None and speaks:
        make_repository(push_to_hub)  # what could fail after the training is tried before it
    quiet = as_json or is_quiet() or not speaks
    with continuable(same_command("--resume", without="--overwrite"), speaks=speaks):
        result = run(
            resolved,
            folder,
            resume=resume,
            overwrite=overwrite,
            announce=None if quiet else lambda data: say(str(data)),
            accept_changed_data=accept_changed_data,
        )
    if not speaks:
        return
    print_result(result, as_json)
    if push_to_hub is not None:
        with working(f"uploading to {push_to_hub}"):
            address = push(folder, push_to_hub)
        say(f"uploaded to {address}")


@click.command(
    cls=Command,
    examples="""cache sd3.5-medium -o data/sd3.5-medium --set data.path=photos
cache recipe.yaml -o data/cache --samples 1000
cache recipe.yaml -o data/cache --verify""",
)
@recipe_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="folder for the cache")
@click.option("--samples", type=click.IntRange(min=1), help="maximum number of samples; default: all")
@click.option("--shard-size", type=click.IntRange(min=1), default=128, show_default=True, help="samples in each file")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="samples encoded or sampled at once")
@click.option("--verify", is_flag=True, help="read a finished cache completely and compare the checksums")
def cache(recipe: str, overrides: tuple[Any, ...], output: Path, verify: bool, as_json: bool, **options: Any) -> None:
    """Encode a recipe's data once, as latents and text embeddings. Resumes if interrupted. RECIPE: as for `distill`."""
    need("distill", "edit-compile cache")
    if not verify:
        check_folder(output)
    with working("importing PyTorch"):
        from edit_compile.distillation.make_cache import make_cache, verify_cache
        from edit_compile.distillation.recipe.load import load_recipe

    resolved = load_recipe(recipe, overrides)
    made = verify_cache(output, resolved) if verify else make_cache(resolved, output, **options)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes, which all run this, the first one speaks
    if as_json:
        print_json(made.to_dict())
    else:
        size, resolutions = bytes_in_words(made.bytes), ", ".join(made.resolutions)
        click.echo(f"{made.samples:,} samples at {resolutions} px in {made.shards:,} shards, {size}, in {output}")
    for what, names in (("skipped", made.skipped), ("damaged", made.damaged)):
        for name, reason in names.items():
            say(f"{what} {name}: {reason}")
    if made.damaged:
        raise EditCompileError(f"{len(made.damaged)} of {made.samples} samples in {output} are damaged; training skips them")


@click.command(
    cls=Command,
    examples="""rank demo/dit --sites 'flops <= 0.5x'
rank my/pipeline --recipe sd3.5-medium --time""",
)
@original_model_argument
@click.option(
    "--recipe",
    type=RECIPE,
    help="a YAML file or a shipped recipe's name: data, layerwise fit, validation; default: the shipped one for MODEL",
)
@overrides_option
@click.option(
    "--candidates",
    metavar="LIST",
    help="designs that compete for the sites, as in YAML: NAME, {design: NAME, option: value}; default: the recipe's",
)
@click.option("--sites", multiple=True, metavar="BUDGET", help=f"convert, measure and save what this chooses: {BUDGET_FORMS}; repeatable")
@click.option("--size", type=Size(), help="PX or [FRAMESx]HEIGHTxWIDTH to count FLOPs at; default: the recipe's last stage's")
@click.option("--steps", type=click.IntRange(min=1), help="of the layerwise fit; default: the recipe's")
@click.option("--time", is_flag=True, help="measure every site's milliseconds as well, on this machine")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder for the ranking; default: rankings/ and the model's name")
def rank(
    model: str, recipe: str | None, overrides: tuple[str, ...], candidates: str | None, output: Path | None, as_json: bool, **options: Any
) -> None:
    """Measure what converting each of MODEL's sites does to its output, and saves, and choose the best. Continues what was begun."""
    need("distill", "edit-compile rank")
    if recipe is not None:
        find_recipe(recipe)
    check_folder(output or Path("rankings") / Path(model).resolve().name)
    with working("importing PyTorch"):
        from edit_compile.distillation.console import print_ranking
        from edit_compile.distillation.ranking.rank import rank as run
        from edit_compile.distillation.ranking.rank import ranking_folder, recipe_for
        from edit_compile.distillation.recipe.load import load_recipe
    folder = ranking_folder(model, output)
    resolved = load_recipe(recipe or recipe_for(model), overrides)
    listed = read_list("--candidates", candidates) if candidates is not None else None
    with continuable(same_command()):
        found = run(model, folder, recipe=resolved, candidates=listed, **options)
    print_ranking(found, folder, as_json)
