"""Recipes: what to distill, on which data, and how, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from edit_compile.config import LinearizeConfig
from edit_compile.distillation.data import AnyData
from edit_compile.distillation.data.sources.shapes import ShapesData
from edit_compile.distillation.registry import suggestion
from edit_compile.distillation.train.losses import DEFAULT_WEIGHTS, LOSSES, loss_names
from edit_compile.frozen import Frozen

FREE: dict[str, Any] = {"resume": "free"}  # marks a field that may differ when a run is resumed: the result does not depend on it


def _square(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


Resolution = Annotated[
    tuple[PositiveInt, PositiveInt], BeforeValidator(_square, json_schema_input_type=PositiveInt | tuple[PositiveInt, PositiveInt])
]


def _known_loss(name: str) -> str:
    if name not in loss_names():
        raise ValueError(f"unknown loss; {suggestion(name, loss_names())}")
    return name


def _with_defaults(weights: dict[str, float]) -> dict[str, float]:
    weights = DEFAULT_WEIGHTS | weights
    if not any(weights.values()):
        raise ValueError("all losses are switched off: there is nothing to train")
    return weights


LossName = Annotated[str, AfterValidator(_known_loss)]
LossWeights = Annotated[dict[LossName, NonNegativeFloat], AfterValidator(_with_defaults)]


class TrainingPhase(Frozen):
    """What a stage and the layerwise fit have in common."""

    resolution: Resolution | None = None
    """Of the images, in pixels: one side, or [height, width]. Default: the first stage's."""
    frames: PositiveInt | None = None
    """Of the videos. Default: the first stage's, or as many as the model's videos usually have."""
    steps: PositiveInt
    """Optimizer steps."""
    global_batch_size: PositiveInt = 16
    """Samples per step, over all processes."""
    micro_batch_size: PositiveInt | None = Field(default=None, json_schema_extra=FREE)
    """Samples per forward of one process; gradients are accumulated over the rest of the batch. Default: no accumulation."""
    lr: PositiveFloat = 1e-4
    """The highest learning rate."""
    warmup_steps: NonNegativeInt = 50
    """Steps over which the learning rate rises to `lr`; after them it falls along a cosine."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """What the learning rate falls to, as a share of `lr`."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.micro_batch_size is not None and self.global_batch_size % self.micro_batch_size:
            raise ValueError(f"global_batch_size {self.global_batch_size} is not divisible by micro_batch_size {self.micro_batch_size}")
        return self


class Stage(TrainingPhase):
    """End-to-end training at one resolution."""

    resolution: Resolution
    """Of the images, in pixels: one side, or [height, width]."""
    frames: PositiveInt | None = None
    """Of the videos. Default: as many as the model's videos usually have, or its pipeline makes. Models of images have none."""
    losses: LossWeights = DEFAULT_WEIGHTS
    """The weights of the losses, by name; 0 switches one off. task: the prediction against what the teacher was trained to predict
    (default 0); output: against the teacher's prediction (1); feature: every converted site's output against its teacher's (0.5)."""


