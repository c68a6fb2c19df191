"""How good a distilled student is, and what the layerwise fit brings: `python benchmarks/distillation.py --out runs/distillation`.

Both demo models of images, by their recipes, with and without the layerwise fit at equal training time, several seeds. Reported are the
relative validation error (sum |student - teacher|^2 / sum |teacher - mean|^2, over all timesteps) and prompt adherence on
the same 200 held-out captions and seeds as the teacher's.

Equal time is a number of steps: without the layerwise fit the stage gets as many more as take its time, by the medians of short runs of
both, alternating, before anything else. So the comparison holds on a busy machine too, and models may run side by side
(`--models mm-dit` and `--models dit`, each with a folder). Finished runs are kept in `OUT`, so a rerun continues; `OUT/table.md` is
written anew after each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import edit_compile as ec
from edit_compile.adapters.load_model import load_model
from edit_compile.demo import models
from edit_compile.demo.prompt_adherence import PromptAdherence, prompt_adherence
from edit_compile.distillation import distill, load_recipe

PROMPTS = 200
COLUMNS = "seeds | error before | error after: median (min to max) | colour and position | shape | seconds |"
TIMED, TURNS = 12, 3  # steps of a short run, and how many of them


@dataclass(frozen=True)
class Run:
    """One student: errors before and after, seconds of training, and shares of objects drawn as described."""

    before: float
    after: float
    seconds: float
    colour_and_place: float
    shape: float


def run(recipe: str, folder: Path, overrides: Sequence[str]) -> Run:
    """A finished run, done now unless it was done before.

    Raises:
        SystemExit: the folder holds the run of another recipe.
    """
    finished, resolved, given = folder / "benchmark.json", load_recipe(recipe, overrides), folder / "recipe.yaml"
    if given.exists() and load_recipe(given) != resolved:
        raise SystemExit(f"{folder} holds the run of another recipe; choose another --out")
    if not finished.exists():
        if not (folder / "result.json").exists():
            distill(resolved, folder, resume=(folder / "checkpoints").exists())
        result = json.loads((folder / "result.json").read_text())
        errors, drawn = result["held_out_error"], prompt_adherence(ec.load(folder), PROMPTS)
        made = Run(errors["before"]["total"], errors["after"]["total"], result["seconds"], drawn.colour_and_place, drawn.shape)
        finished.write_text(json.dumps(asdict(made)))
    return Run(**json.loads(finished.read_text()))


def of_teacher(name: str, folder: Path) -> PromptAdherence:
    """What the teacher draws, measured now unless it was before."""
    finished = folder / "teacher.json"
    if not finished.exists():
        finished.write_text(json.dumps(asdict(prompt_adherence(load_model(f"demo/{name}").model, PROMPTS))))
    return PromptAdherence(**json.loads(finished.read_text()))


def seconds_per_step(recipe: str, folder: Path) -> dict[str, float]:
    """Measure the layerwise fit and the stage, unless that was done before: medians over short, alternating runs of both."""
    finished = folder / "seconds_per_step.json"
    if not finished.exists():
        seconds: dict[str, list[float]] = {"layerwise fit": [], "stage 0": []}
        changes = [f"layerwise.steps={TIMED}", f"stages.0.steps={TIMED}", "log_every=1", "validation.samples=16", "samples.count=1"]
        for turn in range(TURNS):
            rows: list[dict[str, Any]] = []
            distill(load_recipe(recipe, changes), folder / f"timed-{turn}", report=rows.append)
            for name, found in seconds.items():
                found += [row["seconds_per_step"] for row in rows if row["phase"] == name and row["step"] > 2]
        finished.write_text(json.dumps({name: statistics.median(found) for name, found in seconds.items()}))
    return json.loads(finished.read_text())


def steps_without_layerwise_fit(name: str, seconds: dict[str, float]) -> int:
    """Count the steps of the stage that take as long as a recipe's layerwise fit and stage together."""
    recipe = load_recipe(name)
    assert recipe.layerwise is not None
    return recipe.stages[0].steps + round(recipe.layerwise.steps * seconds["layerwise fit"] / seconds["stage 0"])


def summary(runs: list[Run]) -> str:
    """The columns `COLUMNS` of a table, over seeds."""
    after = [run.after for run in runs]
    middle = {key: statistics.median(getattr(run, key) for run in runs) for key in ("before", "seconds", "colour_and_place", "shape")}
    error = f"{statistics.median(after):.5f} ({min(after):.5f} to {max(after):.5f})"
    drawn = f"{middle['colour_and_place']:.1%} | {middle['shape']:.1%}"
    return f"{len(runs)} | {middle['before']:.3f} | {error} | {drawn} | {middle['seconds']:.0f} |"


def table(teachers: dict[str, PromptAdherence], runs: dict[tuple[str, bool], list[Run]]) -> str:
    lines = [f"| model | layerwise fit | {COLUMNS}", "|---" * 8 + "|"]
    for name, drawn in teachers.items():
        lines.append(f"| {name}, teacher | | | | 0 | {drawn.colour_and_place:.1%} | {drawn.shape:.1%} | |")
        lines += [f"| {name} | {'yes' if fitted else 'no'} | {summary(found)}" for (model, fitted), found in runs.items() if model == name]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="*", choices=models.IMAGE_NAMES, default=list(models.IMAGE_NAMES))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    timed = {name: seconds_per_step(f"demo-{name}", args.out / name) for name in args.models}
    teachers = {f"demo/{name}": of_teacher(name, args.out / name) for name in args.models}
    runs: dict[tuple[str, bool], list[Run]] = {}
    for fitted, seed, name in itertools.product((True, False), range(args.seeds), args.models):
        longer = ["layerwise=null", f"stages.0.steps={steps_without_layerwise_fit(f'demo-{name}', timed[name])}"]
        folder = args.out / name / f"{'fitted' if fitted else 'plain'}-{seed}"
        made = run(f"demo-{name}", folder, [*([] if fitted else longer), f"seed={seed}"])
        runs.setdefault((f"demo/{name}", fitted), []).append(made)
        (args.out / "table.md").write_text(table(teachers, runs))
        print(table(teachers, runs), flush=True)


if __name__ == "__main__":
    main()
