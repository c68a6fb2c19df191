"""Recipes: what to distill, on which data, and how, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from edit_compile.config import LinearizeConfig
from edit_compile.distillation.data import AnyData
from edit_compile.distillation.data.sources.shapes import ShapesData
from edit_compile.distillation.ranking.ranking import resolve_ranking
from edit_compile.distillation.train.losses import DEFAULT_WEIGHTS, LOSSES, loss_names
from edit_compile.distillation.train.optimizer_class import OURS, known_kind
from edit_compile.errors import suggestion
from edit_compile.frozen import Frozen

FREE: dict[str, Any] = {"resume": "free"}  # marks a field that may differ when a run is resumed: the result does not depend on it


def _square(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


Resolution = Annotated[
    tuple[PositiveInt, PositiveInt], BeforeValidator(_square, json_schema_input_type=PositiveInt | tuple[PositiveInt, PositiveInt])
]


def _of_ranking(value: Any) -> Any:
    if isinstance(value, dict) and (strange := [key for key in value if not isinstance(key, str)]):
        raise ValueError(f"{strange[0]!r} is not the name of an option")
    return resolve_ranking(value) if isinstance(value, dict) and ("ranking" in value or "sites" in value) else value


def _known_loss(name: str) -> str:
    if name not in loss_names():
        raise ValueError(f"unknown loss; {suggestion(name, loss_names())}")
    return name


def _with_defaults(weights: dict[str, float]) -> dict[str, float]:
    weights = DEFAULT_WEIGHTS | weights
    if not any(weights.values()):
        raise ValueError("all losses are switched off: there is nothing to train")
    return weights


TrackerName = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
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
    lr_schedule: Literal["cosine", "linear", "polynomial", "cosine_with_restarts", "constant_with_warmup", "constant"] = "cosine"
    """How the learning rate goes on after the warmup: by the name of diffusers' `get_scheduler`. "constant" has no warmup."""
    lr_cycles: PositiveInt | None = None
    """Of cosine_with_restarts: how many cosines follow each other. Default: 1."""
    lr_power: PositiveFloat | None = None
    """Of polynomial: the exponent. Default: 1."""
    warmup_steps: NonNegativeInt | Annotated[float, Field(gt=0, lt=1)] = 50
    """Steps over which the learning rate rises to `lr`; between 0 and 1, as a share of the phase's steps."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """What the learning rate falls to, as a share of `lr`."""

    @property
    def warmup(self) -> int:
        """The number of steps of the warmup, fewer than all."""
        wanted = round(self.warmup_steps * self.steps) if isinstance(self.warmup_steps, float) else self.warmup_steps
        return 0 if self.lr_schedule == "constant" else min(wanted, self.steps - 1)

    @model_validator(mode="after")
    def _schedule_has_these_options(self) -> Self:
        for option, schedule in (("lr_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
            if getattr(self, option) is not None and self.lr_schedule != schedule:
                raise ValueError(f"{option} has no effect with lr_schedule: {self.lr_schedule}; it is of {schedule}")
        if self.lr_schedule.startswith("constant") and self.min_lr_ratio != type(self).model_fields["min_lr_ratio"].default:
            raise ValueError(f"min_lr_ratio has no effect with lr_schedule: {self.lr_schedule}, which never falls; leave it out")
        return self

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
    loss_weighting: Literal["none", "min-snr", "sigma-sqrt", "cosmap"] = "none"
    """How much timesteps weigh in the losses task and output: alike; by Min-SNR (arXiv 2303.09556), so that errors of the clean image
    count min(SNR, `snr_gamma`); or, of flows, as `compute_loss_weighting_for_sd3` of diffusers does: 1 / sigma^2, or cosmap."""
    snr_gamma: PositiveFloat | None = None
    """Of min-snr. Default: 5."""

    @model_validator(mode="after")
    def _gamma_has_an_effect(self) -> Self:
        if self.snr_gamma is not None and self.loss_weighting != "min-snr":
            raise ValueError(f"snr_gamma has no effect with loss_weighting: {self.loss_weighting}; it is of min-snr")
        return self


class LayerwiseFit(TrainingPhase):
    """The layerwise fit before the stages: each site learns its teacher's output on the teacher's own activations."""

    lr: PositiveFloat = 1e-3
    """The highest learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """What the learning rate falls to, as a share of `lr`."""


