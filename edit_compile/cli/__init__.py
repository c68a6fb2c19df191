"""The command line, `edit-compile COMMAND`: one module for each group of commands.

Imports nothing heavy until a command runs, so that `--help` and completion are quick.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import click

from edit_compile.cli.about import env, recipe
from edit_compile.cli.command import HELP_NAMES, Group
from edit_compile.cli.conversion import UNTRAINED, convert, inspect
from edit_compile.cli.export import export
from edit_compile.cli.images import evaluate, sample
from edit_compile.cli.studies import compare, report
from edit_compile.cli.timing import bench
from edit_compile.cli.training import cache, distill, rank
from edit_compile.errors import ConfigError

__all__ = ["UNTRAINED", "main"]


@click.group(
    cls=Group,
    context_settings=HELP_NAMES,
    epilog='\b\nCompletion in bash, and likewise in zsh and fish:\n  eval "$(_EDIT_COMPILE_COMPLETE=bash_source edit-compile)"',
)
@click.version_option(package_name="edit_compile")
@click.option("--import", "modules", multiple=True, metavar="MODULE", help="import a module or .py file that registers designs; repeatable")
def main(modules: tuple[str, ...]) -> None:
    """Compile the softmax attention of diffusion transformers to linear compressed attention."""
    for name in modules:
        _import(name)


for _each in (inspect, convert, recipe, distill, sample, evaluate, export, bench, compare, report, rank, cache, env):
    main.add_command(_each)


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
