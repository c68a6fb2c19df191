"""The formats: each writes a captured model to a file, and makes the file a function again."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edit_compile.deployment.program import Program
from edit_compile.errors import ExportError
from edit_compile.extras import need

Run = Callable[[Sequence[Tensor]], list[Tensor]]  # a file as a function of its inputs' tensors
KEY = "edit_compile"  # under which files hold what is known of them


class Format(ABC):
    """A format of files.

    Attributes:
        suffix: of its files' names.
        for_torch: torch runs its files.
        bounded: its files need to know the largest sizes.
        lacks: types of numbers in which its files cannot be run from here.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    for_torch: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    lacks: ClassVar[tuple[torch.dtype, ...]] = ()

    @abstractmethod
    def write(self, program: Program, path: Path, described: str) -> None:
        """Write a file, with what is known of it as JSON inside."""

    @abstractmethod
    def read(self, path: Path) -> tuple[Run, str | None]:
        """Load a file; returns it as a function, and what is known of it, None if it says nothing."""

    def obstacle(self, program: Program) -> str | None:
        """Say why sizes of images cannot vary in a file of this format, given the graph in which they do; None if they can."""
        return None

    def check_packages(self) -> None:  # noqa: B027 (most need none)
        """Refuse a format whose packages are missing.

        Raises:
            EditCompileError: names them.
        """


class Pt2(Format):
    """A package of AOTInductor: compiled for the machine that it is made on, and for its device; torch runs it, from Python and C++."""

    name, suffix, for_torch = "pt2", ".pt2", True

    def write(self, program: Program, path: Path, described: str) -> None:
        from torch._inductor import aoti_compile_and_package

        aoti_compile_and_package(program.exported, package_path=str(path), inductor_configs={"aot_inductor.metadata": {KEY: described}})

    def read(self, path: Path) -> tuple[Run, str | None]:
        from torch._inductor import aoti_load_package

        package = aoti_load_package(str(path))
        return lambda tensors: package.loader.boxed_run(list(tensors)), package.get_metadata().get(KEY)


class Onnx(Format):
    """A graph of ONNX's operators, which onnxruntime and others run, on any machine."""

    name, suffix, lacks = "onnx", ".onnx", (torch.bfloat16,)  # which numpy does not have

    def check_packages(self) -> None:
        need("export", "an ONNX file")

    def write(self, program: Program, path: Path, described: str) -> None:
        made = torch.onnx.export(program.exported, dynamo=True, verbose=False)
        assert made is not None
        made.model.metadata_props[KEY] = described
        made.save(path)

    def read(self, path: Path) -> tuple[Run, str | None]:
        runtime: Any = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            given = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
            return [torch.from_numpy(each) for each in session.run(None, given)]

        return run, session.get_modelmeta().custom_metadata_map.get(KEY)


class ExecuTorch(Format):
    """A program of ExecuTorch, for phones and other small machines: XNNPACK's kernels where it has them, portable ones elsewhere."""

    name, suffix, bounded = "executorch", ".pte", True

    def check_packages(self) -> None:
        if importlib.util.find_spec("executorch") is None:
            raise ExportError(
                f"an ExecuTorch file needs executorch, of a version for this torch ({torch.__version__}): pip install executorch"
            )

    def obstacle(self, program: Program) -> str | None:
        floats = program.exported.graph.find_nodes(op="call_function", target=torch.sym_float)
        return "the model computes with a size as a floating-point number, which ExecuTorch has no operator for" if floats else None

    def write(self, program: Program, path: Path, described: str) -> None:
        partitioner = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner
        exir = importlib.import_module("executorch.exir")
        lowered = exir.to_edge_transform_and_lower(program.exported, partitioner=[partitioner()], constant_methods={KEY: described})
        with path.open("wb") as file:
            lowered.to_executorch().write_to_file(file)

    def read(self, path: Path) -> tuple[Run, str | None]:
        runtime = importlib.import_module("executorch.runtime").Runtime.get()
        program = runtime.load_program(path)
        forward = program.load_method("forward")
        described = program.load_method(KEY).execute([])[0] if KEY in program.method_names else None
        return lambda tensors: list(forward.execute(list(tensors))), described


FORMATS: dict[str, Format] = {each.name: each for each in (Pt2(), Onnx(), ExecuTorch())}


def format_of(path: Path, name: str | None = None) -> Format:
    """Find a format by its name, or by the ending of a file's name.

    Raises:
        ExportError: there is none.
    """
    found = FORMATS.get(name) if name is not None else next((each for each in FORMATS.values() if each.suffix == path.suffix), None)
    if found is None:
        known = ", ".join(f"{each.name} ({each.suffix})" for each in FORMATS.values())
        raise ExportError(f"{name if name is not None else path}: there is no such format; there are: {known}")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the libraries print, log and warn of their own insides to themselves, inside."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir", "executorch", "")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def parsed(described: str | None, path: Path) -> dict[str, Any]:
    """Read what a file says of itself.

    Raises:
        ExportError: nothing that this package wrote.
    """
    try:
        found = json.loads(described or "")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ExportError(f"{path} was not written by edit_compile: it does not say which inputs it takes")
    return found
