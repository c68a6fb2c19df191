"""`edit-compile bench`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edit_compile.cli.command import Command, print_json, print_table, say
from edit_compile.cli.parameters import Size, check_folder, original_model_argument, read_list
from edit_compile.errors import ConfigError, GridError
from edit_compile.extras import need
from edit_compile.progress import working

if TYPE_CHECKING:
    from edit_compile.config import LinearizeConfig


class _Sizes(click.ParamType):  # type: ignore[type-arg]
    """`Size`s with commas between them."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[tuple[int, ...], ...]:
        return tuple(Size().convert(part.strip(), param, ctx) for part in str(value).split(","))


@click.command(
    cls=Command,
    examples="""bench arch/pixart-sigma --blocks 2 --resolutions 512,1024
bench arch/sd3.5-medium --blocks 1 --compile --plot speed.png
bench demo/mm-dit --resolutions 64 --profile""",
)
@original_model_argument
@click.option(
    "--resolutions", "sizes", type=_Sizes(), metavar="PX,...", help="PX or [FRAMESx]HEIGHTxWIDTH, with commas; default: the model's"
)
@click.option(
    "--designs",
    default="auto",
    show_default=True,
    metavar="LIST",
    help="as in YAML: NAME, {design: NAME, option: value}",
)
@click.option("--device", help="default: cuda, if there is any")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--blocks", type=click.IntRange(min=1), metavar="N", help="cut each run of equal blocks to N; default: all")
@click.option("--compile", "compiled", is_flag=True, help="compile the repeated blocks, the teacher's too")
@click.option("--runs", type=click.IntRange(min=1), default=7, show_default=True, help="timed rounds")
@click.option("--limit", type=click.FloatRange(min=0), metavar="SECONDS", help="do not try forwards that should take longer")
@click.option("--profile", "profiled", is_flag=True, help="show which part of a site takes which share of the time, too")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="an image of seconds over image tokens, to write"
)
def bench(
    model: str,
    sizes: tuple[tuple[int, ...], ...] | None,
    designs: str,
    dtype: str,
    runs: int,
    limit: float | None,
    profiled: bool,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Time MODEL, its conversions, and what bounds them, in turns: medians, quartiles, memory, FLOPs. Needs no weights.

    The bound is the model with attention between image tokens taken out, projections and cross-attention kept. A design's floor is the
    bound and what the design adds, at the best rates of this machine's own kernels, timed in the same rounds.
    """
    if plot is not None:
        need("distill", "--plot", "matplotlib")
        check_folder(plot.parent, "--plot")
    with working("importing PyTorch"):
        import torch

        from edit_compile.bench.run import Bench
        from edit_compile.report.bench_plot import check_plot, plot_bench
        from edit_compile.report.bench_table import bench_summary, bench_table

    if plot is not None:
        check_plot(plot)
    conversions = _conversions(designs)
    with working(f"making {model} and its conversions"):
        made = Bench.make(model, conversions, dtype=getattr(torch, dtype), **options)
    report = made.run(sizes, runs=runs, profiled=profiled, limit=math.inf if limit is None else limit)
    if not report.rows:
        raise GridError(f"no size could be measured: {'; '.join(report.impossible.values())}")
    if as_json:
        print_json(bench_summary(report))
    else:
        print_table(bench_table(report))
    if plot is not None:
        plot_bench(report, plot)
        say(f"plotted to {plot}")


def _conversions(text: str) -> dict[str, LinearizeConfig]:
    """Read a list of designs with their options, by what they are called in tables."""
    from edit_compile.config import LinearizeConfig

    found = {}
    for each in read_list("--designs", text):
        options = dict(each) if isinstance(each, dict) else {"design": each}
        name = " ".join([str(options.get("design", "auto")), *(f"{key}={value}" for key, value in options.items() if key != "design")])
        found[name] = LinearizeConfig(**options)
    if not found:
        raise ConfigError(f"--designs {text!r} names no design")
    return found
