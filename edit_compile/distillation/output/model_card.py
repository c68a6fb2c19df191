"""The model card: the README of a finished folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from edit_compile.adapters.hub_access import card_of
from edit_compile.adapters.model_names import hub_id, is_on_hub
from edit_compile.bench.conversion_cost import CostReport
from edit_compile.distillation.evaluate.speed import COLUMNS, Speed
from edit_compile.distillation.evaluate.validation import MEASURE, ValidationResult
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.ir.plan import Plan
from edit_compile.report.markdown import markdown_table
from edit_compile.report.tables import cost_rows
from edit_compile.words import without_paths

THIS = "this folder"  # in a card's code; where it is uploaded, the repository's id
_STANDALONE = f'from diffusers import AutoModel\n\nmodel = AutoModel.from_pretrained("{THIS}", trust_remote_code=True)'


def model_card(
    recipe: Recipe,
    plan: Plan,
    base: str | None,
    before: ValidationResult,
    after: ValidationResult,
    speeds: Sequence[Speed],
    images: Sequence[Path],
    costs: CostReport | None = None,
) -> str:
    """Write Markdown with the hub's front matter: use, errors, speed, images, plan and recipe. It names no path of this machine.

    Args:
        base: where the base model is; None if unknown.
        images: files in the folder to show, relative to it.
        costs: of the conversion, if they are known.
    """
    on_hub = base if base is not None and is_on_hub(base) else None
    known = on_hub or (base if base is not None and base.startswith("demo/") else None)
    rewritten = f"{len(plan.rewritten)} of {len(plan.sites)}"
    parts = [
        f"---\n{_metadata(plan, _id_on_hub(on_hub), after).to_yaml()}\n---",
        f"# {_title(plan)}",
        f"Distilled from {known or 'its base model'} by edit_compile: {rewritten} attention sites were rewritten.",
        f"```python\n{_code(known)}\n```",
        *([f"Without edit_compile:\n\n```python\n{_STANDALONE}\n```"] if recipe.standalone else []),
        f"## Validation error\n\n{MEASURE}.",
        markdown_table(("", "converted", "distilled"), before.rows_until(after)),
        *_speed(speeds),
        *_cost(costs),
        *(f"![{path.stem}]({path.as_posix()})" for path in images),
        f"## Plan\n\n```\n{plan}\n```",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(without_paths(recipe.model_dump(mode='json')), sort_keys=False)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _speed(speeds: Sequence[Speed]) -> list[str]:
    """Write the seconds of a forward; nothing where they could not be measured."""
    note = "## Speed\n\nOf a forward of one image or video, on the machine it was trained on."
    return [note, markdown_table(COLUMNS, [speed.row for speed in speeds])] if speeds else []


def _cost(report: CostReport | None) -> list[str]:
    """Write the FLOPs before and after by size, and from how many image tokens on the conversion pays."""
    if report is None or not report.costs:
        return []
    head, *rows = cost_rows(report)
    of_rates = f" Predicted are speed-ups, compiled, {report.rates.dtype}, on {report.rates.device}." if report.rates is not None else ""
    from_here = report.break_even_tokens
    pays = f" It needs fewer from {from_here:,} image tokens on." if from_here else ""
    return [f"## FLOPs\n\nOf one forward, before and after.{pays}{of_rates}", markdown_table(head, rows, range(1, len(head)))]


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
        metric_value=float(f"{after.total:.3g}"),
    )
    return ModelCardData(
        library_name="edit_compile",
        tags=["diffusion", "efficient-attention", *_designs(plan), "distillation"],
        base_model=base,
        base_model_relation="finetune" if base is not None else None,
        model_name=_title(plan),
        eval_results=[error] if task else None,
        **of_base,
    )


def _title(plan: Plan) -> str:
    return f"{plan.model}, distilled to {' and '.join(_designs(plan))}"


def _designs(plan: Plan) -> list[str]:
    return sorted({site.action for site in plan.rewritten})


def _id_on_hub(base: str | None) -> str | None:
    """Return the hub's id of a base; None of a timm model without the tag that tells whose weights they are."""
    return None if base is None or (base.startswith("timm/") and "." not in base) else hub_id(base)[0]


def _code(base: str | None) -> str:
    """Write what loads the student and draws with it."""
    if base is None:
        return f'import edit_compile\n\nstudent = edit_compile.load("{THIS}")'
    if base.startswith("demo/"):
        return f'import edit_compile\n\nedit_compile.sample("{THIS}", "a small red circle").save("samples.png")'
    if base.startswith("timm/"):
        return f'import edit_compile\n\nstudent = edit_compile.load("{THIS}", base="{base}")'
    return f'import edit_compile\n\npipe = edit_compile.load_pipeline("{THIS}", base="{base}")\nimage = pipe("a lighthouse").images[0]'