class MuonOptions(Frozen):
    """Options of torch.optim.Muon, for the matrices that it updates."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the average of the gradient."""
    nesterov: bool = True
    """Look one step of the momentum ahead."""
    ns_steps: int = Field(default=5, ge=1, le=20)
    """Newton-Schulz iterations, which make the update orthogonal."""
    adjust_lr: Literal["match-rms-adamw", "original"] = "match-rms-adamw"
    """How the rate depends on a matrix's shape: so that its updates are as large as AdamW's, which makes AdamW's learning rates
    fit, or as in the original."""
    lr_ratio: PositiveFloat = 1.0
    """The learning rate of the matrices, as a multiple of `lr`."""


class OptimizerConfig(Frozen):
    """The optimizer's options. Those of AdamW hold for what Muon leaves to it, too."""

    kind: Annotated[str, AfterValidator(known_kind)] = "adamw"
    """"adamw", or another of torch.optim by its name in lower case: "adafactor", "nadam", "sgd". "adamw-8bit" keeps its moments in
    8 bits and needs bitsandbytes, as do its others: "lion-8bit", "paged-adamw-8bit". "muon" updates the matrices of Linears inside
    the repeated blocks by torch.optim.Muon, and all else by AdamW. "package.Class" is any other torch.optim.Optimizer."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the optimizer, such as `{momentum: 0.9, weight_decay: 0.01}` of sgd; but for those below, which are AdamW's."""
    muon: MuonOptions | None = None
    """Muon's options; only with `kind: muon`."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay of the averages of the gradient and of its square."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled from the gradient."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""

    @model_validator(mode="after")
    def _muon_is_chosen(self) -> Self:
        if self.muon is not None and self.kind != "muon":
            raise ValueError(f"muon: its options have no effect with kind: {self.kind}; set kind: muon, or leave them out")
        if self.options and self.kind == "muon":
            raise ValueError("options: those of Muon are given as muon")
        if "lr" in self.options:
            raise ValueError("options: lr would have no effect: it is given in each phase")
        for name in ("betas", "weight_decay", "eps"):
            if self.kind not in OURS and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of adamw; with kind: {self.kind} give it as one of the options")
            if self.kind in OURS and name in self.options:
                raise ValueError(f"options: {name} of {self.kind} is given beside options, not in them")
        return self


class LoraOptions(Frozen):
    """LoRA (arXiv 2106.09685) by PEFT, of Linears outside the converted sites: W + alpha / rank B A."""

    rank: PositiveInt = 16
    """Of A and B."""
    alpha: PositiveFloat | None = None
    """The scale of the update, before it is divided by the rank. Default: the rank."""
    targets: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Globs over the paths of Linears, for example `*.ff.*`."""
    merge: bool = False
    """Add the updates to the weights at the end: nothing is added to a forward, but those weights are saved whole. Else the
    adapters are kept, and saved in PEFT's and diffusers' formats as well."""


