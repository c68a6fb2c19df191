"""Recipes: what to distill, on what, and how, as data."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from edit_compile.config import LinearizeConfig
from edit_compile.distillation.data import Data
from edit_compile.distillation.data.sources.shapes import ShapesData
from edit_compile.frozen import Section


def _square(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


Phase = TypeVar("Phase", "Stage", "WarmStart")
Resolution = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_square)]


class Losses(Section):
    """The weights of the three losses; 0 switches one off.

    Attributes:
        task: the prediction against noise, velocity, or whatever the teacher was trained to predict.
        output: the student's prediction against the teacher's.
        feature: every converted site's output against its teacher's, relative to the energy of the teacher's.
    """

    task: NonNegativeFloat = 0.0
    output: NonNegativeFloat = 1.0
    feature: NonNegativeFloat = 0.5

    @model_validator(mode="after")
    def _not_all_zero(self) -> Losses:
        if self.task == self.output == self.feature == 0:
            raise ValueError("all three losses are switched off: there is nothing to train")
        return self


def _divides(section: Phase) -> Phase:
    if section.micro_batch is not None and section.batch % section.micro_batch:
        raise ValueError(f"a batch of {section.batch} does not divide into forwards of {section.micro_batch}: change batch or micro_batch")
    return section


class Stage(Section):
    """A part of the training at one resolution.

    Attributes:
        resolution: of the pictures in pixels, a side or (height, width).
        steps: optimizer steps.
        batch: samples of a step, over all processes.
        micro_batch: samples of one forward of one process; the rest of the batch is accumulated. Default: no accumulation.
        lr: the highest learning rate.
        warm_up: steps over which the rate rises to it; then it falls along a cosine.
        lr_end: what it falls to, as a share of `lr`.
        losses: their weights.
    """

    resolution: Resolution
    steps: PositiveInt
    batch: PositiveInt = 16
    micro_batch: PositiveInt | None = None
    lr: PositiveFloat = 1e-4
    warm_up: NonNegativeInt = 50
    lr_end: float = Field(0.0, ge=0, le=1)
    losses: Losses = Losses()
    _batch_divides = model_validator(mode="after")(_divides)


class WarmStart(Section):
    """The layer-wise fit before the stages: each site to its teacher, on the teacher's own activations.

    Attributes: as of `Stage`; `resolution` is the first stage's unless given.
    """

    resolution: Resolution | None = None
    steps: PositiveInt
    batch: PositiveInt = 16
    micro_batch: PositiveInt | None = None
    lr: PositiveFloat = 1e-3
    warm_up: NonNegativeInt = 50
    lr_end: float = Field(0.1, ge=0, le=1)
    _batch_divides = model_validator(mode="after")(_divides)


class Optimizer(Section):
    """AdamW's options. The "adamw-8bit" kind keeps its moments in 8 bits and needs bitsandbytes."""

    kind: Literal["adamw", "adamw-8bit"] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    eps: PositiveFloat = 1e-8


class HeldOut(Section):
    """The measurement of the error on samples that training never sees.

    Attributes:
        samples: how many.
        batch: samples of one forward.
        buckets: ranges of timesteps for which the error is given as well.
    """

    samples: PositiveInt = 128
    batch: PositiveInt = 16
    buckets: PositiveInt = 4

    @model_validator(mode="after")
    def _no_empty_bucket(self) -> HeldOut:
        if self.samples < self.buckets:
            raise ValueError(f"{self.samples} samples do not fill {self.buckets} buckets: give more samples, or fewer buckets")
        return self


class Samples(Section):
    """Pictures of teacher and student, drawn in `samples/` while training and at the end.

    Attributes:
        every: steps between them; null for the end only.
        count: pictures, of the first held-out captions.
        steps: of sampling each, without guidance.
    """

    every: PositiveInt | None = None
    count: PositiveInt = 4
    steps: PositiveInt = 20


class Recipe(Section):
    """A distillation.

    Attributes:
        model: what to distill, as for `edit-compile convert`, or the folder of a converted model.
        convert: how to convert it; not for a converted model.
        train: the converted sites' parameters ("attention"), only those that conversion added ("inserted"), or "all" of the
            model's, for which the teacher needs a second copy of the weights.
        prediction: what the model predicts; "auto" reads it from the scheduler's config.
        timesteps: how training draws them over the scheduler's range.
        data: see `edit_compile.distillation.data`.
        warm_start: null for none.
        stage: one after the other.
        ema: decay of the weights' moving average, which becomes the student; null for none.
        clip: the largest norm of a gradient.
        precision: "bf16" computes in bfloat16 and keeps what is not trained in it; what is trained stays in float32.
        gradient_checkpointing: compute each repeated block again in the backward pass instead of keeping its activations.
        compile: the repeated blocks of teacher and student, for the stages.
        max_skipped: steps in a row that may be left out because their loss or gradient is not finite or explodes.
        explosion: a loss this many times the recent average explodes.
        save_every: steps between checkpoints to resume from.
        keep: how many of them are kept.
        log_every: steps between rows of `metrics.jsonl`.
        trackers: of accelerate; null for TensorBoard, [] for none.
    """

    model: str
    convert: LinearizeConfig = Field(default_factory=LinearizeConfig)
    train: Literal["attention", "inserted", "all"] = "attention"
    prediction: Literal["auto", "rectified-flow", "epsilon", "v-prediction"] = "auto"
    timesteps: Literal["uniform", "logit-normal"] = "uniform"
    data: Data = ShapesData()
    warm_start: WarmStart | None = None
    stage: tuple[Stage, ...] = Field(min_length=1)
    optimizer: Optimizer = Optimizer()
    ema: float | None = Field(0.999, gt=0, lt=1)
    clip: PositiveFloat = 1.0
    held_out: HeldOut = HeldOut()
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    max_skipped: NonNegativeInt = 10
    explosion: float = Field(10.0, gt=1)
    save_every: PositiveInt = 500
    keep: PositiveInt = 2
    samples: Samples = Samples()
    log_every: PositiveInt = 10
    trackers: tuple[Literal["tensorboard", "wandb"], ...] | None = None
    seed: NonNegativeInt = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of computation, and of what is not trained."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32
