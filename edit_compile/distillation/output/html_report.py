"""A finished run as one HTML page that needs nothing else: no files beside it, no scripts, no network."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from edit_compile.bench.machine import Machine
from edit_compile.distillation.evaluate.speed import COLUMNS, Speed
from edit_compile.distillation.evaluate.validation import MEASURE, ValidationResult
from edit_compile.distillation.output.plot import plot_speeds
from edit_compile.distillation.output.run_folder import RunFolder
from edit_compile.errors import DistillError
from edit_compile.files import write_text
from edit_compile.ir.plan import Plan
from edit_compile.student.checkpoint_format import read_index
from edit_compile.words import duration_in_words, without_paths

_EARLIER = 8  # sample grids at most, besides the last
_STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #8884; }
table { border-collapse: collapse; margin: .6rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8883; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; background: white; } img.pixels { image-rendering: pixelated; }
pre { padding: .8rem; overflow-x: auto; background: #8881; }
dl { display: flex; flex-wrap: wrap; gap: 1.5rem; } dt { color: #888; } dd { margin: 0; font-size: 1.35rem; }
figure { margin: .8rem 0; } figcaption { color: #888; }
"""


def write_report(folder: Path, path: Path | None = None) -> Path:
    """Write a finished run's page; returns where.

    Args:
        path: the file; default: `report.html` in the folder.

    Raises:
        DistillError, CheckpointError: as `html_report`; or the file cannot be written.
    """
    path, page = path or folder / "report.html", html_report(folder)
    try:
        write_text(path, page)
    except OSError as error:
        raise DistillError(f"{path} cannot be written: {error}") from error
    return path


def html_report(folder: Path) -> str:
    """Make the page of a finished run from what is in its folder. It names no path of this machine.

    Raises:
        DistillError: the folder holds no finished run.
        CheckpointError: its student's checkpoint cannot be read.
    """
    summary, plan = html_summary(folder), Plan.from_json(json.dumps(read_index(folder).plan))
    content = yaml.safe_load((folder / "recipe.yaml").read_bytes())
    recipe = f"<pre>{escape(yaml.safe_dump(without_paths(content), sort_keys=False))}</pre>"
    sections = (summary, _section("What was done to the model", plan._repr_html_()), _section("Recipe", recipe))
    title = f"{plan.model}, distilled"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>\n{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def html_summary(folder: Path) -> str:
    """Make the part of a run's page that says how it came out, for notebooks.

    Raises:
        DistillError: the folder holds no finished run.
    """
    run = RunFolder(folder)
    result = _read(run)
    before, after, speeds = result.before, result.after, result.speeds
    sections = [
        _facts(before, after, speeds, result.seconds),
        _section("Images", _samples(run), "Teacher and student from the same noise; edit-compile sample draws others."),
        _section("Losses", _plot(folder / "losses.png")),
        _section(
            "Validation error", _table(("", "converted", "distilled"), before.rows_until(after)), f"{MEASURE}; {after.samples} samples."
        ),
        _section("Speed", _speeds(speeds), "Of one image or video, teacher and student in turns, on the machine that trained."),
        _section("Data", _table(("", ""), _data_rows(result.data))),
        _section("Made with", f"<p>{escape(str(result.machine))}</p>"),
    ]
    return "".join(sections)


class _Result(NamedTuple):
    """What `result.json` says."""

    before: ValidationResult
    after: ValidationResult
    speeds: list[Speed]
    seconds: float
    data: dict[str, Any]
    machine: Machine


def _read(run: RunFolder) -> _Result:
    try:
        found = json.loads(run.result.read_bytes())
        before, after = (ValidationResult.from_dict(found["held_out_error"][name]) for name in ("before", "after"))
        speeds = [Speed(**speed) for speed in found["speeds"]]
        return _Result(before, after, speeds, float(found["seconds"]), found["data"] or {}, Machine.model_validate(found["machine"]))
    except FileNotFoundError:
        raise DistillError(f"{run.path} holds no finished run: {run.result.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DistillError(f"{run.result} cannot be read ({reason}): damaged, or of another version") from error


def _facts(before: ValidationResult, after: ValidationResult, speeds: Sequence[Speed], seconds: float) -> str:
    facts = {"validation error, converted": f"{before.total:.3g}", "distilled": f"{after.total:.3g}"}
    if speeds:
        largest = max(speeds, key=lambda speed: speed.height * speed.width)
        facts[f"speed-up at {largest.size}"] = largest.speedup
    facts["training"] = duration_in_words(seconds)
    return "<dl>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()) + "</dl>\n"


def _section(title: str, content: str, note: str = "") -> str:
    """Write a section, unless there is nothing in it."""
    noted = f"<p>{escape(note)}</p>" if note else ""
    return f"<h2>{escape(title)}</h2>{noted}\n{content}\n" if content else ""


def _samples(run: RunFolder) -> str:
    """Show the last sample grid, and fold earlier ones away, evenly chosen if there are many: a page has to be opened."""
    grids = [(int(path.stem), path) for path in sorted((run.path / "samples").glob("*.png")) if path.stem.isdigit()]
    step = max(math.ceil((len(grids) - 1) / _EARLIER), 1)
    figures = [_figure(path.read_bytes(), f"after {total:,} steps", "pixels") for total, path in grids[::-step]]
    earlier = f"<details><summary>earlier in training</summary>{''.join(figures[1:])}</details>" if figures[1:] else ""
    return "".join(figures[:1]) + earlier


def _plot(path: Path) -> str:
    return _figure(path.read_bytes(), "") if path.is_file() else ""


def _data_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name the numbers of a data summary; of its shapes each one."""
    shapes = {f"trained on at {size.replace('x', ' x ')} px": count for size, count in found.get("shapes", {}).items()}
    counts = {name.replace("_", " "): count for name, count in found.items() if name != "shapes"} | shapes
    return [(name, f"{count:,}") for name, count in counts.items()]


def _speeds(speeds: Sequence[Speed]) -> str:
    if not speeds:
        return ""
    plot_speeds(speeds, plot := io.BytesIO())
    return _figure(plot.getvalue(), "") + _table(COLUMNS, [speed.row for speed in speeds])


def _figure(png: bytes, caption: str, kind: str = "") -> str:
    image = f'<img class="{kind}" alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a table, all but its first column aligned to the right if there are more than two; nothing without rows."""
    if not rows:
        return ""

    def line(tag: str, cells: Sequence[object]) -> str:
        kinds = ["", *([' class="number"' if len(head) > 2 else ""] * (len(cells) - 1))]
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(str(cell))}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"

    heads = line("th", head) if any(head) else ""
    return f"<table>{heads}{''.join(line('td', row) for row in rows)}</table>"
