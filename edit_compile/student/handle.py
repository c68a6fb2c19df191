"""The handle on a converted model: one `Conversion`, its attribute `edit_conversion`, which its sites refer to as well."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from edit_compile.errors import EditCompileError
from edit_compile.frozen import Frozen
from edit_compile.ir.plan import Plan
from edit_compile.student.fingerprint import Fingerprint
from edit_compile.student.runtime import Runtime
from edit_compile.student.shared import SharedWeights

# Where wrappers keep the one model in them: torch.compile, DDP and accelerate, PEFT (twice), pipelines.
_HOLDERS = ("_orig_mod", "module", "base_model", "model", "transformer", "unet")


class Lora(Frozen):
    """The LoRA of a converted model: an adapted Linear computes W x + alpha / rank B A x."""

    rank: PositiveInt
    alpha: Annotated[PositiveFloat, Field(allow_inf_nan=False)]
    targets: tuple[str, ...]
    """The paths of the Linears."""


@dataclass(eq=False)
class Conversion:
    """What a converted model knows of its conversion.

    Attributes:
        plan: the plan it was converted by.
        fingerprint: of the original's weights.
        runtime: how its calls find their grid and mode.
        base: where the original was loaded from, if that is known.
        originals: by name, the original weights outside the sites in whose place the model has its own now (see `unshare`).
        lora: the LoRA of Linears outside the sites, if they have it (see `add_lora`).
        shared: tells whether the weights outside the sites are still the original's.
        original: given the model, the one whose forward runs below `min_tokens`, once there is one with other weights.
    """

    plan: Plan
    fingerprint: Fingerprint
    runtime: Runtime
    base: str | None = None
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    lora: Lora | None = None
    shared: SharedWeights = field(default_factory=SharedWeights)
    original: Callable[[nn.Module], nn.Module] | None = None

    def run_as_original_below(self, tokens: int) -> None:
        """Set the plan's `min_tokens`, for all calls that begin from now on."""
        self.plan = self.runtime.plan = self.plan.model_copy(update={"min_tokens": tokens})

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        """Copy what calls and training change; the rest is never written."""
        runtime, shared = copy.deepcopy(self.runtime, memo), self.shared.copy()  # hooks hold the runtime too
        copied = Conversion(self.plan, self.fingerprint, runtime, self.base, dict(self.originals), self.lora, shared)
        memo[id(self)] = copied
        return copied


class GeneratedClass:
    """Stands for a class made at run time where an object is copied or pickled: the one is possible, the other is not."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def __deepcopy__(self, memo: dict[int, Any]) -> GeneratedClass:
        return self

    def __reduce__(self) -> Any:
        raise EditCompileError(
            "a converted model cannot be pickled, for its forwards are generated; write it with edit_compile.save(model, folder) "
            "and read it with edit_compile.load(folder), or save its state_dict()"
        )


def _instance(generated: GeneratedClass) -> Any:
    return object.__new__(generated.cls)


class Generated(nn.Module):
    """Mixed into the classes that conversion makes: of the model, and of every site.

    The objects keep their place, their attributes and the names of their weights, and stay instances of what they were, as
    with `nn.utils.parametrize` and FSDP2's `fully_shard`: code that looks for a class, loads a state dict or names weights by
    their path keeps working. A module wrapped around the original would rename them all.
    """

    edit_conversion: Conversion

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *rest = reduced
        return _instance, (GeneratedClass(type(self)),), *rest


class ConvertedModel(Generated):
    """A converted model: a base of its generated class, beside the class it had."""

    def _replicate_for_data_parallel(self) -> ConvertedModel:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["edit_context"] = copy_context()
        kind: Any = type(self)
        replica.__class__ = _class_of_replica(kind)
        return replica  # type: ignore[no-any-return]


class _Replica(nn.Module):
    """Mixed into the class of what `nn.DataParallel` copies for a call and runs in other threads: what was stated for it holds there."""

    edit_context: Context

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.edit_context.copy().run(super().forward, *args, **kwargs)


@cache
def _class_of_replica(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (_Replica, kind), {"__module__": kind.__module__})


def unwrap(model: Any) -> ConvertedModel:
    """Find the converted model in what holds it, to any depth: a pipeline, torch.compile, DDP, accelerate, PEFT.

    Raises:
        EditCompileError: there is none.
    """
    found = next((held for held in _held(model) if isinstance(held, ConvertedModel)), None)
    if found is None:
        raise EditCompileError(f"{type(model).__name__} is not converted; edit_compile.linearize(model) gives a converted copy")
    return found


def _held(model: Any) -> Iterator[Any]:
    """Yield a model and those in it, the nearest first. Some wrappers pass every attribute on: none is looked at twice."""
    waiting: list[Any] = [model]
    seen: set[int] = set()
    for held in waiting:
        if id(held) not in seen:
            seen.add(id(held))
            yield held
            inner = (getattr(held, name, None) for name in _HOLDERS)
            waiting += [module for module in inner if isinstance(module, nn.Module)]


def conversion_of(model: Any) -> Conversion:
    """Find the handle of a converted model, given it or what holds it (see `unwrap`).

    Raises:
        EditCompileError: nothing in it is converted.
    """
    return unwrap(model).edit_conversion


def plan_of(model: Any) -> Plan:
    """Find the plan that a converted model was converted by, given it or what holds it (see `unwrap`).

    Raises:
        EditCompileError: nothing in it is converted.
    """
    return conversion_of(model).plan
