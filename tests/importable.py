"""Imports every module of the package as the first one, each in a process of its own; prints those that fail, with the reason.

The processes are forked from one that has imported nothing of the package, but the libraries that many of its modules need.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from pathlib import Path

import numpy  # noqa: F401
import pydantic  # noqa: F401
import torch
import torch._dynamo
import torch.export  # noqa: F401

PACKAGE = Path(__file__).parent.parent / "edit_compile"


def modules() -> list[str]:
    """The names of all modules, by their files: packages are not imported to list what is in them."""
    parts = (("edit_compile", *path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py")))
    return [".".join(names).removesuffix(".__init__") for names in parts]


def fails(name: str) -> bool:
    """Whether a module cannot be imported in a process that has imported none of the package."""
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(f"{name}: {traceback.format_exc(limit=-3)}", flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


if __name__ == "__main__":
    warnings.simplefilter("error")
    assert not any(name.startswith("edit_compile") for name in sys.modules)
    sys.exit(sum([fails(name) for name in modules()]) > 0)
