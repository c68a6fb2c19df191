"""Distilling, from a recipe to a finished folder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edit_compile.adapters.denoise import denoise as denoise_by_family
from edit_compile.adapters.load_model import load_model
from edit_compile.adapters.noise_schedule import NoiseSchedule, default_schedule, schedule_of_pipeline
from edit_compile.api import linearize, plan_of
from edit_compile.config import LinearizeConfig
from edit_compile.demo.models import NAMES as DEMOS
from edit_compile.distillation.context import Context, Denoise, trained_parameters
from edit_compile.distillation.data import Source, open_source
from edit_compile.distillation.data.sources.random import RandomData
from edit_compile.distillation.data.unreadable import write_unreadable
from edit_compile.distillation.evaluate.sample_grid import Sampler
from edit_compile.distillation.evaluate.speed import Speed, speeds
from edit_compile.distillation.evaluate.validation import HeldOutError, held_out_error
from edit_compile.distillation.output.model_card import model_card
from edit_compile.distillation.output.plot import plot_losses
from edit_compile.distillation.output.run_folder import RunFolder
from edit_compile.distillation.recipe.load import load_recipe
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.distributed import gathered, make_accelerator, set_precision, shard, shards, share_sites
from edit_compile.distillation.train.interrupt import interruptible
from edit_compile.distillation.train.metrics import Row
from edit_compile.distillation.train.modes import only_trainable, room_for_graphs
from edit_compile.distillation.train.trackers import settings_of
from edit_compile.distillation.train.trainer import Restored, Trainer
from edit_compile.errors import DistillError, EditCompileError
from edit_compile.student.checkpoint import INDEX, load, save
from edit_compile.student.site import converted_sites
from edit_compile.student.weights import unshare

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A finished distillation.

    Attributes:
        folder: where the student is: `edit_compile.load(folder)`.
        before, after: the held-out error of the converted model and of the student, at the last stage's resolution.
        seconds: of training; held-out measurements left out.
        speeds: of teacher and student at each stage's resolution; empty if they could not be measured.
    """

    folder: Path
    student: nn.Module
    before: HeldOutError
    after: HeldOutError
    seconds: float
    speeds: tuple[Speed, ...]

    def to_dict(self) -> dict[str, Any]:
        errors = {"before": self.before.to_dict(), "after": self.after.to_dict()}
        speeds = [asdict(speed) for speed in self.speeds]
        return {"folder": str(self.folder), "seconds": round(self.seconds, 1), "held_out_error": errors, "speeds": speeds}


def distill(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    student: nn.Module | None = None,
    source: Source | None = None,
    denoise: Denoise | None = None,
    schedule: NoiseSchedule | None = None,
    report: Callable[[Row], None] | None = None,
) -> Result:
    """Train a converted model to do what its teacher does.

    Args:
        recipe: a recipe, a YAML file, or a shipped recipe's name.
        output: the folder to write: the student's checkpoint, `recipe.yaml`, `metrics.jsonl`, `result.json`, and while
            training `checkpoints/`. Default: `runs/` and the recipe's name.
        resume: continue what is in the folder, with the same recipe, bit for bit; start if there is nothing yet.
        student: a converted model, trained in place, instead of the recipe's `model`.
        source, denoise, schedule: instead of what the recipe and the model's family give: the data, how the model is
            called, and what it predicts.
        report: called with every row of metrics, on the main process.

    Raises:
        RecipeError: the recipe is wrong.
        DistillError: the run cannot start or go on.
        Interrupted: SIGINT or SIGTERM came; what is needed to resume was saved.
    """
    name = "distilled" if isinstance(recipe, Recipe) else Path(recipe).stem
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = RunFolder(Path(output) if output is not None else Path("runs") / name)
    accelerator = make_accelerator(recipe, folder.path)
    base, student, found = _student(recipe) if student is None else (None, student, None)
    if not converted_sites(student):
        raise DistillError(f"{type(student).__name__} is not converted: there is nothing to distill; linearize(model) converts it")
    schedule = schedule or found or _schedule(recipe, None)
    teacher = _teacher(student, recipe)
    trained = set(trained_parameters(student, recipe.train))
    with only_trainable(student, trained), room_for_graphs(compiled=recipe.compile):
        _place(student, trained, recipe, accelerator)
        if teacher is not student:
            set_precision(teacher.eval(), (), recipe.precision)
            teacher.to(accelerator.device)
        source = source or open_source(recipe.data, teacher, recipe.seed, base=base, device=accelerator.device, dtype=recipe.dtype)
        context = Context(recipe, student, teacher, source, denoise or denoise_by_family, schedule, accelerator)
        _check(context)
        with accelerator.main_process_first():
            restored = folder.open(recipe, resume=resume, writes=accelerator.is_main_process)
        result = _run(context, folder, base, report or (lambda row: None), restored)
    skipped = dict(gathered(list(source.skipped.items())))
    if accelerator.is_main_process:
        write_unreadable(folder.path, skipped)
    return result


