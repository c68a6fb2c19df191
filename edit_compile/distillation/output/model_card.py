"""The model card: the README of a finished folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from edit_compile.distillation.evaluate.speed import Speed
from edit_compile.distillation.evaluate.validation import ValidationResult
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.ir.plan import Plan


def model_card(
    recipe: Recipe,
    plan: Plan,
    base: str | None,
    before: ValidationResult,
    after: ValidationResult,
    speeds: Sequence[Speed],
    images: Sequence[Path],
) -> str:
    """Write Markdown with the hub's front matter: use, errors, speed, images, plan and recipe.

    Args:
        base: where the base model is; None if unknown.
        images: files in the folder to show, relative to it.
    """
    front = {
        "library_name": "edit_compile",
        "tags": ["diffusion", "linear-attention", *sorted({site.action for site in plan.rewritten}), "distillation"],
    }
    if base is not None and "/" in base and not Path(base).exists() and not base.startswith("demo/"):
        front["base_model"] = base
    rewritten = f"{len(plan.rewritten)} of {len(plan.sites)}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {plan.model} with linear attention",
        f"Distilled from {base or 'its base model'} by edit_compile: {rewritten} attention sites were rewritten.",
        "```python\nimport edit_compile\n\nstudent = edit_compile.load('this folder')\n```",
        "## Validation error\n\nsum |student - teacher|² / sum |teacher - mean|² of the predictions, on samples that training never saw.",
        _errors(before, after),
        "## Speed\n\nMilliseconds per forward of one image, on the machine it was trained on.",
        _speeds(speeds),
        *(f"![{path.stem}]({path.as_posix()})" for path in images),
        f"## Plan\n\n```\n{plan}\n```",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe.model_dump(mode='json'), sort_keys=False)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _errors(before: ValidationResult, after: ValidationResult) -> str:
    rows = [("all", before.total, after.total)]
    rows += [(a.timesteps, b.error, a.error) for b, a in zip(before.bins, after.bins, strict=True)]
    rows += [(f"all, at {size} px", before.resolutions[size], error) for size, error in after.resolutions.items()]
    return _table(("timesteps", "converted", "distilled"), [(name, _error(b), _error(a)) for name, b, a in rows])


def _error(error: float) -> str:
    return f"{error:.4f}" if error >= 0.001 else f"{error:.1e}"


def _speeds(speeds: Sequence[Speed]) -> str:
    rows = [(f"{s.size} px", f"{1000 * s.teacher:.1f}", f"{1000 * s.student:.1f}") for s in speeds]
    return _table(("resolution", "teacher", "student"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
