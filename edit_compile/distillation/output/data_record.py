"""What a run's data were when it began: `data.json` in its folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from edit_compile.distillation.data.source import ChangingSource, DataSource, FiniteSource
from edit_compile.errors import DistillError
from edit_compile.files import write_text
from edit_compile.frozen import Frozen, first_problem

DATA_FILE = "data.json"


class DataRecord(Frozen):
    """What the data were."""

    fingerprint: str
    """Of names and sizes."""
    held_out: tuple[str, ...] | None
    """The names of the samples that are never trained on; None if they are not known by name."""


def record_data(folder: Path, source: DataSource) -> None:
    """Write down what a run's data are, if that can be known."""
    if isinstance(source, ChangingSource):
        held_out = tuple(source.held_out_names()) if isinstance(source, FiniteSource) else None
        write_text(folder / DATA_FILE, DataRecord(fingerprint=source.fingerprint(), held_out=held_out).model_dump_json(indent=1))


def continue_with_data(folder: Path, source: DataSource, *, accept_changed: bool) -> None:
    """Hold out what a run has held out before, and refuse data that changed since, unless that is accepted.

    Raises:
        DistillError: the data changed, and that is not accepted, or what was held out is no longer among them.
    """
    path = folder / DATA_FILE
    if not isinstance(source, ChangingSource) or not path.is_file():
        return
    try:
        record = DataRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DistillError(f"{path}: {first_problem(error)}; remove it to take the data as they are now") from None
    changed = record.fingerprint != source.fingerprint()
    if changed and not accept_changed:
        raise DistillError(
            f"{folder}: the data have changed since the run began (files were added, removed, renamed or changed in size): put them back, "
            "or continue with --accept-changed-data, which still never trains on what was held out"
        )
    if isinstance(source, FiniteSource) and record.held_out is not None:
        source.hold_out(record.held_out)
    elif changed:
        raise DistillError(f"{folder}: the data have changed, and those that were held out are not known by name: begin a new run")
    if changed:
        record_data(folder, source)
