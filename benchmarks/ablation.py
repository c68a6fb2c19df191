"""Which options make the better student: `python benchmarks/ablation.py --out runs/ablation [--seeds 0 1 2] [--set KEY=VALUE ...]`.

Every row distils demo/mm-dit by the same recipe, with one option changed; what is given is explained in distillation.py, which also
compares with and without the layerwise fit. Finished runs are kept in `OUT`, so a rerun continues, and seeds may run side by side
(`--seeds 0` and `--seeds 1`, then `--seeds 0 1` for both; `--rows` likewise); `OUT/table.md` is written anew after each.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from distillation import COLUMNS, Run, run, summary

ROWS: dict[str, tuple[str, ...]] = {
    "the recipe": (),
    "eta: ratio (the paper's)": ("convert.eta=ratio",),
    "eta: calibrated": ("convert.eta=calibrated",),
    "reduction: 2": ("convert.reduction=2",),
    "reduction: 8": ("convert.reduction=8",),
    "text_keys: compressed": ("convert.text_keys=compressed",),
    "no ConvFusion (-/SC/SC)": ("convert.query=plain",),
    "no compressor (CF/-/-)": ("convert.key=plain", "convert.value=plain"),
    "plain linear attention (-/-/-)": ("convert.query=plain", "convert.key=plain", "convert.value=plain"),
    "random start": ("convert.identity=false",),
}


def table(runs: dict[str, list[Run]]) -> str:
    lines = [f"| options | {COLUMNS}", "|---" * 7 + "|", *(f"| {name} | {summary(found)}" for name, found in runs.items())]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="NAME", help="default: all")
    parser.add_argument("--set", action="append", default=[], help="an override of the recipe, for every row")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {}
    for seed in args.seeds:
        for name in args.rows:
            folder = args.out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{seed}"
            made = run("demo-mm-dit", folder, (*args.set, *ROWS[name], f"seed={seed}"))
            runs.setdefault(name, []).append(made)
            (args.out / "table.md").write_text(table(runs))
            print(f"{name}, seed {seed}: {made.after:.5f}", flush=True)


if __name__ == "__main__":
    main()