class TimestepSampling(Frozen):
    """Which timesteps are trained on. Instead of the mapping, `density` can be given alone: `timesteps: uniform`."""

    density: Literal["uniform", "logit-normal"] = "uniform"
    """Over the scheduler's range."""
    sampler_steps: PositiveInt | None = None
    """For models of few steps: only the timesteps that the model's scheduler visits in a sampling of so many steps, all equally
    often; validation and sample grids take the same."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.sampler_steps is not None and self.density != "uniform":
            raise ValueError(f"density: {self.density} has no effect with sampler_steps: the timesteps of a sampling are equally frequent")
        return self


def _density_alone(value: object) -> object:
    return {"density": value} if isinstance(value, str) else value


class ValidationConfig(Frozen):
    """How the error on samples that training never sees is measured."""

    samples: PositiveInt = 128
    """How many samples are measured."""
    batch_size: PositiveInt = 16
    """Samples per forward."""
    timestep_bins: PositiveInt = 4
    """Ranges of timesteps for which the error is reported as well."""
    resolutions: tuple[Resolution, ...] = ()
    """Further resolutions at which the error is measured, before and after; such as one that no stage trains."""

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
    """Sampling steps per image. Recipes with `timesteps: {sampler_steps: N}` take those instead."""
    guidance: NonNegativeFloat | None = Field(default=None, json_schema_extra=FREE)
    """The scale of classifier-free guidance, which takes a second forward with the empty caption; null for none."""


class Recipe(Frozen):
    """A distillation: the model, the data, and the schedule."""

    model: str
    """What to distill: anything `edit-compile convert --model` takes, or the folder of a converted model."""
    convert: Annotated[LinearizeConfig, BeforeValidator(_of_ranking)] = Field(default_factory=LinearizeConfig)
    """How to convert the model; leave it out for one that is converted already. `{ranking: FILE, sites: flops <= 0.5x}` converts the
    sites that a ranking chooses; see `edit-compile rank`."""
    train: Literal["attention", "inserted", "lora", "blocks", "all"] = "attention"
    """The parameters of the converted sites ("attention"), only those that conversion added ("inserted"), those of the sites and
    LoRA of other Linears ("lora"), of the repeated blocks that hold sites ("blocks"), or "all" of the model's. For "blocks" and
    "all" the teacher needs a second copy of the other weights that are trained."""
    lora: LoraOptions | None = None
    """Options of `train: lora`."""
    prediction: Literal["auto", "rectified-flow", "epsilon", "v-prediction"] = "auto"
    """What the model predicts; "auto" reads it from the scheduler's config."""
    timesteps: Annotated[TimestepSampling, BeforeValidator(_density_alone, json_schema_input_type=str | TimestepSampling)] = (
        TimestepSampling()
    )
    """Which timesteps are trained on: `uniform`, `logit-normal`, or for models of few steps `{sampler_steps: N}`."""
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
    save_in_background: bool = Field(default=False, json_schema_extra=FREE)
    """Whether training goes on while a checkpoint is written; a copy of what is saved is then held in the CPU's memory."""
    standalone: bool = Field(default=False, json_schema_extra=FREE)
    """Write the whole student with its code at the end: diffusers runs it where this package is not, as of `convert --standalone`."""
    samples: SampleGrids = SampleGrids()
    """Images by teacher and student, side by side."""
    log_every: PositiveInt = Field(default=10, json_schema_extra=FREE)
    """Steps between rows of `metrics.jsonl`."""
    trackers: tuple[TrackerName, ...] | None = Field(default=None, json_schema_extra=FREE)
    """Accelerate's trackers: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio. null for TensorBoard, [] for
    none."""
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

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.lora is not None and self.train != "lora":
            raise ValueError(f"lora: its options have no effect with train: {self.train}; set train: lora, or leave them out")
        if self.standalone and self.train == "lora" and not (self.lora is not None and self.lora.merge):
            raise ValueError("standalone: a standalone model has no LoRA: set lora: {merge: true}, or leave one of them out")
        steps = self.timesteps.sampler_steps
        if steps is not None and self.data.recorded_calls:
            raise ValueError(
                f"timesteps.sampler_steps: data of kind {self.data.kind} has the timesteps of its own samplings; "
                "set data.call.num_inference_steps instead"
            )
        if steps is not None and self.validation.samples < steps:
            raise ValueError(f"validation.samples: {self.validation.samples} cannot visit all of {steps} timesteps.sampler_steps")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation and of frozen weights."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def flatten(content: Any) -> dict[str, Any]:
    """Flatten nested mappings and lists into one mapping from dotted keys to values."""
    return dict(_leaves(content, ""))


def changes_in_words(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which keys two flattened recipes do not agree on: `seed (0 then, 1 now), lr (1 then, 2 now) and 3 more`; "" if they agree."""
    keys = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    said = ", ".join(f"{key} ({then.get(key)} then, {now.get(key)} now)" for key in keys[:3])
    return said + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _leaves(content: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict | list):
        yield prefix.removesuffix("."), content
        return
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield from _leaves(value, f"{prefix}{name}.")
