"""The model card: the README of a finished folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from edit_compile.adapters.hub_access import card_of
from edit_compile.adapters.model_names import is_on_hub
from edit_compile.distillation.evaluate.speed import Speed
from edit_compile.distillation.evaluate.validation import ValidationResult
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.ir.plan import Plan
from edit_compile.report.markdown import markdown_table

THIS = "this folder"  # in a card's code; where it is uploaded, the repository's id
_MEASURE = "sum |student - teacher|² / sum |teacher - mean|² of the predictions, on samples that training never saw"


def model_card(
    recipe: Recipe,
    plan: Plan,
    base: str | None,
    before: ValidationResult,
    after: ValidationResult,
    speeds: Sequence[Speed],
    images: Sequence[Path],
) -> str:
    """Write Markdown with the hub's front matter: use, errors, speed, images, plan and recipe. It names no path of this machine.

    Args:
        base: where the base model is; None if unknown.
        images: files in the folder to show, relative to it.
    """
    on_hub = base if base is not None and is_on_hub(base) else None
    known = on_hub or (base if base is not None and base.startswith("demo/") else None)
    rewritten = f"{len(plan.rewritten)} of {len(plan.sites)}"
    parts = [
        f"---\n{_metadata(plan, on_hub, after).to_yaml()}\n---",
        f"# {plan.model} with linear attention",
        f"Distilled from {known or 'its base model'} by edit_compile: {rewritten} attention sites were rewritten.",
        f"```python\n{_code(known)}\n```",
        f"## Validation error\n\n{_MEASURE}.",
        _errors(before, after),
        "## Speed\n\nMilliseconds per forward of one image, on the machine it was trained on.",
        _speeds(speeds),
        *(f"![{path.stem}]({path.as_posix()})" for path in images),
        f"## Plan\n\n```\n{plan}\n```",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(_without_paths(recipe.model_dump(mode='json')), sort_keys=False)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(plan: Plan, base: str | None, after: ValidationResult) -> ModelCardData:
    """Make the front matter; licence and task are those that the base's own card names."""
    of_base: dict[str, Any] = dict(card_of(base)) if base is not None else {}
    task = of_base.get("pipeline_tag")
    error = EvalResult(
        task_type=str(task),
        dataset_type="held-out",
        dataset_name="held-out samples of the training data",
        metric_type="relative-error",
        metric_name="relative output error to the teacher",
        metric_value=float(_error(after.total)),
    )
    return ModelCardData(
        library_name="edit_compile",
        tags=["diffusion", "linear-attention", *sorted({site.action for site in plan.rewritten}), "distillation"],
        base_model=base,
        base_model_relation="finetune" if base is not None else None,
        model_name=f"{plan.model} with linear attention",
        eval_results=[error] if task else None,
        **of_base,
    )


def _code(base: str | None) -> str:
    """Write what loads the student and draws with it."""
    if base is None:
        return f'import edit_compile\n\nstudent = edit_compile.load("{THIS}")'
    if base.startswith("demo/"):
        return f'import edit_compile\n\nedit_compile.sample("{THIS}", "a small red circle").save("samples.png")'
    return f'import edit_compile\n\npipe = edit_compile.load_pipeline("{THIS}", base="{base}")\nimage = pipe("a lighthouse").images[0]'


def _without_paths(value: Any) -> Any:
    """Shorten all absolute paths in a recipe to their last name."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")) else value


def _errors(before: ValidationResult, after: ValidationResult) -> str:
    rows = [("all", before.total, after.total)]
    rows += [(a.timesteps, b.error, a.error) for b, a in zip(before.bins, after.bins, strict=True)]
    rows += [(f"all, at {size} px", before.resolutions[size], error) for size, error in after.resolutions.items()]
    return markdown_table(("timesteps", "converted", "distilled"), [(name, _error(b), _error(a)) for name, b, a in rows])


def _error(error: float) -> str:
    return f"{error:.4f}" if error >= 0.001 else f"{error:.1e}"


def _speeds(speeds: Sequence[Speed]) -> str:
    rows = [(f"{s.size} px", f"{1000 * s.teacher:.1f}", f"{1000 * s.student:.1f}") for s in speeds]
    return markdown_table(("resolution", "teacher", "student"), rows)
