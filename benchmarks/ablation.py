"""Which options make the better student: `python benchmarks/ablation.py --out runs/ablation [--seeds 3] [--set stage.0.steps=500 ...]`.

Every row distils demo/mm-dit by the same recipe, with one option changed, and gives the held-out relative output error
(sum |student - teacher|^2 / sum |teacher - mean|^2, over all timesteps) and the seconds of training. Finished runs are kept in
`OUT`, so a rerun continues; `OUT/table.md` is written anew after each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from edit_compile.distill import distill, load_recipe

ROWS: dict[str, tuple[str, ...]] = {
    "the recipe": (),
    "eta: ratio (the paper's)": ("convert.eta=ratio",),
    "eta: calibrated": ("convert.eta=calibrated",),
    "reduction: 2": ("convert.reduction=2",),
    "reduction: 8": ("convert.reduction=8",),
    "text_keys: compressed": ("convert.text_keys=compressed",),
    "no warm start, its time given to the stage": ("warm_start=null",),
    "no ConvFusion (-/SC/SC)": ("convert.query=plain",),
    "no compressor (CF/-/-)": ("convert.key=plain", "convert.value=plain"),
    "plain linear attention (-/-/-)": ("convert.query=plain", "convert.key=plain", "convert.value=plain"),
    "random start": ("convert.identity=false",),
}


def error_of(folder: Path, overrides: tuple[str, ...]) -> dict[str, float]:
    """The held-out errors and the seconds of one run, done now unless it was done before."""
    result = folder / "result.json"
    if not result.exists():
        distill(load_recipe("demo-mm-dit", overrides), folder)
    found = json.loads(result.read_text())
    errors = found["held_out_error"]
    return {"before": errors["before"]["total"], "after": errors["after"]["total"], "seconds": found["seconds"]}


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| options | seeds | error before | error after: median (min to max) | seconds |", "|---|---|---|---|---|"]
    for name, found in runs.items():
        after = [run["after"] for run in found]
        before, seconds = (statistics.median(run[key] for run in found) for key in ("before", "seconds"))
        spread = f"{statistics.median(after):.5f} ({min(after):.5f} to {max(after):.5f})"
        lines.append(f"| {name} | {len(found)} | {before:.3f} | {spread} | {seconds:.0f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="an override of the recipe, for every row")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for number, (name, overrides) in enumerate(ROWS.items()):
            found = error_of(args.out / f"{number}-{seed}", (*args.set, *overrides, f"seed={seed}"))
            runs.setdefault(name, []).append(found)
            (args.out / "table.md").write_text(table(runs))
            print(f"{name}, seed {seed}: {found['after']:.5f}", flush=True)


if __name__ == "__main__":
    main()
