"""edit_compile rewrites the softmax attention of diffusion transformers to linear compressed attention.

student = edit_compile.linearize(model)
"""

from edit_compile.adapters.record_inputs import record
from edit_compile.api import audit, compile, linearize, plan, plan_of, teacher
from edit_compile.config import LinearizeConfig
from edit_compile.errors import (
    AuditError,
    CaptureError,
    CheckpointError,
    ConfigError,
    DistillError,
    EditCompileError,
    GridError,
    Interrupted,
    ModelNotFoundError,
    NoExampleInputsError,
    PlanError,
    RecipeError,
    RewriteError,
)
from edit_compile.ir.plan import Plan, SitePlan
from edit_compile.ir.tokens import Grid, Segment, TokenKind, TokenLayout
from edit_compile.student.checkpoint import load, load_pipeline, save
from edit_compile.student.grid import grid
from edit_compile.student.weights import unshare

__version__ = "0.1.0"

__all__ = [
    "AuditError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DistillError",
    "EditCompileError",
    "Grid",
    "GridError",
    "Interrupted",
    "LinearizeConfig",
    "ModelNotFoundError",
    "NoExampleInputsError",
    "Plan",
    "PlanError",
    "RecipeError",
    "RewriteError",
    "Segment",
    "SitePlan",
    "TokenKind",
    "TokenLayout",
    "audit",
    "compile",
    "grid",
    "linearize",
    "load",
    "load_pipeline",
    "plan",
    "plan_of",
    "record",
    "save",
    "teacher",
    "unshare",
]
