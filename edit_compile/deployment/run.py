"""`edit_compile.export`: writing a converted model as a file, and comparing the file with the model."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edit_compile.adapters.family import Extent
from edit_compile.adapters.step_cache import step_cache_of
from edit_compile.bench.min_tokens import min_tokens_set
from edit_compile.deployment.blocks import BlocksDescription, capture_blocks, load_blocks, runs_of_blocks, write_blocks
from edit_compile.deployment.cases import (
    DEFAULT,
    NAMES,
    Case,
    Cases,
    SizedCases,
    device_of,
    given_cases,
    plain,
    split_constants,
    tensors_of,
)
from edit_compile.deployment.exported_file import FileDescription, InputDescription, load_exported, relative_error
from edit_compile.deployment.formats import Format, format_of, quiet
from edit_compile.deployment.program import Program, call_case, program_of
from edit_compile.errors import ConfigError, ExportError, first_line
from edit_compile.files import flush
from edit_compile.progress import working
from edit_compile.student.handle import ConvertedModel, plan_of, unwrap
from edit_compile.torch_internals import is_quantized, is_sharded
from edit_compile.version import __version__

# The largest relative errors that are rounding, by the weights' type.
LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: of the file.
        about: what it says of itself.
        errors: by each size that was compared, the largest difference to the model's output, over the output's largest value.
    """

    path: Path
    about: FileDescription | BlocksDescription
    errors: Mapping[str, float]

    @property
    def largest_error(self) -> float:
        return max(self.errors.values())


