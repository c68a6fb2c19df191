"""The errors users can meet. All are `EditCompileError`s; each also is the builtin a caller would expect to catch."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class EditCompileError(Exception):
    """Base of every error this package raises on purpose."""


class CaptureError(EditCompileError, RuntimeError):
    """A module could not be captured into a graph."""


class PlanError(EditCompileError, ValueError):
    """No plan can be made of this model and configuration, or a plan does not fit its model."""


class RewriteError(EditCompileError, RuntimeError):
    """A planned site could not be rewritten."""


class AuditError(EditCompileError, RuntimeError):
    """The converted model is not what its plan says."""


class GridError(EditCompileError, ValueError):
    """The image tokens' grid is unknown, or does not fit their number."""


class CheckpointError(EditCompileError, RuntimeError):
    """A checkpoint cannot be read, or does not fit its base model."""


class ConfigError(EditCompileError, ValueError):
    """An option is unknown or has an impossible value."""


class NoExampleInputsError(EditCompileError, ValueError):
    """No adapter knows example inputs for this model."""


class ModelNotFoundError(EditCompileError, FileNotFoundError):
    """A model's name or folder leads nowhere."""


class RecipeError(EditCompileError, ValueError):
    """A recipe has an unknown key, a wrong value or an impossible combination."""


class StudyError(EditCompileError, ValueError):
    """A study has an unknown key or a wrong value, or its folder holds another study's cells."""


class DistillError(EditCompileError, RuntimeError):
    """A distillation cannot start or go on."""


class ExportError(EditCompileError, RuntimeError):
    """A converted model cannot be written as a file of this format, or the file is not what the model is."""


class Interrupted(EditCompileError):
    """A distillation was asked to stop, and has saved what it needs to continue."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """List what is known, the most similar name first: `did you mean steps? there are: resolution, steps`."""
    known = tuple(known)
    similar = get_close_matches(name, known, 1)
    return f"{f'did you mean {similar[0]}? ' if similar else ''}there are: {', '.join(known)}"


def some_of(names: Iterable[str]) -> str:
    """List the first eight of some names for a message, and say how many more there are."""
    listed = list(names) or ["none"]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def first_line(error: Exception) -> str:
    """Return the first line that an error's message has, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
