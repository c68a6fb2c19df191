"""edit_compile rewrites the softmax attention of diffusion transformers to linear compressed attention.

student = edit_compile.linearize(model)

Public names are imported when they are first used: `import edit_compile` alone loads neither torch nor diffusers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edit_compile import known_noise
from edit_compile.version import __version__ as __version__

if TYPE_CHECKING:
    from edit_compile.adapters.load_model import load_model
    from edit_compile.adapters.record_inputs import record
    from edit_compile.api import audit, compile, grid, linearize, plan, teacher
    from edit_compile.bench.conversion_cost import cost
    from edit_compile.bench.kernels import measure_kernels
    from edit_compile.bench.latency import compare_speed
    from edit_compile.bench.min_tokens import set_min_tokens
    from edit_compile.config import LinearizeConfig, Rule
    from edit_compile.deployment.blocks import load_blocks
    from edit_compile.deployment.exported_file import load_exported
    from edit_compile.deployment.run import export
    from edit_compile.designs import register
    from edit_compile.designs.base import QKV, Design, Tap, Tokens, Verdict
    from edit_compile.designs.ops.parts import Product, Softmax
    from edit_compile.distillation.data.registry import DataConfig, register_data
    from edit_compile.distillation.ranking.rank import rank
    from edit_compile.distillation.ranking.ranking import Ranking
    from edit_compile.distillation.recipe.schema import Recipe
    from edit_compile.distillation.run import distill
    from edit_compile.distillation.train.losses import register_loss
    from edit_compile.errors import (
        AuditError,
        CaptureError,
        CheckpointError,
        ConfigError,
        DistillError,
        EditCompileError,
        ExportError,
        GridError,
        Interrupted,
        ModelNotFoundError,
        NoExampleInputsError,
        PlanError,
        RecipeError,
        RewriteError,
        StudyError,
    )
    from edit_compile.evaluation.run import evaluate
    from edit_compile.ir.plan import Plan, Refusal, SitePlan
    from edit_compile.ir.site import Site
    from edit_compile.ir.tokens import Grid, Segment, TokenKind, TokenLayout
    from edit_compile.passes.pipeline import Passes
    from edit_compile.report.compare_samples import sample
    from edit_compile.student.checkpoint import load, load_pipeline, save
    from edit_compile.student.handle import conversion_of, plan_of
    from edit_compile.student.lora import add_lora, merge_lora
    from edit_compile.student.weights import unshare
    from edit_compile.study.compare import compare

known_noise.silence()

_HOMES = {  # the same imports, for `__getattr__`
    "adapters.load_model": ("load_model",),
    "adapters.record_inputs": ("record",),
    "api": ("audit", "compile", "grid", "linearize", "plan", "teacher"),
    "bench.conversion_cost": ("cost",),
    "bench.kernels": ("measure_kernels",),
    "bench.latency": ("compare_speed",),
    "bench.min_tokens": ("set_min_tokens",),
    "config": ("LinearizeConfig", "Rule"),
    "deployment.blocks": ("load_blocks",),
    "deployment.exported_file": ("load_exported",),
    "deployment.run": ("export",),
    "designs": ("register",),
    "designs.base": ("QKV", "Design", "Tap", "Tokens", "Verdict"),
    "designs.ops.parts": ("Product", "Softmax"),
    "distillation.data.registry": ("DataConfig", "register_data"),
    "distillation.ranking.rank": ("rank",),
    "distillation.ranking.ranking": ("Ranking",),
    "distillation.recipe.schema": ("Recipe",),
    "distillation.run": ("distill",),
    "distillation.train.losses": ("register_loss",),
    "errors": (
        "AuditError",
        "CaptureError",
        "CheckpointError",
        "ConfigError",
        "DistillError",
        "EditCompileError",
        "ExportError",
        "GridError",
        "Interrupted",
        "ModelNotFoundError",
        "NoExampleInputsError",
        "PlanError",
        "RecipeError",
        "RewriteError",
        "StudyError",
    ),
    "evaluation.run": ("evaluate",),
    "ir.plan": ("Plan", "Refusal", "SitePlan"),
    "ir.site": ("Site",),
    "ir.tokens": ("Grid", "Segment", "TokenKind", "TokenLayout"),
    "passes.pipeline": ("Passes",),
    "report.compare_samples": ("sample",),
    "student.checkpoint": ("load", "load_pipeline", "save"),
    "student.handle": ("conversion_of", "plan_of"),
    "student.lora": ("add_lora", "merge_lora"),
    "student.weights": ("unshare",),
    "study.compare": ("compare",),
}
_HOME = {name: f"edit_compile.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "QKV",
    "AuditError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "Design",
    "DistillError",
    "EditCompileError",
    "ExportError",
    "Grid",
    "GridError",
    "Interrupted",
    "LinearizeConfig",
    "ModelNotFoundError",
    "NoExampleInputsError",
    "Passes",
    "Plan",
    "PlanError",
    "Product",
    "Ranking",
    "Recipe",
    "RecipeError",
    "Refusal",
    "RewriteError",
    "Rule",
    "Segment",
    "Site",
    "SitePlan",
    "Softmax",
    "StudyError",
    "Tap",
    "TokenKind",
    "TokenLayout",
    "Tokens",
    "Verdict",
    "add_lora",
    "audit",
    "compare",
    "compare_speed",
    "compile",
    "conversion_of",
    "cost",
    "distill",
    "evaluate",
    "export",
    "grid",
    "linearize",
    "load",
    "load_blocks",
    "load_exported",
    "load_model",
    "load_pipeline",
    "measure_kernels",
    "merge_lora",
    "plan",
    "plan_of",
    "rank",
    "record",
    "register",
    "register_data",
    "register_loss",
    "sample",
    "save",
    "set_min_tokens",
    "teacher",
    "unshare",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562), once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])  # Python suggests
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
