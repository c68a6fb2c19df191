"""A dry run: what a recipe would do and need, worked out from the model's structure alone, on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edit_compile.adapters.denoise import denoise, random_batch
from edit_compile.adapters.inputs import inputs_for_size
from edit_compile.adapters.load_model import load_model
from edit_compile.adapters.pipeline_calls import call_as_recorded, repeated
from edit_compile.api import plan_of
from edit_compile.bench import matmul_flops_per_second, peak_memory, size_in_words, video_size
from edit_compile.bench.sized_inputs import InputMaker
from edit_compile.distillation.context import Context, Denoise, NoisyBatch, trained_parameters
from edit_compile.distillation.models import check_frames_of, give_lora, make_student
from edit_compile.distillation.recipe.schedule import Phase, phases_of
from edit_compile.distillation.recipe.schema import LoraOptions, Recipe
from edit_compile.distillation.train.distributed import recompute_blocks
from edit_compile.distillation.train.layerwise import layerwise_fit
from edit_compile.distillation.train.optimizer import moment_bytes
from edit_compile.distillation.train.step import measure_losses
from edit_compile.distillation.train.train_context import only_trainable
from edit_compile.errors import GridError, NoExampleInputsError
from edit_compile.ir.plan import Plan
from edit_compile.passes.capture import meta_copy
from edit_compile.passes.native_attention import native_attention
from edit_compile.student.grid import grid
from edit_compile.student.grid_sources import Grids
from edit_compile.student.site import converted_sites


@dataclass(frozen=True)
class PhaseEstimate:
    """A layerwise fit or stage, in one process.

    Attributes:
        height, width: of its images, in pixels.
        frames: of its videos; None for images.
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
    frames: int | None = None

    @property
    def size(self) -> str:
        """The size in pixels, "height x width", after the number of a video's frames."""
        return size_in_words(video_size(self.height, self.width, self.frames))


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
    made = make_student(recipe, structure_only=True)
    student = made.model
    check_frames_of(recipe, student)
    structure = meta_copy(student, recipe.dtype)
    if recipe.train == "lora":
        give_lora(structure, recipe.lora or LoraOptions())
    trained = trained_parameters(structure, recipe.train)
    number, state = sum(p.numel() for p in trained.values()), _state_bytes(structure, recipe)
    phases: list[PhaseEstimate] = []
    errors: dict[str, str] = {}
    wanted = phases_of(recipe)
    first_stage = next(phase for phase in wanted if phase.losses is not None)
    inputs = _Inputs(recipe, structure, made.base)
    with only_trainable(structure, set(trained)), native_attention():
        for phase in wanted:
            if recipe.gradient_checkpointing and phase is first_stage:
                recompute_blocks(structure)
            try:
                # The backward pass needs the trained weights as they were multiplied; recomputed, those of one block, or site, at a time.
                copies = 2 * number if recipe.precision == "bf16" and phase.losses and not recipe.gradient_checkpointing else 0
                phases.append(_estimate(recipe, structure, phase, inputs, state + copies))
            except (GridError, NoExampleInputsError) as error:
                errors[phase.name] = str(error)
    parameters = sum(p.numel() for p in structure.parameters())
    return Estimate(recipe, plan_of(student), parameters, number, state, tuple(phases), errors, matmul_flops_per_second(recipe.dtype))


def _state_bytes(structure: nn.Module, recipe: Recipe) -> int:
    """Count what is kept between steps. The teacher has its own attention weights, with `train: blocks` also the other ones of those
    blocks; with `train: all` it is a model of its own."""
    frozen, parameters = recipe.dtype.itemsize, trained_parameters(structure, recipe.train)
    trained = {id(p) for p in parameters.values()}
    of_trained = 4 + 4 + (4 if recipe.ema_decay is not None else 0)  # itself, its gradient, its average
    own = sum(p.numel() * (of_trained if id(p) in trained else frozen) for p in structure.parameters())
    teacher = sum(p.numel() for site in converted_sites(structure).values() for p in site.edit_teacher.parameters())
    if recipe.train == "blocks":
        sites = {id(p) for site in converted_sites(structure).values() for p in site.parameters()}
        teacher += sum(p.numel() for p in parameters.values() if id(p) not in sites)
    if recipe.train == "all":
        teacher += teacher + sum(p.numel() for p in structure.parameters())
    return own + moment_bytes(structure, parameters, recipe.optimizer) + frozen * teacher


class _Inputs:
    """Makes the batches of a recipe's phases: as the model's family says, or its pipeline, if the data are the calls that it makes."""

    def __init__(self, recipe: Recipe, structure: nn.Module, base: str | None) -> None:
        self.recipe, self.structure = recipe, structure
        pipeline = load_model(base, structure_only=True).pipeline if recipe.data.recorded_calls and base is not None else None
        self.maker = InputMaker(structure, pipeline, recipe.data.pipeline_options) if pipeline is not None else None

    @property
    def denoise(self) -> Denoise:
        """How the model is called with these batches."""
        return denoise if self.maker is None else call_as_recorded

    def batch(self, phase: Phase, size: int) -> tuple[NoisyBatch, Grids, int | None]:
        """Make the inputs of a forward of `size` samples; returns also their grids of image tokens and their frames.

        Raises:
            GridError, NoExampleInputsError: as `InputMaker`.
        """
        dtype = self.recipe.dtype
        timesteps = torch.empty(size, device="meta", dtype=dtype)
        if self.maker is not None:
            made = self.maker.at(video_size(phase.height, phase.width, phase.frames))
            call = pytree.tree_map(partial(_floats_as, dtype), repeated(made.inputs, size))
            return NoisyBatch(torch.empty(size, 0, device="meta"), timesteps, call, None), made.grids, made.frames
        x, conditions = random_batch(self.structure, phase.height, phase.width, size, "meta", dtype, frames=phase.frames)
        sized = inputs_for_size(self.structure, phase.height, phase.width, frames=phase.frames)
        return NoisyBatch(x, timesteps, conditions, x), (sized.grid,), sized.frames


def _floats_as(dtype: torch.dtype, leaf: Any) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _estimate(recipe: Recipe, structure: nn.Module, phase: Phase, inputs: _Inputs, state: int) -> PhaseEstimate:
    options = phase.options
    size = options.micro_batch_size or options.global_batch_size
    batch, grids, frames = inputs.batch(phase, size)
    context = _context(recipe, structure, inputs.denoise)
    call = partial(_layerwise_step if phase.losses is None else _stage_step, context, batch, phase)
    with grid(structure, *grids):
        with FlopCounterMode(display=False) as counter:
            call()
        activations = peak_memory(call)  # the gradients of the first call are there now, as with accumulation
    for parameter in structure.parameters():
        parameter.grad = None
    flops = counter.get_total_flops() * (options.global_batch_size // size)
    place = (phase.name, phase.height, phase.width)
    return PhaseEstimate(*place, options.steps, options.global_batch_size, size, flops, state + activations, frames)


def _context(recipe: Recipe, structure: nn.Module, denoise: Denoise) -> Context:
    """Make a context on the meta device that can run a model, and nothing else."""
    nothing = cast(Any, SimpleNamespace(device=torch.device("meta")))
    return Context(recipe, structure, structure, nothing, denoise, nothing, nothing)


def _layerwise_step(context: Context, batch: NoisyBatch, phase: Phase) -> None:
    with layerwise_fit(context.student, 1.0):
        context.predict(context.student, batch)


def _stage_step(context: Context, batch: NoisyBatch, phase: Phase) -> None:
    torch.autograd.backward(measure_losses(context, context.student, batch, phase.losses or {}).total)
