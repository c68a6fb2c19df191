"""The cells of a study: one folder for each configuration and seed, done once, by one process."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from edit_compile.distillation.output.run_folder import RunFolder
from edit_compile.distillation.recipe.load import load_recipe
from edit_compile.distillation.recipe.schema import Recipe, changed_keys
from edit_compile.errors import RecipeError, StudyError
from edit_compile.files import write_text
from edit_compile.frozen import Frozen
from edit_compile.study.budget import identity
from edit_compile.study.measured import MEASURED

try:
    import fcntl
except ImportError:  # not on Windows, where two processes must not share a folder
    fcntl = None  # type: ignore[assignment]

ERROR = "error.json"
State = Literal["finished", "trained", "failed", "unfinished", "not begun"]


class Failure(Frozen):
    """Why a cell failed: what `error.json` holds."""

    error: str
    """In one line."""
    traceback: str


@dataclass(frozen=True)
class CellFolder:
    """The folder of one configuration with one seed: a run's, with `measured.json`, or `error.json` if it failed."""

    name: str
    seed: int
    folder: Path

    @property
    def run(self) -> RunFolder:
        """The folder as the distillation knows it."""
        return RunFolder(self.folder)

    @property
    def title(self) -> str:
        """Name the cell."""
        return f"{self.name}, seed {self.seed}"

    def state(self) -> State:
        """Tell how far the cell is; "trained": it is to be measured."""
        if self.failure() is not None:
            return "failed"
        if self.run.result.exists():
            return "finished" if (self.folder / MEASURED).exists() else "trained"
        return "unfinished" if self.folder.exists() else "not begun"

    def failure(self) -> Failure | None:
        """Return why the cell failed, if it did."""
        try:
            return Failure.model_validate_json((self.folder / ERROR).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            return Failure(error=f"{ERROR} cannot be read: {error}", traceback="")

    def fail(self, error: Exception) -> str:
        """Record why the cell failed; returns it in one line."""
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        failure = Failure(error=line, traceback="".join(traceback.format_exception(error)))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / ERROR, failure.model_dump_json(indent=2))
        return line


@dataclass(frozen=True)
class Cell(CellFolder):
    """A cell with the recipe by which it is trained."""

    recipe: Recipe

    def changes(self) -> list[str]:
        """List what differs between the recipe that the folder was begun with and the cell's, in words."""
        given = self.folder / "recipe.yaml"
        if not given.exists():
            return []
        try:
            then, now = identity(load_recipe(given)), identity(self.recipe)
        except RecipeError as error:
            return [str(error)]
        different = changed_keys(then, now)
        return [f"{key}: {then.get(key)} then, {now.get(key)} now" for key in different]

    def check(self) -> None:
        """Make sure that the folder is this cell's. One whose training failed may have been changed: it begins anew.

        Raises:
            StudyError: it was begun with another recipe.
        """
        changes = self.changes()
        if changes and not self._may_begin_anew():
            more = f" and {len(changes) - 2} more" if len(changes) > 2 else ""
            raise StudyError(
                f"{self.folder} was begun with another recipe ({'; '.join(changes[:2])}{more}): "
                f"give the configuration {self.name!r} another name, or choose another folder with -o"
            )

    def begin(self) -> None:
        """Prepare the folder for another attempt, after `check`."""
        if self.changes() and self._may_begin_anew():
            shutil.rmtree(self.folder)
        (self.folder / ERROR).unlink(missing_ok=True)

    def _may_begin_anew(self) -> bool:
        return self.state() == "failed" and not self.run.result.exists()


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock on a file inside; yields whether it could be had. It ends with its process, however that ends.

    Args:
        wait: until it can be had.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield fcntl is None or _lock(file, wait)


def _lock(file: Any, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