def export(
    student: Any,
    path: str | Path,
    *,
    format: str | None = None,
    blocks: bool = False,
    sizes: Sequence[Extent] | None = None,
    dynamic: Sequence[str] | None = None,
    example_inputs: Sequence[Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a converted model as a file that draws without this package, load the file, and compare it with the model.

    The file takes the tensors among the forward's arguments by name; the others are fixed in it, and so are weights, with LoRA that is on
    the model. It is the model as converted, whatever its `min_tokens`. A file that is not what the model is does not replace another.

    Args:
        student: a converted model, or what holds one: a pipeline, torch.compile.
        path: of the file.
        format: "pt2", a package of AOTInductor for torch on this kind of machine and the model's device; "onnx"; or "executorch".
            Default: by the path's ending, .pt2, .onnx or .pte.
        blocks: write the code of the repeated blocks alone, of equal ones once, without weights: for `load_blocks`. A .pt2 file.
        sizes: (height, width) in pixels, or of videos (frames, height, width): the file is made from the first one, holds for all that the
            model takes (of ExecuTorch: up to the largest of these), and is compared at each. Default: two that suit the model.
        dynamic: what may vary, of "batch", "frames", "height", "width" and "text"; refused where the model does not allow it. Default: all
            but "text" that the model allows.
        example_inputs: instead of sizes, of models that no adapter knows: keyword arguments of several forwards. What differs between
            them varies. Of models whose grid of image tokens is read from position ids or stated, a tensor of its shape as `image_grid`.
        overwrite: replace a file that is there.

    Raises:
        ExportError: the packages that the format needs are missing; the model cannot be captured or written; something cannot vary; the
            file's output is not the model's.
        NoExampleInputsError: no adapter knows the model, and there are no example inputs.
        GridError: the model does not support a size.
    """
    path, model = Path(path), unwrap(student)
    kind, chosen = format_of(path, format), dynamic_names(dynamic)
    if blocks and not kind.for_torch:
        raise ExportError(f"code of blocks is for torch: a .pt2 file, not {kind.name}")
    check_target(path, overwrite)
    kind.check_packages()
    _check_model(model, kind)
    asked = set(dynamic or ())

    def make_cases() -> Cases:
        return given_cases(model, example_inputs) if example_inputs is not None else SizedCases(model).make(sizes, chosen)

    cases = make_cases()
    _refuse_fixed(asked, cases.impossible, model)
    with min_tokens_set(model, 0):
        if blocks:
            return _export_blocks(model, path, cases)
        program = _captured(model, kind, cases, chosen)
        fixed = {name: why for name, why in {**cases.impossible, **program.fixed}.items() if name in chosen or name == "size"}
        _refuse_fixed(asked, fixed, model)
        if program.fixed.keys() & {"size"}:
            raise ExportError(f"{type(model).__name__} cannot be exported for several sizes: {program.fixed['size']}; give examples of one")
        if fixed.keys() & program.fixed.keys():  # at the very size, then
            chosen -= fixed.keys()
            cases = make_cases()
            program = _captured(model, kind, cases, chosen)
        about = _described(model, kind, program, cases, chosen, fixed)
        with in_place_of(path) as temporary:
            with _naming(about.model, kind.name), working(f"writing {path.name}"), quiet(), torch.no_grad():
                kind.write(program, temporary, about.model_dump_json())
            exported = load_exported(temporary)
            errors = _compared(lambda case: exported(**case.inputs), model, cases.all, path)
    return ExportReport(path, about, errors)


def _captured(model: ConvertedModel, kind: Format, cases: Cases, chosen: set[str]) -> Program:
    bounds = _bounds(cases) if kind.bounded else None
    with working(f"capturing {type(model).__name__}"):
        program = program_of(model, cases.captured, cases.varying, chosen, for_torch=kind.for_torch, bounds=bounds, variants=cases.variants)
    if (obstacle := kind.obstacle(program)) is not None:
        program.fixed.update({name: obstacle for name in ("frames", "height", "width") if name in chosen and name in cases.variants})
    return program


def _export_blocks(model: ConvertedModel, path: Path, cases: Cases) -> ExportReport:
    """Write the code of a model's blocks, give it to a copy of the model, and compare the two."""
    blocks, code = capture_blocks(model, (cases.captured, *cases.all))
    about = BlocksDescription(
        edit_compile=__version__,
        torch=str(torch.__version__),
        model=plan_of(model).model,
        device=device_of(model).type,
        blocks=blocks,
        code={name: one.about for name, one in code.items()},
        sizes=tuple(case.name for case in cases.all),
    )
    with in_place_of(path) as temporary:
        with _naming(about.model, "compiled blocks"), quiet(), torch.no_grad():
            write_blocks(code, temporary, about.model_dump_json())
        compiled = load_blocks(copy.deepcopy(model), temporary)
        errors = _compared(lambda case: call_case(compiled, case), model, cases.all, path)
        if idle := [block for block, number in runs_of_blocks(compiled, blocks).items() if not number]:
            raise ExportError(f"{about.model}: the code of {idle[0]} holds for none of its own calls; it was not kept. Please report this")
    return ExportReport(path, about, errors)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a file that is there already, or cannot be.

    Raises:
        ExportError: says why.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give a file's name")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists already; give another name with -o, or replace it with --overwrite (overwrite=True)")


def dynamic_names(dynamic: Sequence[str] | None) -> set[str]:
    """Return the names of what may vary.

    Raises:
        ConfigError: one is unknown.
    """
    if isinstance(dynamic, str) or not set(dynamic or ()) <= set(NAMES):
        raise ConfigError(f"dynamic={dynamic!r}: a list of names, of {', '.join(NAMES)}")
    return set(DEFAULT if dynamic is None else dynamic)


def _check_model(model: ConvertedModel, kind: Format) -> None:
    if (cache := step_cache_of(model)) is not None:
        raise ExportError(
            f"{type(model).__name__} has a cache of sampling steps ({cache}), which no file can hold: take it off, as by disable_cache()"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_meta or is_sharded(tensor):
            raise ExportError(f"{name} is sharded, offloaded or without values: load the student whole, and export that")
        if is_quantized(tensor):
            raise ExportError(f"{name} is quantized ({type(tensor).__name__}): export the student before it is quantized")
        if tensor.dtype in kind.lacks:
            number_type = str(tensor.dtype).removeprefix("torch.")
            raise ExportError(
                f"{kind.name} files are not run in {number_type}: export the student in float32, student.float() or --dtype float32"
            )


def _refuse_fixed(asked: set[str], fixed: Mapping[str, str], model: ConvertedModel) -> None:
    for name in NAMES:
        if name in asked and name in fixed:
            raise ExportError(f"{type(model).__name__}: {name} cannot vary: {fixed[name]}; leave it out of dynamic")


def _bounds(cases: Cases) -> dict[tuple[int, int], int]:
    """Find the largest size of each dimension that varies."""
    tensors = [tensors_of(split_constants(case.inputs)[0]) for case in (cases.captured, *cases.all)]
    return {(number, dim): max(case[number].shape[dim] for case in tensors) for number, dim in cases.varying}


def _described(
    model: ConvertedModel, kind: Format, program: Program, cases: Cases, chosen: set[str], fixed: dict[str, str]
) -> FileDescription:
    tensors = tensors_of(split_constants(cases.captured.inputs)[0])
    inputs = tuple(
        InputDescription(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=shape, most=most)
        for name, tensor, shape, most in zip(program.names, tensors, program.shapes, program.most, strict=True)
    )
    named = {name for names in cases.varying.values() for name in names}
    plan = plan_of(model)
    return FileDescription(
        edit_compile=__version__,
        torch=str(torch.__version__),
        model=plan.model,
        base=model.edit_conversion.base,
        designs=dict(Counter(site.action for site in plan.rewritten)),
        format=kind.name,
        device=device_of(model).type,
        inputs=inputs,
        constants=plain(program.constants),
        conditions=program.conditions,
        varies=tuple(name for name in (*NAMES, "size") if name in named and (name in chosen or name == "size") and name not in fixed),
        fixed=fixed,
        sizes=tuple(case.name for case in cases.all),
    )


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a new folder beside it. What is there at the end takes its place; after an error, nothing does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name
        made = sorted(Path(folder).iterdir(), key=lambda each: each.name == path.name)  # the file itself last: it may refer to the others
        for one in made:
            flush(one)
            replace(one, path.parent / one.name)
    flush(path.parent)


@contextmanager
def _naming(model: str, what: str) -> Iterator[None]:
    """Turn what libraries raise inside into one line."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{model} cannot be written as {what}: {type(error).__name__}: {first_line(error)}") from error


@torch.no_grad()
def _compared(run: Callable[[Case], Sequence[Tensor]], model: ConvertedModel, cases: Sequence[Case], path: Path) -> dict[str, float]:
    """Compare a file with its model, case by case.

    Raises:
        ExportError: it fails, or is not what the model is.
    """
    errors: dict[str, float] = {}
    for case in cases:
        with working(f"comparing at {case.name}"):
            expected = call_case(model, case)
            try:
                errors[case.name] = relative_error(run(case), expected)
            except Exception as error:
                raise ExportError(f"{path.name} fails at {case.name}: {type(error).__name__}: {first_line(error)}") from error
    limit = max(LIMITS[p.dtype] for p in model.parameters() if p.dtype in LIMITS)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= limit:
        raise ExportError(
            f"{path.name} is not the student: at {worst} its output differs by {errors[worst]:.1e} of the largest value, more than the "
            f"{limit:.0e} of rounding; it was not kept. Please report this with the model's config"
        )
    return errors
