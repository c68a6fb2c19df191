"""`edit-compile export`."""

from __future__ import annotations

from pathlib import Path

import click

from edit_compile.cli.command import Command, print_json, say
from edit_compile.cli.parameters import Names, Size, check_folder, converted_model_argument, dtype_option
from edit_compile.errors import ConfigError
from edit_compile.progress import working

_SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "executorch": ".pte"}


@click.command(
    cls=Command,
    examples="""export distilled --format pt2
export distilled --format onnx -o student.onnx --size 1024
export distilled --blocks -o blocks.pt2""",
)
@converted_model_argument
@click.option("--format", "format_name", type=click.Choice(list(_SUFFIXES)), help="default: by the ending of -o, or pt2")
@click.option("--blocks", is_flag=True, help="write the code of the repeated blocks alone, without weights")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="the file to write; default: the model's name")
@click.option("--size", "sizes", multiple=True, type=Size(), help="PX or [FRAMESx]HEIGHTxWIDTH to make it from and compare at; repeatable")
@click.option("--dynamic", type=Names(), metavar="LIST", help="what may vary, of batch,frames,height,width,text; default: all but text")
@click.option(
    "--example-inputs",
    "inputs_files",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="YAML with the arguments of one forward, for models that are not known; twice, of other sizes",
)
@click.option("--base", help="the base model: hub id or folder; default: as the checkpoint says")
@click.option("--overwrite", is_flag=True, help="replace the file that is there")
@dtype_option
def export(
    model: str,
    format_name: str | None,
    blocks: bool,
    output: Path | None,
    sizes: tuple[tuple[int, ...], ...],
    dynamic: tuple[str, ...] | None,
    inputs_files: tuple[Path, ...],
    base: str | None,
    overwrite: bool,
    dtype: str,
    as_json: bool,
) -> None:
    """Write a converted model as a file that runs without this package, and compare it with the model at each size.

    pt2 is a package of AOTInductor, compiled for this kind of machine and run by torch; onnx runs in onnxruntime; executorch on phones.
    """
    if inputs_files and sizes:
        raise click.UsageError("give either --size or --example-inputs")
    if len(inputs_files) == 1:
        raise click.UsageError("give --example-inputs twice, of different sizes: what differs may vary, and both are compared")
    known = {suffix: name for name, suffix in _SUFFIXES.items()}
    kind = format_name or (known.get(output.suffix) if output is not None else "pt2")
    if kind is None:
        raise ConfigError(f"{output}: name the format by --format, or by the ending {', '.join(known)}")
    output = output or Path(f"{Path(model).resolve().name}{'-blocks' if blocks else ''}{_SUFFIXES[kind]}")
    check_folder(output.parent)
    with working("importing PyTorch"):
        import torch

        import edit_compile as ec
        from edit_compile.adapters.input_file import read_example_inputs
        from edit_compile.deployment.formats import FORMATS
        from edit_compile.deployment.run import check_target, dynamic_names

    check_target(output, overwrite)
    dynamic_names(dynamic)
    FORMATS[kind].check_packages()
    examples = [read_example_inputs(file) for file in inputs_files] or None
    with working(f"loading {model}"):
        student = ec.load(model, base).to(getattr(torch, dtype))
    report = ec.export(
        student, output, format=kind, blocks=blocks, sizes=sizes or None, dynamic=dynamic, example_inputs=examples, overwrite=overwrite
    )
    if as_json:
        print_json({"output": str(output), "errors": dict(report.errors), **report.about.model_dump(mode="json")})
        return
    for size, error in report.errors.items():
        say(f"{size}: the output differs from the student's by {error:.1e} of its largest value")
    varies, fixed = getattr(report.about, "varies", ()), getattr(report.about, "fixed", {})
    if varies:
        say(f"may vary: {', '.join(varies)}")
    for name, why in fixed.items():
        say(f"{name} is fixed: {why}")
    click.echo(f"{output}: largest relative error {report.largest_error:.1e}")
