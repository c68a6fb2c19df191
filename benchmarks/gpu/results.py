"""What steps found, a JSON object a line in `results.jsonl`, added to as units begin and end; and as a page of tables."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.step import Row, Step

ATTEMPTS = 3  # of a unit that never ends


@dataclass
class UnitState:
    """Where a unit stands: how often it was begun since it last got further, and how it ended."""

    begun: int = 0
    ended: dict[str, Any] | None = None


@dataclass
class Results:
    """The results in a folder."""

    folder: Path
    states: dict[tuple[str, str], UnitState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.read()

    @property
    def path(self) -> Path:
        return self.folder / "results.jsonl"

    def read(self) -> None:
        """Read what there is; of a line that was cut off with its process, nothing."""
        self.states.clear()
        for event in self.events():
            self._note(event)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield all events, in order."""
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def add(self, event: str, step: str = "", unit: str = "", **more: Any) -> None:
        """Write an event to the disk."""
        row = {"event": event, "step": step, "unit": unit, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **more}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(("" if self._ends_whole() else "\n") + json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._note(row)

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return size == 0 or file.read(1) == b"\n"

    def _note(self, event: dict[str, Any]) -> None:
        state = self.state(event["step"], event["unit"])
        if event["event"] == "begin":
            state.begun += 1
        elif event["event"] == "further":
            state.begun = 0
        elif event["event"] == "end":
            state.ended = event
        elif event["event"] == "again":
            for key in [key for key in self.states if key[0] == event["step"]]:
                self.states[key] = UnitState()

    def state(self, step: str, unit: str) -> UnitState:
        """Return where a unit stands."""
        return self.states.setdefault((step, unit), UnitState())

    def left(self, step: Step, tiny: bool) -> list[str]:
        """List the units of a step that have not ended."""
        return [unit.name for unit in step.units(tiny) if self.state(step.name, unit.name).ended is None]

    def failed(self, step: Step, tiny: bool) -> list[str]:
        """List the units of a step that ended with an error."""
        return [unit.name for unit in step.units(tiny) if (self.state(step.name, unit.name).ended or {}).get("error")]

    def give_up(self, step: Step, tiny: bool) -> None:
        """End units that never do."""
        for unit in self.left(step, tiny):
            if self.state(step.name, unit).begun >= ATTEMPTS:
                self.add("end", step.name, unit, rows=[], error=f"it did not end in {ATTEMPTS} attempts of {step.minutes:g} minutes")


def in_words(step: Step, results: Results, tiny: bool) -> str:
    """Say in a line where a step stands."""
    units, left, failed = step.units(tiny), results.left(step, tiny), results.failed(step, tiny)
    where = "done" if not left else f"{len(units) - len(left)} of {len(units)} done, left: {', '.join(left)}"
    return f"{step.name:<24} {where}{f'; failed: {chr(44).join(failed)}' if failed else ''}"


def page(steps: Sequence[Step], results: Results, tiny: bool, versions: Sequence[str]) -> str:
    """Write all that was found as Markdown."""
    parts = ["# On a GPU" if not tiny else "# A rehearsal: small sizes, on the CPU", "\n".join(f"    {line}" for line in versions)]
    for step in steps:
        ended = [found for unit in step.units(tiny) if (found := results.state(step.name, unit.name).ended) is not None]
        if not ended:
            continue
        parts.append(f"## {step.name}\n\n{step.what}. {', '.join(sorted({found['at'][:10] for found in ended}))}")
        parts += _tables([row for found in ended for row in found["rows"]])
        parts += [f"{found['unit']}: **{found['error']}**" for found in ended if found.get("error")]
    return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table for each run of rows that have the same names; a name that only some have is empty in others."""
    from edit_compile.report.markdown import markdown_table

    start = 0
    while start < len(rows):
        stop, head = start, dict[str, None]()
        first = next(iter(rows[start]))
        while stop < len(rows) and next(iter(rows[stop])) == first:
            head |= dict.fromkeys(rows[stop])
            stop += 1
        cells = [[_cell(row.get(name)) for name in head] for row in rows[start:stop]]
        numbers = [i for i, name in enumerate(head) if all(isinstance(row.get(name), int | float | None) for row in rows[start:stop])]
        yield markdown_table(list(head), cells, numbers)
        start = stop


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}" if isinstance(value, float) else str(value)
