"""Try edit_compile on a tiny model of every transformer class that the installed diffusers has, and on vision transformers.

    python benchmarks/support.py                              # everything; hours on two cores; goes on where it was stopped
    python benchmarks/support.py flux wan --until plan        # configurations with these words in their names; stop after a stage
    python benchmarks/support.py --write docs/support.md      # ... and write the table of all rows

A configuration runs in a process of its own and has a limit of time; its row is appended to a JSON-lines file. Rows of the same
sources of edit_compile are not made again. A class without a configuration has a row that says so: it counts as not right.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from inspect import isclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("original", "plan", "audit", "forward", "teacher", "second size", "to", "save and load", "bf16", "compile")
LIMIT = 300.0  # seconds for one configuration
TOLERANCE = 1e-5  # of the teacher, relative to the original's largest value, but at least absolute
COMPILED_TOLERANCE = 1e-3
PRELOADED = [
    "torch._dynamo",
    "torch.export",
    "edit_compile.api",
    "edit_compile.student.checkpoint",
    "diffusers.models.transformers",
    "tiny_models",
]
WITHOUT = "no configuration yet"
Row = dict[str, Any]


class Wrong(Exception):
    """What was got where something else is right."""


class Done(Exception):
    """Nothing more is to be tried, and all is right so far."""


# ---------------------------------------------------------------------------------------------- one configuration


class Trial:
    """Tries one configuration, stage by stage, and fills its row."""

    def __init__(self, one: Any, row: Row, until: str, backend: str) -> None:
        self.one, self.row, self.until, self.backend = one, row, until, backend

    def run(self) -> None:
        """Run the stages.

        Raises:
            Wrong: one of them is not as it should be; says what and where.
        """
        for stage in STAGES:
            begin = time.perf_counter()
            try:
                self.row["stages"][stage] = getattr(self, f"try_{stage.replace(' ', '_')}")() or "yes"
            except Done:
                return
            except Wrong as wrong:
                raise Wrong(f"{stage}: {wrong}") from wrong
            except Exception as error:
                raise Wrong(f"{stage}: {type(error).__name__}: {_first_line(error)}") from error
            finally:
                self.row["seconds"][stage] = round(time.perf_counter() - begin, 1)
            if stage == self.until:
                return

    def try_original(self) -> None:
        import torch

        self.model = self.one.model()
        self.given = [self.one.inputs(size) for size in self.one.sizes]
        torch.manual_seed(0)
        self.original = [_run(self.model, given) for given in self.given]
        if not all(output.isfinite().all() for outputs in self.original for output in outputs):
            raise Wrong("the original's output is not finite: the configuration is bad")

    def try_plan(self) -> str:
        import edit_compile as ec
        from edit_compile.api import plan_and_convert

        try:
            if self.until == "plan":
                self.plan = ec.plan(self.model, example_inputs=self.given[0])
            else:
                self.plan, self.student = plan_and_convert(self.model, example_inputs=self.given[0])
        except ec.EditCompileError as error:
            if self.one.error and re.search(self.one.error, str(error)):
                self.row["refused"] = str(error)
                raise Done from None
            raise
        self.row |= _summary(self.plan)
        self.row["faults"] = faults = _faults(self.one, self.plan)
        if faults:
            raise Wrong(faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
        if not self.plan.rewritten:
            raise Done
        return "yes"

    def try_audit(self) -> None:
        import edit_compile as ec

        ec.audit(self.student)

    def try_forward(self) -> None:
        self.outputs = [self._forward(0)]

    def _forward(self, number: int, student: Any = None) -> list[Any]:
        """The student's outputs at one of the sizes, held against the original's shapes and values."""
        outputs, original = self._call(number, student or self.student), self.original[number]
        if [o.shape for o in outputs] != [o.shape for o in original]:
            raise Wrong(f"shapes {[tuple(o.shape) for o in outputs]}")
        if not all(output.isfinite().all() for output in outputs):
            raise Wrong("the output is not finite")
        if all(output.equal(other) for output, other in zip(outputs, original, strict=True)):
            raise Wrong("the student computes what the original does")
        return outputs

    def _call(self, number: int, student: Any, change: Callable[[Any], Any] = lambda given: given) -> list[Any]:
        """Call the student; the grid is stated where it has to be and may be."""
        import edit_compile as ec

        size = self.one.sizes[number]
        sizes = (size.frames, size.height, size.width) if self.one.dimensions == 3 else (size.height, size.width)
        with ec.grid(student, *sizes) if self.one.stated else nullcontext():
            return _run(student, change(self.given[number]))

    def try_teacher(self) -> str:
        import edit_compile as ec

        with ec.teacher(self.student):
            far = _far(_run(self.student, self.given[0]), self.original[0])
        if not far <= TOLERANCE:
            raise Wrong(f"differs from the original by {far:.1e}")
        return f"{far:.0e}" if far else "0"

    def try_second_size(self) -> None:
        import edit_compile as ec

        self._forward(1)
        with ec.teacher(self.student):
            far = _far(_run(self.student, self.given[1]), self.original[1])
        if not far <= TOLERANCE:
            raise Wrong(f"the teacher differs from the original by {far:.1e}")

    def try_to(self) -> None:
        import torch

        self.student.to("cpu", torch.float64).to(torch.float32)
        if (far := _far(self._forward(0), self.outputs[0])) > TOLERANCE:
            raise Wrong(f"after .to(float64).to(float32) the student differs by {far:.1e}")

    def try_save_and_load(self) -> None:
        import edit_compile as ec

        with tempfile.TemporaryDirectory() as folder:
            ec.save(self.student, folder)
            self.loaded = ec.load(folder, base=self.one.model())
        if (far := _far(self._forward(0, self.loaded), self.outputs[0])) > TOLERANCE:
            raise Wrong(f"the loaded student differs by {far:.1e}")

    def try_bf16(self) -> str:
        """In place, on the loaded student. A class that cannot run in bfloat16 itself is not asked for it."""
        import torch

        try:
            _run(self.one.model().to(torch.bfloat16), _as_bf16(self.given[0]))
        except Exception as error:
            return f"the original does not run: {_first_line(error)[:60]}"
        outputs = self._call(0, self.loaded.to(torch.bfloat16), _as_bf16)
        if not all(output.isfinite().all() for output in outputs):
            raise Wrong("the output is not finite")
        return "yes"

    def try_compile(self) -> str:
        """As `edit_compile.compile` does. Where the original's blocks cannot be compiled, the student's are not asked for it."""
        import torch

        import edit_compile as ec

        ec.compile(self.student, backend=self.backend)
        try:
            with torch.compiler.set_stance("default"):
                outputs = self._call(0, self.student)
        except Exception as error:
            if why := self._original_uncompiled():
                return f"the original does not either: {why}"
            raise Wrong(f"{type(error).__name__}: {_first_line(error)}") from error
        if (far := _far(outputs, self.outputs[0])) > COMPILED_TOLERANCE:
            raise Wrong(f"the compiled student differs by {far:.1e}")
        return "yes"

    def _original_uncompiled(self) -> str:
        import torch

        from edit_compile.api import block_options, repeated_blocks

        torch.compiler.reset()
        model = self.one.model()
        for path in repeated_blocks(self.student):
            model.get_submodule(path).compile(**block_options({"backend": self.backend}))
        try:
            with torch.compiler.set_stance("default"):
                _run(model, self.given[0])
        except Exception as error:
            return _first_line(error)[:60]
        return ""


def _faults(one: Any, plan: Any) -> list[str]:
    """Hold the plan's attention sites against the configuration's: what is not treated as it should be."""
    faults = []
    for site in plan.sites:
        if site.kind != "attention":
            continue
        word = next((word for pattern, word in one.sites.items() if fnmatch.fnmatchcase(site.path, pattern)), None)
        action, _, reason = (word or "").partition(": ")
        if word is None:
            faults.append(f"unexpected attention at {site.path}: {site.action}, {site.reason}")
        elif ("rewrite" if site.rewritten else "keep") not in action.split("|") or (reason and not re.search(reason, site.reason)):
            faults.append(f"{site.path} {site.action} {site.query_layout} x {site.key_layout}, {site.reason}")
        elif site.reason.startswith("already linear") and "linear" not in reason:
            faults.append(f"{site.path} is called already linear")
        elif site.rewritten and site.grid is not None and len(site.grid.sizes) != one.dimensions:
            faults.append(f"{site.path} {site.action} on the grid {site.grid}, not one of {one.dimensions} dimensions")
    paths = [site.path for site in plan.sites]
    wanted = [pattern for pattern, word in one.sites.items() if word == "rewrite"]
    faults += [f"no attention at {pattern}" for pattern in wanted if not any(fnmatch.fnmatchcase(path, pattern) for path in paths)]
    return faults


def _summary(plan: Any) -> Row:
    sites = [site for site in plan.sites if site.kind == "attention"]
    kept: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        if not site.rewritten:
            kept[site.reason].append(site.path)
    return {
        "sites": len(sites),
        "rewritten": sum(site.rewritten for site in sites),
        "designs": dict(Counter(site.action for site in sites if site.rewritten)),
        "grid": {"sizes": "found", "ids": "position ids", "given": "stated"}.get(plan.grid.kind, plan.grid.kind),
        "kept": {reason: [*paths[:2], *(["..."] if len(paths) > 2 else [])] for reason, paths in kept.items()},
    }


def _run(model: Any, given: dict[str, Any]) -> list[Any]:
    """All tensors that the model returns."""
    import torch
    from torch.utils._pytree import tree_leaves

    with torch.no_grad():
        return [
            leaf.detach().clone() for leaf in tree_leaves(model(**given)) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        ]


def _far(ones: list[Any], others: list[Any]) -> float:
    """The largest difference, relative to the largest value where that is over one."""
    if len(ones) != len(others):
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(ones, others, strict=True))


def _as_bf16(given: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x, given)


def _first_line(error: BaseException) -> str:
    return re.sub(r"/\S*/", "", (str(error).strip().splitlines() or [""])[0])[:400]


# ---------------------------------------------------------------------------------------------- processes


def attempt(name: str, until: str, backend: str, answer: Connection, verbose: bool) -> None:
    """Try a configuration in this process and send its row after every stage."""
    if not verbose:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    import torch
    from tiny_models import CONFIGURATIONS

    torch.set_num_threads(1)
    one = CONFIGURATIONS[name]
    row: Row = {
        "name": name,
        "group": one.group,
        "note": one.note,
        "until": until,
        "stages": {},
        "seconds": {},
        "right": False,
        "fault": "",
    }
    try:
        Trial(one, row, until, backend).run()
        row["right"] = True
    except Wrong as wrong:
        row["fault"] = str(wrong)
        if verbose:
            traceback.print_exc()
    answer.send(row)


def row_of(context: Any, name: str, until: str, backend: str, limit: float, verbose: bool) -> Row:
    """Try a configuration in a process of its own, killed after `limit` seconds."""
    begin = time.perf_counter()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(name, until, backend, there, verbose))
    process.start()
    there.close()
    try:
        row = here.recv() if here.poll(limit) else {"fault": f"no answer in {limit:.0f} s"}
    except EOFError:
        row = {"fault": "its process ended without an answer"}
    finally:
        process.kill()
        process.join(10)
    return {"name": name, "until": until, "right": False, "stages": {}, **row, "wall": round(time.perf_counter() - begin, 1)}


def digest() -> str:
    """Of the sources of edit_compile, and the releases of what it reads."""
    import diffusers
    import torch

    import edit_compile

    found = hashlib.sha256(f"{torch.__version__} {diffusers.__version__}".encode())
    for path in sorted(Path(edit_compile.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------- what there is


NOT_TRIED = {"RFD4ProteinaTransformer": "a model of proteins: neither images nor video, and attention over pairs of residues"}


def classes() -> list[str]:
    """The transformer classes that the installed diffusers exports, those without a configuration too."""
    import diffusers
    import diffusers.models.transformers as home

    exported = set(dir(diffusers))
    return [name for name, value in sorted(vars(home).items()) if isclass(value) and name in exported and hasattr(value, "forward")]


def names_of(words: list[str]) -> tuple[list[str], list[str]]:
    """The configurations with one of the words in their names, and the classes without a configuration."""
    from tiny_models import CONFIGURATIONS

    found = (name for word in words or [""] for name in CONFIGURATIONS if word.lower() in name.lower())
    chosen = list(dict.fromkeys(found))
    known = {name.partition("/")[0] for name in CONFIGURATIONS}
    return chosen, [name for name in classes() if name not in known and name not in NOT_TRIED]


def read(path: Path) -> dict[str, Row]:
    """The last row of every configuration."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = (json.loads(line) for line in lines if line.strip())
    return {row["name"]: row for row in rows}