class LayerwiseFit(TrainingPhase):
    """The layerwise fit before the stages: each site learns its teacher's output on the teacher's own activations."""

    lr: PositiveFloat = 1e-3
    """The highest learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """What the learning rate falls to, as a share of `lr`."""


class OptimizerConfig(Frozen):
    """AdamW's options."""

    kind: Literal["adamw", "adamw-8bit"] = "adamw"
    """"adamw-8bit" keeps its moments in 8 bits and needs bitsandbytes."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay of the averages of the gradient and of its square."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled from the gradient."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


class ValidationConfig(Frozen):
    """How the error on samples that training never sees is measured."""

    samples: PositiveInt = 128
    """How many samples are measured."""
    batch_size: PositiveInt = 16
    """Samples per forward."""
    timestep_bins: PositiveInt = 4
    """Ranges of timesteps for which the error is reported as well."""

    @model_validator(mode="after")
    def _no_empty_bin(self) -> Self:
        if self.samples < self.timestep_bins:
            raise ValueError(f"{self.samples} samples cannot fill {self.timestep_bins} timestep_bins: use more samples or fewer bins")
        return self


class SampleGrids(Frozen):
    """Images by teacher and student, written to `samples/` during training and at its end."""

    every: PositiveInt | None = Field(default=None, json_schema_extra=FREE)
    """Steps between them; null for the end only."""
    count: PositiveInt = Field(default=4, json_schema_extra=FREE)
    """Images per grid, of the first validation captions."""
    steps: PositiveInt = Field(default=20, json_schema_extra=FREE)
    """Sampling steps per image, without guidance."""


class Recipe(Frozen):
    """A distillation: the model, the data, and the schedule."""

    model: str
    """What to distill: anything `edit-compile convert --model` takes, or the folder of a converted model."""
    convert: LinearizeConfig = Field(default_factory=LinearizeConfig)
    """How to convert the model; leave it out for one that is converted already."""
    train: Literal["attention", "inserted", "all"] = "attention"
    """The parameters of the converted sites ("attention"), only those that conversion added ("inserted"), or "all" of the
    model's, for which the teacher needs a second copy of the weights."""
    prediction: Literal["auto", "rectified-flow", "epsilon", "v-prediction"] = "auto"
    """What the model predicts; "auto" reads it from the scheduler's config."""
    timesteps: Literal["uniform", "logit-normal"] = "uniform"
    """How training samples timesteps over the scheduler's range."""
    data: AnyData = ShapesData()
    """What to train on; `kind` selects one of the kinds of data."""
    layerwise: LayerwiseFit | None = None
    """The layerwise fit before the stages; null for none."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """End-to-end training, one stage after the other."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer of all phases; each phase begins with a new one."""
    ema_decay: float | None = Field(default=0.999, gt=0, lt=1)
    """Decay of the moving average of the weights, which becomes the student; null for none."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    validation: ValidationConfig = ValidationConfig()
    """How the student is measured, before training and after it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" computes in bfloat16 and keeps frozen weights in it; trained weights stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute each repeated block in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Compile the repeated blocks of teacher and student for the stages."""
    max_skipped_steps: NonNegativeInt = Field(default=10, json_schema_extra=FREE)
    """Consecutive steps that may be skipped because the loss or the gradient is not finite, or the loss spikes."""
    spike_factor: float = Field(default=10.0, gt=1)
    """A loss this many times the recent average is a spike."""
    save_every: PositiveInt = Field(default=500, json_schema_extra=FREE)
    """Steps between checkpoints."""
    keep_last: PositiveInt = Field(default=2, json_schema_extra=FREE)
    """How many checkpoints are kept."""
    samples: SampleGrids = SampleGrids()
    """Images by teacher and student, side by side."""
    log_every: PositiveInt = Field(default=10, json_schema_extra=FREE)
    """Steps between rows of `metrics.jsonl`."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] | None = Field(default=None, json_schema_extra=FREE)
    """Accelerate's trackers; null for TensorBoard, [] for none."""
    seed: NonNegativeInt = 0
    """Of everything that is random."""

    @model_validator(mode="after")
    def _losses_fit_the_data(self) -> Self:
        for number, stage in enumerate(self.stages):
            unknown = [name for name, weight in stage.losses.items() if weight and LOSSES.get(name).needs_target]
            if unknown and self.data.recorded_calls:
                raise ValueError(
                    f"stages.{number}.losses.{unknown[0]}: data of kind {self.data.kind} has no clean images, "
                    "from which this loss is computed; leave it out"
                )
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation and of frozen weights."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def flatten(content: Any) -> dict[str, Any]:
    """Flatten nested mappings and lists into one mapping from dotted keys to values."""
    return dict(_leaves(content, ""))


def _leaves(content: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict | list):
        yield prefix.removesuffix("."), content
        return
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield from _leaves(value, f"{prefix}{name}.")
