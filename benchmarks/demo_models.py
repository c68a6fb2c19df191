"""How well the demo teachers draw what their captions say: `python benchmarks/demo_models.py [--out FILE.md]`.

200 held-out captions, 25 Euler steps with guidance, read back by the deterministic checkers of `edit_compile.demo`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edit_compile.adapters.load_model import load_model
from edit_compile.demo import models
from edit_compile.demo.prompt_adherence import group_adherence, motion_adherence, prompt_adherence

PROMPTS, STEPS = 200, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write; default: standard output")
    out = parser.parse_args().out
    lines = [
        f"# Demo teachers: objects drawn as described, {PROMPTS} held-out captions, {STEPS} steps",
        "",
        "| model | parameters | objects | colour and position | shape |",
        "|---|---|---|---|---|",
    ]
    for source in [f"demo/{name}" for name in models.IMAGE_NAMES]:
        model = load_model(source).model
        found = prompt_adherence(model, PROMPTS, steps=STEPS)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        lines.append(f"| {source} | {size:.2f}M | {found.objects} | {found.colour_and_place:.1%} | {found.shape:.1%} |")
    lines += [
        "",
        "| model | parameters | groups | colour and position | count | size | shape | texture | background | nothing else | all |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for source in [f"demo/{name}" for name in models.LARGE_NAMES]:
        model = load_model(source).model
        drawn, size = group_adherence(model, PROMPTS, steps=STEPS), sum(p.numel() for p in model.parameters()) / 1e6
        groups, *parts = drawn.to_dict().values()
        lines.append(f"| {source} | {size:.2f}M | {groups} | {' | '.join(f'{part:.1%}' for part in parts)} |")
    teacher = load_model(f"demo/{models.VIDEO_NAME}").model
    moved, size = motion_adherence(teacher, PROMPTS, steps=STEPS), sum(p.numel() for p in teacher.parameters()) / 1e6
    lines += ["", "| model | parameters | clips | colour | shape | motion | all three |", "|---|---|---|---|---|---|---|"]
    shares = " | ".join(f"{share:.1%}" for share in (moved.colour, moved.shape, moved.motion, moved.all))
    lines.append(f"| demo/{models.VIDEO_NAME} | {size:.2f}M | {moved.clips} | {shares} |")
    text = "\n".join([*lines, ""])
    print(text) if out is None else out.write_text(text)


if __name__ == "__main__":
    main()
