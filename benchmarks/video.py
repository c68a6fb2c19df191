"""What distillation makes of the demo video model, with each temporal kernel: `python benchmarks/video.py --out runs/video`.

`demo-video`, by its recipe, for every kind of temporal kernel and several seeds. Reported are the relative validation error
(sum |student - teacher|^2 / sum |teacher - mean|^2, over all timesteps) of the converted model and of the distilled one, and how many
held-out captions their clips obey, read back by the checker of `edit_compile.demo.motion`. Teacher and students draw from the same noise.

Finished runs are kept in `OUT`, so a rerun continues, and `--temporal` and `--seeds` may ask for some of them at a time; `OUT/table.md`
and `OUT/table.json`, of all that are there, are written anew after each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import edit_compile as ec
from edit_compile.adapters.load_model import load_model
from edit_compile.demo import models
from edit_compile.demo.prompt_adherence import MotionAdherence, motion_adherence
from edit_compile.distillation import distill, load_recipe
from edit_compile.distillation.models import make_student

RECIPE, TEACHER = "demo-video", f"demo/{models.VIDEO_NAME}"
TEMPORAL = ("none", "centred", "causal")
COLUMNS = ("temporal", "model", "seeds", "relative error", "colour", "shape", "motion", "all three", "seconds")


@dataclass(frozen=True)
class Run:
    """One student: errors and obedience before and after distillation, and seconds of training."""

    before: float
    after: float
    drawn_before: MotionAdherence
    drawn_after: MotionAdherence
    seconds: float

    @classmethod
    def read(cls, path: Path) -> Run:
        """Restore a run from JSON."""
        content = json.loads(path.read_text())
        drawn = {name: MotionAdherence(**content.pop(name)) for name in ("drawn_before", "drawn_after")}
        return cls(**content, **drawn)


def run(temporal: str, seed: int, folder: Path, clips: int, overrides: Sequence[str]) -> Run:
    """Distil one student, unless it was done before."""
    finished = folder / "benchmark.json"
    if not finished.exists():
        recipe = load_recipe(RECIPE, [*overrides, f"convert.temporal={temporal}", f"seed={seed}"])
        drawn_before = motion_adherence(make_student(recipe).model, clips)
        unfinished = not (folder / "result.json").exists()
        student = distill(recipe, folder, resume=(folder / "checkpoints").exists()).student if unfinished else ec.load(folder)
        result = json.loads((folder / "result.json").read_text())
        before, after = (result["held_out_error"][name]["total"] for name in ("before", "after"))
        made = Run(before, after, drawn_before, motion_adherence(student, clips), result["seconds"])
        finished.write_text(json.dumps(asdict(made), indent=2))
    return Run.read(finished)


def of_teacher(folder: Path, clips: int) -> MotionAdherence:
    """Measure what the teacher draws, unless it was done before."""
    finished = folder / "teacher.json"
    if not finished.exists():
        finished.write_text(json.dumps(asdict(motion_adherence(load_model(TEACHER).model, clips)), indent=2))
    return MotionAdherence(**json.loads(finished.read_text()))


def table(teacher: MotionAdherence, runs: dict[str, list[Run]]) -> str:
    """Lay the runs out in Markdown: medians over seeds, with the least and the greatest error."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", f"| | teacher | | 0 | {_shares([teacher])} | |"]
    for temporal, found in runs.items():
        lines += [f"| {' | '.join(row)} |" for row in _rows(temporal, found)]
    return "\n".join([*lines, "", f"Obedience: {teacher.clips} held-out captions each.", ""])


def _rows(temporal: str, runs: list[Run]) -> Iterator[tuple[str, ...]]:
    seeds, seconds = str(len(runs)), f"{statistics.median(run.seconds for run in runs):.0f}"
    yield temporal, "converted", seeds, _error([run.before for run in runs]), _shares([run.drawn_before for run in runs]), ""
    yield temporal, "distilled", seeds, _error([run.after for run in runs]), _shares([run.drawn_after for run in runs]), seconds


def _error(errors: Sequence[float]) -> str:
    spread = f" ({min(errors):.4f} to {max(errors):.4f})" if len(errors) > 1 else ""
    return f"{statistics.median(errors):.4f}{spread}"


def _shares(drawn: Sequence[MotionAdherence]) -> str:
    return " | ".join(f"{statistics.median(getattr(one, name) for one in drawn):.1%}" for name in ("colour", "shape", "motion", "all"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/video"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--temporal", nargs="*", choices=TEMPORAL, default=list(TEMPORAL))
    parser.add_argument("--clips", type=int, default=100, help="held-out captions for obedience")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = of_teacher(args.out, args.clips)
    for seed in range(args.seeds):
        for temporal in args.temporal:
            run(temporal, seed, args.out / f"{temporal}-{seed}", args.clips, args.overrides)
            found = {name: [Run.read(path) for path in sorted(args.out.glob(f"{name}-*/benchmark.json"))] for name in TEMPORAL}
            runs = {name: some for name, some in found.items() if some}
            content = {"teacher": asdict(teacher), "runs": {name: [asdict(one) for one in some] for name, some in runs.items()}}
            (args.out / "table.json").write_text(json.dumps(content, indent=2))
            (args.out / "table.md").write_text(table(teacher, runs))
            print(table(teacher, runs), flush=True)


if __name__ == "__main__":
    main()