def _run(context: Context, folder: RunFolder, base: str | None, report: Callable[[Row], None], restored: Restored | None) -> Result:
    recipe, student, main = context.recipe, context.student, context.accelerator.is_main_process

    def note(row: Row) -> None:
        folder.add(row)
        context.accelerator.log({name: value for name, value in row.items() if isinstance(value, int | float)}, step=row["total"])
        report(row)

    resolution = recipe.stages[-1].resolution
    sampler = Sampler(context, *resolution)

    def optional(what: str, call: Callable[[], Any]) -> Any:
        """What a run can do without: a picture that does not fit into memory any more must not cost the student."""
        try:
            return call()
        except (OSError, RuntimeError, EditCompileError) as error:
            if shards(context.accelerator):
                raise  # the other processes wait in the middle of a forward
            log.warning("%s is left out: %s", what, str(error).partition("\n")[0] or type(error).__name__)
            return None

    def draw(total: int) -> None:
        optional("the sample grid", lambda: sampler.save(folder.samples(total)))

    context.accelerator.init_trackers("edit_compile", settings_of(recipe))
    with interruptible() as interrupt:
        before = HeldOutError.from_dict(restored[0].before) if restored else held_out_error(context, *resolution)
        trainer = Trainer(context, folder.checkpoints, note, interrupt, before.to_dict(), draw)
        trainer.run(restored)
    save(student, folder.path, base=base)
    for tracker in context.accelerator.trackers:  # end_training() would end the process group too
        tracker.finish()
    after = held_out_error(context, *resolution)
    result = Result(folder.path, student, before, after, trainer.seconds, optional("the speed", lambda: speeds(context)) or ())
    draw(trainer.total)
    if main:
        plot_losses(folder.rows(), folder.path / "losses.png")
        folder.finish(result.to_dict(), model_card(recipe, plan_of(student), base, before, result.after, result.speeds, folder.pictures()))
    context.accelerator.wait_for_everyone()
    return result


def _check(context: Context) -> None:
    """Find out now what would end the run when some later phase begins.

    Raises:
        DistillError: a batch does not divide, or pictures of a resolution cannot be had; says in which phase.
    """
    for phase in phases_of(context.recipe):
        try:
            context.own_rows(phase.options.global_batch_size, phase.options.micro_batch_size)
            context.source.check(phase.height, phase.width)
        except DistillError as error:
            raise DistillError(f"{phase.name}: {error}") from error


def _teacher(student: nn.Module, recipe: Recipe) -> nn.Module:
    """The student's own original attention, or, where all weights are trained, that of a copy."""
    if recipe.train != "all":
        return student
    copied = copy.deepcopy(student)
    unshare(student)
    return copied.requires_grad_(False)


def _place(student: nn.Module, trained: Collection[str], recipe: Recipe, accelerator: Accelerator) -> None:
    """The student in the recipe's precision, on its devices, and in evaluation mode: teacher and student must see the same."""
    if accelerator.num_processes > 1:
        share_sites(student, accelerator)
    set_precision(student.eval(), trained, recipe.precision)
    if not shards(accelerator):
        student.to(accelerator.device)
        return
    shard(student, accelerator)
    for site in converted_sites(student).values():
        site.edit_teacher.to(accelerator.device)


def _student(recipe: Recipe) -> tuple[str | None, nn.Module, NoiseSchedule]:
    """Where the base model is, the student, and what it predicts."""
    if (Path(recipe.model) / INDEX).is_file():
        if recipe.convert != LinearizeConfig():
            raise DistillError(f"{recipe.model} is converted already: leave convert: out of the recipe")
        student = load(recipe.model)
        base = student.__dict__.get("edit_base")
        return base, student, _schedule(recipe, base)
    torch.manual_seed(recipe.seed)  # of what conversion adds, and of random weights
    loaded = load_model(recipe.model, dtype=recipe.dtype, random_weights=isinstance(recipe.data, RandomData))
    if not loaded.has_weights:
        raise DistillError(
            f"{recipe.model} is structure only, without weights to distill; data: {{kind: random}} tries speed and memory "
            "with random weights"
        )
    base = loaded.pipeline or loaded.source
    return base, linearize(loaded.model, recipe.convert), _schedule(recipe, base)


def _schedule(recipe: Recipe, base: str | None) -> NoiseSchedule:
    if recipe.prediction != "auto":
        return default_schedule(recipe.prediction)
    if isinstance(recipe.data, RandomData):
        return default_schedule("rectified-flow")  # whatever it is: nothing is learned
    if base is None:
        raise DistillError("what the model predicts is not known without its pipeline; set prediction: in the recipe")
    if base in [f"demo/{name}" for name in DEMOS]:
        return NoiseSchedule("rectified-flow")
    return schedule_of_pipeline(base)