def main(arguments: list[str] | None = None) -> int:
    given = parsed(arguments)
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    chosen, _ = names_of(given.words)
    if given.list:
        print("\n".join(chosen))
        return 0
    sources, old = digest(), read(given.rows)
    todo = [name for name in chosen if not _settled(old.get(name), sources, given)]
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    one = partial(row_of, context, until=given.until, backend=given.backend, limit=given.limit, verbose=given.verbose)
    with ThreadPoolExecutor(given.jobs) as pool, given.rows.open("a") as file:
        for row in pool.map(one, todo):
            file.write(json.dumps({**row, "sources": sources}) + "\n")
            file.flush()
            print(f"{'right' if row['right'] else 'WRONG'} {row['wall']:6.1f} s  {row['name']:44}  {row['fault']}".rstrip(), flush=True)
    rows = {name: row for name, row in read(given.rows).items() if name in chosen}
    print(f"{sum(row['right'] for row in rows.values())} of {len(chosen)} right")
    if given.write:
        given.write.write_text(document(read(given.rows)))
    return 0 if all(name in rows and rows[name]["right"] for name in chosen) else 1


def _settled(row: Row | None, sources: str, given: argparse.Namespace) -> bool:
    if row is None or given.again or STAGES.index(row["until"]) < STAGES.index(given.until):
        return False
    return row["sources"] == sources or (given.keep_right and row["right"])


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only configurations with one of these words in their names")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="Markdown file to write the table of all rows to")
    parser.add_argument(
        "--rows", type=Path, default=ROOT / "build" / "support.jsonl", help="JSON-lines file of the rows (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="make rows again that are there")
    parser.add_argument("--keep-right", action="store_true", help="do not make right rows again that other sources made")
    parser.add_argument("--jobs", type=int, default=1, help="configurations at a time (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one configuration (default: %(default)s)")
    parser.add_argument("--backend", default="eager", help="of torch.compile (default: %(default)s; inductor takes minutes a class)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--verbose", action="store_true", help="show the output and the tracebacks of the processes")
    return parser.parse_args(arguments)


# ---------------------------------------------------------------------------------------------- the document


COLUMNS = (
    "class",
    "right",
    "rewritten",
    "grid",
    "teacher",
    "second size",
    ".to",
    "save, load",
    "bf16",
    "compile",
    "seconds",
    "left unchanged, or what is wrong",
)
SHOWN = ("teacher", "second size", "to", "save and load", "bf16", "compile")


def document(rows: dict[str, Row]) -> str:
    """The rows as Markdown, a table a group, with those that have no row yet."""
    import diffusers
    import timm
    import torch
    import transformers
    from tiny_models import CONFIGURATIONS

    releases = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, diffusers, timm, transformers))
    groups: dict[str, list[str]] = defaultdict(list)
    for name, one in CONFIGURATIONS.items():
        groups[one.group].append(name)
    _, unknown = names_of([])
    lines = [
        "# Which models work",
        "",
        f"Made by `make support` ({time.strftime('%Y-%m-%d')}; {releases}): a tiny random model of every class goes through all of "
        "edit_compile, from the plan to a compiled student. Do not edit.",
        "",
        *_totals(groups, rows, unknown),
    ]
    for group, names in groups.items():
        lines += ["", f"## {group}", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        lines += [_line(name, rows.get(name), CONFIGURATIONS[name].note) for name in sorted(names)]
    if unknown:
        lines += ["", f"## {WITHOUT.capitalize()}", "", *(f"- {name}" for name in unknown)]
    lines += ["", "## Not tried", "", *(f"- {name}: {why}" for name, why in NOT_TRIED.items())]
    return "\n".join([*lines, "", *_LEGEND.strip().splitlines(), ""])


_LEGEND = """
## The columns

- **right**: every attention is treated as it should be for this class, decided by reading the model: rewritten, or left unchanged
  for a reason that is true; and everything in the row holds. A model in which data decides the control flow cannot be captured:
  it is right to refuse it, naming the line.
- **rewritten**: of how many attention computations, by which designs. **grid**: how the student learns the grid of image tokens:
  from the sizes of its inputs, from position ids, or stated by the caller with `edit_compile.grid`.
- **teacher**: the largest difference between `edit_compile.teacher` and the original, float32. **second size**: another resolution,
  aspect, batch, text length and number of frames, student and teacher.
- **.to**: float64 and back. **save, load**: the same output after `save` and `load`. **bf16**: a finite output in bfloat16.
  **compile**: `edit_compile.compile` with `fullgraph=True` computes what the eager student does.
"""


def _totals(groups: dict[str, list[str]], rows: dict[str, Row], unknown: list[str]) -> list[str]:
    lines = ["| | configurations | run | right | of those run | converted | nothing to convert | refused as a whole |", "|" + "---|" * 8]
    everything = [name for names in groups.values() for name in names]
    for group, names in (*groups.items(), ("**all**", everything)):
        run = [rows[name] for name in names if name in rows]
        right = [row for row in run if row["right"]]
        converted, refused = sum(row.get("rewritten", 0) > 0 for row in right), sum("refused" in row for row in right)
        counts = (len(names), len(run), len(right), f"{len(right) / len(run):.0%}" if run else "", converted)
        lines.append(f"| {' | '.join(map(str, (group, *counts, len(right) - converted - refused, refused)))} |")
    if unknown:
        lines.append(f"| {WITHOUT} | {len(unknown)} | 0 | 0 | | | | |")
    return lines + _incomplete(everything, rows)


def _incomplete(names: list[str], rows: dict[str, Row]) -> list[str]:
    """Say what the reader of a page must know that was not made in one go."""
    found = [rows[name] for name in names if name in rows]
    short, states = sum(row["right"] and row["until"] != STAGES[-1] for row in found), len({row["sources"] for row in found})
    said = [f"{len(names) - len(found)} configurations were not run"] if len(found) < len(names) else []
    said += [f"{short} were tried up to a stage only"] if short else []
    said += [f"the rows are of {states} states of the sources"] if states > 1 else []
    return ["", f"Not complete: {', '.join(said)}. `make support` goes on."] if said else []


def _line(name: str, row: Row | None, note: str) -> str:
    if row is None:
        return f"| {name} | not run |" + " |" * (len(COLUMNS) - 2)
    stages, designs = row["stages"], row.get("designs", {})
    rewritten = f"{row['rewritten']} of {row['sites']}" if "sites" in row else ""
    if designs:
        rewritten += f": {', '.join(sorted(designs))}"
    said = [row["fault"]] if row["fault"] else [row["refused"]] if "refused" in row else _kept(row.get("kept", {}))
    right = "**no**" if not row["right"] else "yes" if row["until"] == STAGES[-1] else f"yes, up to {row['until']}"
    cells = [name, right, rewritten, row.get("grid", "") if designs else ""]
    cells += [stages.get(stage, "") for stage in SHOWN]
    cells += [f"{sum(row.get('seconds', {}).values()):.0f}", "; ".join([*([note] if note else []), *said])]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _kept(kept: dict[str, list[str]]) -> list[str]:
    return [f"{paths[0]}{' ...' if len(paths) > 1 else ''}: {reason}" for reason, paths in kept.items()]


if __name__ == "__main__":
    sys.exit(main())
