"""A dry run: what a recipe would do and need, worked out from the model's structure alone, on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
from edit_compile.api import plan_of, repeated_blocks
from edit_compile.bench import matmul_flops_per_second, peak_memory, size_in_words, video_size
from edit_compile.bench.devices import Device, device_named
from edit_compile.bench.sized_inputs import InputMaker
from edit_compile.distillation.context import Context, Denoise, NoisyBatch, samples_per_forward, trained_parameters
from edit_compile.distillation.models import check_frames_of, give_lora, make_student, stages_below_min_tokens
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
from edit_compile.progress import each, working
from edit_compile.student.grid import grid
from edit_compile.student.grid_sources import Grids
from edit_compile.student.handle import conversion_of
from edit_compile.student.site import converted_sites


@dataclass(frozen=True)
class PhaseEstimate:
    """A layerwise fit or stage.

    Attributes:
        height, width: of its images, in pixels.
        frames: of its videos; None for images.
        samples, micro_batch: samples per step, and per forward of a device.
        flops: of a step on all devices: teacher, student, backward pass, and what checkpointing recomputes.
        bytes: of a device at the peak of a step: weights, gradients, optimizer, moving average, activations. The workspaces of
            kernels come on top.
        sharded_bytes: the same with the student sharded over the devices (FSDP2).
    """

    name: str
    height: int
    width: int
    steps: int
    samples: int
    micro_batch: int
    flops: int
    bytes: int
    sharded_bytes: int
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
        flops_per_second: of a large matrix product on a device, which no step exceeds.
        devices: how many share the work.
        device: by its data sheet; None for this machine, whose speed was measured.
        notes: what else is to be known, a sentence each.
    """

    recipe: Recipe
    plan: Plan
    parameters: int
    trained: int
    state_bytes: int
    phases: tuple[PhaseEstimate, ...]
    errors: dict[str, str]
    flops_per_second: float
    devices: int = 1
    device: Device | None = None
    notes: tuple[str, ...] = ()

    def least_seconds(self, phase: PhaseEstimate) -> float:
        """Compute how long a phase takes if all of it is as fast as a large matrix product."""
        return phase.steps * phase.flops / (self.flops_per_second * self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "parameters": self.parameters,
            "trained": self.trained,
            "state_bytes": self.state_bytes,
            "phases": [{**asdict(phase), "least_seconds": self.least_seconds(phase)} for phase in self.phases],
            "impossible": self.errors,
            "notes": list(self.notes),
            "devices": self.devices,
            "device": None if self.device is None else asdict(self.device),
        }


def dry_run(recipe: Recipe, *, devices: int = 1, device: str | None = None) -> Estimate:
    """Estimate a recipe's needs, without weights where the model's name allows that.

    Args:
        devices: how many processes share the work, with one device each.
        device: the name of a device that is not at hand, of `device_names`; default: this machine's.

    Raises:
        ConfigError: the device is not known.
        DistillError, ModelNotFoundError, PlanError: as the run itself would.
    """
    kind = device_named(device) if device is not None else None
    with working(f"converting {recipe.model}"):
        made = make_student(recipe, structure_only=True)
    student = made.model
    check_frames_of(recipe, student)
    structure = meta_copy(student, recipe.dtype)
    conversion_of(structure).run_as_original_below(0)
    if recipe.train == "lora":
        give_lora(structure, recipe.lora or LoraOptions())
    trained = trained_parameters(structure, recipe.train)
    number, state = sum(p.numel() for p in trained.values()), _state_of(structure, recipe)
    phases: list[PhaseEstimate] = []
    errors: dict[str, str] = {}
    wanted = phases_of(recipe)
    first_stage = next(phase for phase in wanted if phase.losses is not None)
    inputs = _Inputs(recipe, structure, made.base)
    with only_trainable(structure, set(trained)), native_attention(structure):
        for phase in each(wanted, "counting FLOPs and memory", len(wanted)):
            if recipe.gradient_checkpointing and phase is first_stage:
                recompute_blocks(structure)
            try:
                # The backward pass needs the trained weights as they were multiplied; recomputed, those of one block, or site, at a time.
                copies = 2 * number if recipe.precision == "bf16" and phase.losses and not recipe.gradient_checkpointing else 0
                phases.append(_estimate(recipe, structure, phase, inputs, state.with_copies(copies), devices))
            except (GridError, NoExampleInputsError) as error:
                errors[phase.name] = str(error)
    parameters = sum(p.numel() for p in structure.parameters())
    speed = kind.flops_per_second(recipe.dtype) if kind is not None else matmul_flops_per_second(recipe.dtype)
    plan, found = plan_of(student), tuple(phases)
    notes = tuple(stages_below_min_tokens(recipe, student, plan.min_tokens))
    return Estimate(recipe, plan, parameters, number, state.total, found, errors, speed, devices, kind, notes)


