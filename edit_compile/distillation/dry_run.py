"""A dry run: what a recipe would do and need, worked out from the model's structure alone, on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edit_compile.adapters.denoise import denoise, random_batch
from edit_compile.adapters.inputs import inputs_for_size
from edit_compile.api import plan_of
from edit_compile.bench import matmul_flops_per_second, peak_memory
from edit_compile.distillation.context import Context, NoisyBatch, trained_parameters
from edit_compile.distillation.models import make_student
from edit_compile.distillation.recipe.schedule import Phase, phases_of
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.distributed import recompute_blocks
from edit_compile.distillation.train.layerwise import layerwise_fit
from edit_compile.distillation.train.step import measure_losses
from edit_compile.distillation.train.train_context import only_trainable
from edit_compile.errors import GridError, NoExampleInputsError
from edit_compile.ir.plan import Plan
from edit_compile.passes.capture import meta_copy
from edit_compile.passes.native_attention import native_attention
from edit_compile.student.grid import grid
from edit_compile.student.site import converted_sites

_MOMENTS = {"adamw": 8, "adamw-8bit": 2}  # bytes of both


@dataclass(frozen=True)
class PhaseEstimate:
    """A layerwise fit or stage, in one process.

    Attributes:
        height, width: of its images, in pixels.
        samples, micro_batch: samples per step, and per forward.
        flops: of a step: teacher, student, backward pass, and what checkpointing recomputes.
        bytes: at the peak of a step: weights, gradients, optimizer, moving average, activations. The workspaces of kernels come
            on top.
    """

    name: str
    height: int
    width: int
    steps: int
    samples: int
    micro_batch: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a recipe would do.

    Attributes:
        parameters, trained: numbers of the student's parameters, and of those trained.
        state_bytes: of all weights, and of gradients, optimizer and moving average of those trained.
        phases: in order, without those that could not be estimated.
        errors: why others could not, by the phase's name.
        flops_per_second: of a large matrix product on this machine, which no step exceeds.
    """

    recipe: Recipe
    plan: Plan
    parameters: int
    trained: int
    state_bytes: int
    phases: tuple[PhaseEstimate, ...]
    errors: dict[str, str]
    flops_per_second: float

    def least_seconds(self, phase: PhaseEstimate) -> float:
        """Compute how long a phase takes if all of it is as fast as a large matrix product."""
        return phase.steps * phase.flops / self.flops_per_second

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "parameters": self.parameters,
            "trained": self.trained,
            "state_bytes": self.state_bytes,
            "phases": [{**asdict(phase), "least_seconds": self.least_seconds(phase)} for phase in self.phases],
            "impossible": self.errors,
        }


def dry_run(recipe: Recipe) -> Estimate:
    """Estimate a recipe's needs, without weights where the model's name allows that.

    Raises:
        DistillError, ModelNotFoundError, PlanError: as the run itself would.
    """
    student = make_student(recipe, structure_only=True).model
    structure = meta_copy(student, recipe.dtype)
    trained = trained_parameters(structure, recipe.train)
    number, state = sum(p.numel() for p in trained.values()), _state_bytes(structure, recipe)
    phases: list[PhaseEstimate] = []
    errors: dict[str, str] = {}
    wanted = phases_of(recipe)
    first_stage = next(phase for phase in wanted if phase.losses is not None)
    with only_trainable(structure, set(trained)), native_attention():
        for phase in wanted:
            if recipe.gradient_checkpointing and phase is first_stage:
                recompute_blocks(structure)
            try:
                # The backward pass needs the trained weights as they were multiplied; recomputed, those of one block, or site, at a time.
                copies = 2 * number if recipe.precision == "bf16" and phase.losses and not recipe.gradient_checkpointing else 0
                phases.append(_estimate(recipe, structure, phase, state + copies))
            except (GridError, NoExampleInputsError) as error:
                errors[phase.name] = str(error)
    parameters = sum(p.numel() for p in structure.parameters())
    return Estimate(recipe, plan_of(student), parameters, number, state, tuple(phases), errors, matmul_flops_per_second(recipe.dtype))


def _state_bytes(structure: nn.Module, recipe: Recipe) -> int:
    """Count what is kept between steps. The teacher has its own attention weights; with `train: all` it is a model of its own."""
    frozen = recipe.dtype.itemsize
    trained = {id(p) for p in trained_parameters(structure, recipe.train).values()}
    of_trained = 4 + 4 + _MOMENTS[recipe.optimizer.kind] + (4 if recipe.ema_decay is not None else 0)  # itself, its gradient, ...
    own = sum(p.numel() * (of_trained if id(p) in trained else frozen) for p in structure.parameters())
    originals = sum(p.numel() for site in converted_sites(structure).values() for p in site.edit_teacher.parameters())
    teacher = originals if recipe.train != "all" else 2 * originals + sum(p.numel() for p in structure.parameters())
    return own + frozen * teacher


def _estimate(recipe: Recipe, structure: nn.Module, phase: Phase, state: int) -> PhaseEstimate:
    options, dtype = phase.options, recipe.dtype
    size = options.micro_batch_size or options.global_batch_size
    x, conditions = random_batch(structure, phase.height, phase.width, size, "meta", dtype)
    batch = NoisyBatch(x, torch.empty(size, device="meta", dtype=dtype), conditions, x)
    call = partial(_layerwise_step if phase.losses is None else _stage_step, _context(recipe, structure), batch, phase)
    with grid(structure, *inputs_for_size(structure, phase.height, phase.width).grid):
        with FlopCounterMode(display=False) as counter:
            call()
        activations = peak_memory(call)  # the gradients of the first call are there now, as with accumulation
    for parameter in structure.parameters():
        parameter.grad = None
    flops = counter.get_total_flops() * (options.global_batch_size // size)
    place = (phase.name, phase.height, phase.width)
    return PhaseEstimate(*place, options.steps, options.global_batch_size, size, flops, state + activations)


def _context(recipe: Recipe, structure: nn.Module) -> Context:
    """Make a context on the meta device that can run a model, and nothing else."""
    nothing = cast(Any, SimpleNamespace(device=torch.device("meta")))
    return Context(recipe, structure, structure, nothing, denoise, nothing, nothing)


def _layerwise_step(context: Context, batch: NoisyBatch, phase: Phase) -> None:
    with layerwise_fit(context.student, 1.0):
        context.predict(context.student, batch)


def _stage_step(context: Context, batch: NoisyBatch, phase: Phase) -> None:
    torch.autograd.backward(measure_losses(context, context.student, batch, phase.losses or {}).total)
