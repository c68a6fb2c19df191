"""The cells of a study: one folder for each configuration and seed, done once, by one process."""

from __future__ import annotations

import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from edit_compile.distillation.output.run_folder import RunFolder
from edit_compile.distillation.recipe.load import load_recipe
from edit_compile.distillation.recipe.schema import Recipe, changes_in_words
from edit_compile.errors import RecipeError, StudyError
from edit_compile.files import write_text
from edit_compile.frozen import Frozen
from edit_compile.study.budget import identity
from edit_compile.study.measured import Measurements, Wanted, identity_of_run, read_measured

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
    wanted: Wanted
    """What is to be measured of the student."""

    @property
    def run(self) -> RunFolder:
        """The folder as the distillation knows it."""
        return RunFolder(self.folder)

    @property
    def title(self) -> str:
        """Name the cell."""
        return f"{self.name}, seed {self.seed}"

    @property
    def model(self) -> str:
        """The identity of the student; "" if there is none yet."""
        return identity_of_run(self.folder)

    def measured(self) -> Measurements:
        """Read what was measured of the student."""
        return read_measured(self.folder, self.model)

    def state(self) -> State:
        """Tell how far the cell is; "trained": something is to be measured."""
        if self.failure() is not None:
            return "failed"
        if self.run.result.exists():
            return "trained" if self.measured().lacks(self.wanted) else "finished"
        return "unfinished" if self.folder.exists() else "not begun"

    def failure(self) -> Failure | None:
        """Return why the cell failed, if it did."""
        try:
            return Failure.model_validate_json((self.folder / ERROR).read_bytes())
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

    def changes(self) -> str:
        """Say what differs between the recipe that the folder was begun with and the cell's; "" if nothing does."""
        given = self.folder / "recipe.yaml"
        if not given.exists():
            return ""
        try:
            return changes_in_words(identity(load_recipe(given)), identity(self.recipe))
        except RecipeError as error:
            return str(error)

    def check(self) -> None:
        """Make sure that the folder is this cell's. One whose training failed may have been changed: it begins anew.

        Raises:
            StudyError: it was begun with another recipe.
        """
        changes = self.changes()
        if changes and not self._may_begin_anew():
            raise StudyError(
                f"{self.folder} was begun with another recipe: {changes}; "
                f"give the configuration {self.name!r} another name, or choose another folder with -o"
            )

    def begin(self) -> str:
        """Prepare the folder for another attempt, after `check`; returns the changes for which it begins anew, "" if it does not."""
        changes = self.changes() if self._may_begin_anew() else ""
        if changes:
            shutil.rmtree(self.folder)
        (self.folder / ERROR).unlink(missing_ok=True)
        return changes

    def _may_begin_anew(self) -> bool:
        return self.state() == "failed" and not self.run.result.exists()