@dataclass(frozen=True)
class _State:
    """What is kept between steps, in bytes.

    Attributes:
        shared: what can be sharded: the student's weights, gradients, moments and average, and the teacher's own weights.
        others: what every device holds: copies of the student's weights, and where blocks are compiled the original attention.
        block: the weights of the largest group that is gathered at once.
    """

    shared: int
    others: int
    block: int

    @property
    def total(self) -> int:
        return self.shared + self.others

    def sharded(self, devices: int) -> int:
        """Count what each of several devices holds, two groups gathered: one is computed with, the next is on its way."""
        return self.shared // devices + self.others + 2 * self.block

    def with_copies(self, number: int) -> _State:
        return replace(self, others=self.others + number)


def _state_of(structure: nn.Module, recipe: Recipe) -> _State:
    """Count what is kept between steps. The teacher has its own attention weights, with `train: blocks` and `all` also the other ones
    that are trained."""
    frozen, parameters = recipe.dtype.itemsize, trained_parameters(structure, recipe.train)
    trained = {id(p) for p in parameters.values()}
    of_trained = 4 + 4 + (4 if recipe.ema_decay is not None else 0)  # itself, its gradient, its average
    own = sum(p.numel() * (of_trained if id(p) in trained else frozen) for p in structure.parameters())
    attention = frozen * sum(p.numel() for site in converted_sites(structure).values() for p in site.edit_teacher.parameters())
    student = own + moment_bytes(structure, parameters, recipe.optimizer)
    if recipe.train in ("blocks", "all"):
        sites = {id(p) for site in converted_sites(structure).values() for p in site.parameters()}
        student += frozen * sum(p.numel() for p in parameters.values() if id(p) not in sites)  # which the teacher has as well
    blocks = [structure.get_submodule(path) for path in repeated_blocks(structure)]
    largest = max((sum(p.numel() * (4 if id(p) in trained else frozen) for p in block.parameters()) for block in blocks), default=0)
    return _State(student, attention, largest) if recipe.compile else _State(student + attention, 0, largest)


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


def _estimate(recipe: Recipe, structure: nn.Module, phase: Phase, inputs: _Inputs, state: _State, devices: int) -> PhaseEstimate:
    options = phase.options
    size = samples_per_forward(options.global_batch_size, options.micro_batch_size, devices)
    batch, grids, frames = inputs.batch(phase, size)
    context = _context(recipe, structure, inputs.denoise)
    call = partial(_forward_and_backward, context, batch, phase.losses)
    with grid(structure, *grids):
        with FlopCounterMode(display=False) as counter:
            call()
        activations = peak_memory(call)  # the gradients of the first call are there now, as with accumulation
    for parameter in structure.parameters():
        parameter.grad = None
    flops = counter.get_total_flops() * (options.global_batch_size // size)
    place = (phase.name, phase.height, phase.width)
    memory = state.total + activations, (state.sharded(devices) if devices > 1 else state.total) + activations
    return PhaseEstimate(*place, options.steps, options.global_batch_size, size, flops, *memory, frames)


def _context(recipe: Recipe, structure: nn.Module, denoise: Denoise) -> Context:
    """Make a context on the meta device that can run a model, and nothing else."""
    nothing = cast(Any, SimpleNamespace(device=torch.device("meta")))
    return Context(recipe, structure, structure, nothing, denoise, nothing, nothing)


def _forward_and_backward(context: Context, batch: NoisyBatch, losses: dict[str, float] | None) -> None:
    """Run a forward of a stage with these losses, or of the layerwise fit without any, and its backward pass."""
    if losses is None:
        with layerwise_fit(context.student, 1.0):
            context.predict(context.student, batch)
    else:
        torch.autograd.backward(measure_losses(context, context.student, batch, losses).total)
