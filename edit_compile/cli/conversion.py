"""`edit-compile inspect` and `convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edit_compile.cli.command import Command, print_table, say, show_plan
from edit_compile.cli.parameters import Size, TokenCount, check_folder, conversion_options, dtype_option
from edit_compile.errors import CheckpointError, EditCompileError
from edit_compile.progress import working

if TYPE_CHECKING:
    from edit_compile.config import LinearizeConfig

UNTRAINED = "The output of a converted model is unusable until it is distilled."
Inputs = Callable[[], dict[str, Any] | None]


@click.command(
    cls=Command,
    examples="""inspect arch/sd3.5-medium
inspect demo/mm-dit --set reduction=8 --exclude '*.0.*'
inspect sd3.5-medium --size 2048 --json""",
)
@conversion_options
@click.option("--size", "sizes", multiple=True, type=Size(), help="PX or [FRAMESx]HEIGHTxWIDTH to count FLOPs at; repeatable")
@click.option("--text", type=click.IntRange(min=1), help="number of text tokens to count with; default: the pipeline's")
def inspect(
    model: str,
    config: Callable[[], LinearizeConfig],
    example_inputs: Inputs,
    as_json: bool,
    sizes: tuple[tuple[int, ...], ...],
    text: int | None,
) -> None:
    """Show what would be done to a model, site by site, and why; what it adds and saves. Needs no weights."""
    with working("importing PyTorch"):
        from edit_compile.adapters.family import lookup_family
        from edit_compile.adapters.load_model import load_model
        from edit_compile.api import plan_and_convert
        from edit_compile.bench import cost
        from edit_compile.bench.roofline import known_rates
        from edit_compile.report.tables import cost_summary, cost_table

        chosen, inputs = config(), example_inputs()
    with working(f"reading the structure of {model}"):
        loaded = load_model(model, structure_only=True)
    plan, student = plan_and_convert(loaded, chosen, inputs)
    priced = lookup_family(loaded.model) is not None or loaded.pipeline is not None
    costs = None
    if student is not None and priced:
        with working("counting FLOPs"):
            costs = cost(student, sizes or None, text=text, pipeline=loaded.pipeline, rates=known_rates())
    show_plan(plan, as_json, {"source": loaded.source, "cost": costs and cost_summary(costs)})
    if costs and not as_json:
        print_table(cost_table(costs))
    if sizes and not priced:
        say("FLOPs are counted only of known models and pipelines: no adapter makes this model's inputs at another size")


@click.command(
    cls=Command,
    examples="""convert sd3.5-medium -o converted/sd3.5
convert demo/dit --set reduction=8 --exclude "*.4.*"
convert demo/dit --ranking rankings/dit --sites 'flops <= 0.5x'""",
)
@conversion_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder for the checkpoint; default: converted/ and the model's name")
@click.option("--overwrite", is_flag=True, help="replace the checkpoint that the folder holds")
@click.option(
    "--min-tokens",
    type=TokenCount(),
    metavar="N|predicted|measured",
    help="image tokens below which the student runs as the original: a number, or where it should be, or is, no slower here",
)
@click.option("--standalone", is_flag=True, help="write the whole model with its code, which diffusers runs without edit_compile")
@dtype_option
def convert(
    model: str,
    config: Callable[[], LinearizeConfig],
    example_inputs: Inputs,
    output: Path | None,
    overwrite: bool,
    min_tokens: int | Literal["predicted", "measured"] | None,
    standalone: bool,
    dtype: str,
    as_json: bool,
) -> None:
    """Convert a model and save the checkpoint: the plan, and the weights that were added."""
    if standalone and min_tokens:
        raise click.UsageError("--standalone writes no original attention, which --min-tokens needs: leave one of them out")
    output = output or Path("converted") / Path(model).resolve().name
    check_folder(output)
    for file, what in (("edit_compile.json", "a checkpoint"), ("metrics.jsonl", "a distillation")):
        if not overwrite and (output / file).exists():
            raise CheckpointError(f"{output} holds {what} already; choose another folder with -o, or replace it with --overwrite")
    with working("importing PyTorch"):
        import torch

        import edit_compile as ec
        from edit_compile.bench.conversion_cost import added_parameters, predicted_speedups

        chosen, inputs = config(), example_inputs()
    with working(f"loading {model}"):
        loaded = ec.load_model(model, dtype=getattr(torch, dtype))
    if not loaded.has_weights:
        raise EditCompileError(f"{model} is structure only, without weights to convert; `edit-compile inspect` shows its plan")
    student = ec.linearize(loaded, chosen, inputs)
    if min_tokens is not None:
        with working("finding min_tokens"):
            ec.set_min_tokens(student, min_tokens, pipeline=loaded.pipeline)
    with working(f"saving to {output}"):
        ec.save(student, output, base=loaded.pipeline or loaded.source, standalone=standalone)
    added = added_parameters(student)
    show_plan(ec.plan_of(student), as_json, {"source": loaded.source, "output": str(output), "parameters_added": added})
    with working("counting FLOPs"):
        predicted = predicted_speedups(student, loaded.pipeline)
    if predicted is not None:
        say(predicted)
    say(f"{added:,} parameters added, saved to {output}. {UNTRAINED}")
