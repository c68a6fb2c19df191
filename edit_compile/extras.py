"""The optional parts of an installation, `pip install 'edit_compile[NAME]'`, and what is said where one that is needed is missing."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from edit_compile.errors import EditCompileError

MODULES = {  # of an extra: what it installs, as far as the package imports it
    "distill": ("datasets", "matplotlib", "peft", "tensorboard"),
    "eval": ("torch_fidelity", "torchmetrics", "torchvision"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "lora": ("peft",),
    "timm": ("timm",),
}


def need(extra: str, what: str, *modules: str) -> None:
    """Make sure that an extra is installed, without importing it.

    Args:
        extra: its name.
        what: needs it, for the message.
        modules: of the extra those that are needed; none: all.

    Raises:
        EditCompileError: it is not; says how to install it.
    """
    if missing := [name for name in modules or MODULES[extra] if find_spec(name) is None]:
        names = ", ".join(missing)
        raise EditCompileError(f"{what} needs {names}: pip install 'edit_compile[{extra}]'")


def import_extra(extra: str, what: str, module: str) -> ModuleType:
    """Import a module of an extra.

    Raises:
        EditCompileError: it is not installed, or cannot be imported as it is; says how to install it.
    """
    need(extra, what, module)
    try:
        return import_module(module)
    except Exception as error:  # RuntimeError too, where it was built for another version of torch
        raise EditCompileError(
            f"{what} needs {module}, which cannot be imported ({error}): pip install --upgrade 'edit_compile[{extra}]'"
        ) from error
