"""A distillation, from a recipe to a finished folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edit_compile.adapters.denoise import denoise as denoise_by_family
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.adapters.pipeline_calls import call_as_recorded
from edit_compile.api import plan_of
from edit_compile.bench.conversion_cost import CostReport, cost
from edit_compile.bench.machine import Machine
from edit_compile.bench.min_tokens import min_tokens_set
from edit_compile.bench.roofline import known_rates
from edit_compile.distillation.context import Context, Denoise, trained_parameters
from edit_compile.distillation.data import DataSource, open_source
from edit_compile.distillation.data.records import write_skipped
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.data.source import DataSummary, FiniteSource, check_size
from edit_compile.distillation.evaluate.sample_grid import GridSampler
from edit_compile.distillation.evaluate.speed import Speed, measure_speeds
from edit_compile.distillation.evaluate.validation import ValidationResult, validate_everywhere
from edit_compile.distillation.models import (
    Student,
    check_frames_of,
    give_lora,
    make_student,
    noise_schedule,
    stages_below_min_tokens,
    unshare_blocks,
)
from edit_compile.distillation.output.data_record import continue_with_data, record_data
from edit_compile.distillation.output.html_report import html_summary, write_report
from edit_compile.distillation.output.model_card import model_card
from edit_compile.distillation.output.plot import plot_losses
from edit_compile.distillation.output.run_folder import RunFolder
from edit_compile.distillation.processes import gathered, taking_time
from edit_compile.distillation.recipe.load import load_recipe
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import LoraOptions, Recipe, Stage
from edit_compile.distillation.train.checkpoints import Checkpoint, describe_last
from edit_compile.distillation.train.distributed import make_accelerator, set_precision, shard, shards, share_sites
from edit_compile.distillation.train.interrupt import interruptible
from edit_compile.distillation.train.metrics import MetricsRow
from edit_compile.distillation.train.optimizer import check_optimizer, muon_matrices
from edit_compile.distillation.train.peers import watching_peers
from edit_compile.distillation.train.step import weights_of_timesteps
from edit_compile.distillation.train.trackers import settings_of
from edit_compile.distillation.train.train_context import only_trainable
from edit_compile.distillation.train.trainer import Trainer
from edit_compile.errors import DistillError, EditCompileError, NoExampleInputsError
from edit_compile.extras import need
from edit_compile.files import alone_in
from edit_compile.progress import working
from edit_compile.student.checkpoint import save
from edit_compile.student.handle import unwrap
from edit_compile.student.lora import merge_lora
from edit_compile.student.site import converted_sites
from edit_compile.student.standalone import check_standalone
from edit_compile.student.weights import own_weights, separate_teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A finished distillation.

    Attributes:
        folder: where the student is: `edit_compile.load(folder)`.
        before, after: the validation error of the converted model and of the student, at the last stage's resolution.
        seconds: of training, without measurements before and after it.
        speeds: of teacher and student at each stage's resolution; empty if they could not be measured.
        data: what is in the data at the first stage's resolution; None if it is made as it is asked for.
        machine: what it was made on, and with.
    """

    folder: Path
    student: nn.Module
    before: ValidationResult
    after: ValidationResult
    seconds: float
    speeds: tuple[Speed, ...]
    data: DataSummary | None = None
    machine: Machine = field(default_factory=Machine.this)

    def to_dict(self) -> dict[str, Any]:
        """Return what `result.json` holds."""
        errors = {"before": self.before.to_dict(), "after": self.after.to_dict()}
        speeds = [asdict(speed) for speed in self.speeds]
        data = None if self.data is None else self.data.to_dict()
        return {
            "folder": str(self.folder),
            "seconds": round(self.seconds, 1),
            "held_out_error": errors,
            "speeds": speeds,
            "data": data,
            "machine": self.machine.model_dump(),
        }

    def _repr_html_(self) -> str:
        return html_summary(self.folder)


def distill(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    student: nn.Module | None = None,
    source: DataSource | None = None,
    denoise: Denoise | None = None,
    schedule: NoiseSchedule | None = None,
    report: Callable[[MetricsRow], None] | None = None,
    announce: Callable[[DataSummary], None] | None = None,
    accept_changed_data: bool = False,
) -> Result:
    """Train a converted model to do what its teacher does.

    Args:
        recipe: a recipe, a YAML file, or a shipped recipe's name.
        output: the folder to write: the student's checkpoint, `recipe.yaml`, `metrics.jsonl`, `result.json`, and while
            training `checkpoints/`. Default: `runs/` and the recipe's name.
        resume: continue the run in the folder, with the same recipe, bit for bit; start one if there is none.
        overwrite: replace what the folder holds.
        student: a converted model, trained in place, instead of the recipe's `model`.
        source, denoise, schedule: instead of what the recipe and the model's family give: the data, how the model is
            called, and what it predicts.
        report: called with every row of metrics, on the main process.
        announce: called before training with what is in the data, where that is known, on the main process.
        accept_changed_data: continue with data that changed since the run began; what was held out still is.

    Raises:
        RecipeError: the recipe is wrong.
        DistillError: the run cannot start or continue, the folder holds something else, or another process distils into it.
        Interrupted: SIGINT or SIGTERM arrived; what is needed to resume was saved.
    """
    need("distill", "distill")
    name = "distilled" if isinstance(recipe, Recipe) else Path(recipe).stem
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = RunFolder(Path(output) if output is not None else Path("runs") / name)
    if resume and overwrite:
        raise DistillError("resume continues the run in the folder, overwrite begins another: choose one of them")
    accelerator = make_accelerator(recipe, folder.path)
    alone = alone_in(folder.path, "distils into", DistillError) if accelerator.is_main_process else nullcontext()
    with watching_peers(lambda: f"{describe_last(folder.checkpoints)}; the same command with --resume continues"), alone:
        folder.check(resume=resume, overwrite=overwrite)
        if student is None:
            other_data, for_shards = source is not None or denoise is not None, shards(accelerator)
            with working(f"loading and converting {recipe.model}"):
                made = make_student(recipe, other_data=other_data, for_shards=for_shards)
        else:
            made = Student(student, None)
        if not converted_sites(made.model):
            raise DistillError(f"{type(made.model).__name__} is not converted: there is nothing to distill; linearize(model) converts it")
        if recipe.standalone:
            check_standalone(unwrap(made.model))  # what could fail after the training is tried before it
        check_frames_of(recipe, made.model)
        schedule = schedule or noise_schedule(recipe, made.base)
        denoise = denoise or (call_as_recorded if recipe.data.recorded_calls else denoise_by_family)
        run = Run(recipe, folder, accelerator, made, schedule, denoise, report or (lambda row: None))
        below = min_tokens_set(made.model, 0)  # what is trained runs at every size
        with only_trainable(made.model, run.trained), below:
            run.prepare(source, resume=resume, accept_changed_data=accept_changed_data)
            if run.data is not None and announce is not None and accelerator.is_main_process:
                announce(run.data)
            return run.finish(run.train())


@dataclass
class Run:
    """One distillation: `prepare`, `train`, `finish`. All processes must call them.

    Attributes:
        denoise: how a model is called.
        report: called with every row of metrics, on the main process.
        teacher: the model whose original attention is the teacher.
        trained: the names of the parameters that are trained.
        min_tokens: the student's, which holds for what is saved and for its speed.
        context, checkpoint: what is trained, and what training continues from, if anything, once prepared.
        data: what is in the data at the first phase's resolution, if that is known, once prepared.
    """

    recipe: Recipe
    folder: RunFolder
    accelerator: Accelerator
    student: Student
    schedule: NoiseSchedule
    denoise: Denoise
    report: Callable[[MetricsRow], None]
    teacher: nn.Module = field(init=False)
    trained: set[str] = field(init=False)
    min_tokens: int = field(init=False)
    context: Context = field(init=False)
    checkpoint: Checkpoint | None = field(default=None, init=False)
    data: DataSummary | None = field(default=None, init=False)
    grids: GridSampler = field(init=False)

    def __post_init__(self) -> None:
        student, recipe, read_only = self.student.model, self.recipe, shards(self.accelerator)
        self.teacher, self.min_tokens = student, plan_of(student).min_tokens
        for note in stages_below_min_tokens(recipe, student, self.min_tokens):
            log.warning("%s", note)
        if recipe.train == "all":  # then the teacher needs weights of its own
            self.teacher = separate_teacher(student)
            own_weights(unwrap(student), read_only=read_only)
        elif recipe.train == "blocks":
            self.teacher = separate_teacher(student)
            unshare_blocks(student, read_only=read_only)
        elif recipe.train == "lora":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(recipe.seed, "lora"))
                give_lora(student, recipe.lora or LoraOptions())
        trained = trained_parameters(student, recipe.train)
        self.trained = set(trained)
        check_optimizer(recipe.optimizer)
        if recipe.optimizer.kind == "muon":
            muon_matrices(student, trained)  # there are some

    def prepare(self, source: DataSource | None, *, resume: bool, accept_changed_data: bool = False) -> None:
        """Place the models, open the data and the folder, and find out now what would end the run in a later phase.

        Args:
            source: instead of the recipe's data.

        Raises:
            DistillError: the data cannot be opened, a phase cannot run, or the folder has another run.
        """
        recipe, accelerator = self.recipe, self.accelerator
        if accelerator.num_processes > 1:
            share_sites(self.student.model, accelerator)
        self._place(self.student.model, self.trained)
        if self.teacher is not self.student.model:
            # What a teacher shares with its student, the sites' own weights, stays as that needs it.
            self._place(self.teacher, trained_parameters(self.teacher, "attention"))
        options: dict[str, Any] = {"base": self.student.base, "device": accelerator.device, "dtype": recipe.dtype}
        with working("opening the data"):
            source = source or open_source(recipe.data, self.teacher, recipe.seed, **options)
        self.context = Context(recipe, self.student.model, self.teacher, source, self.denoise, self.schedule, accelerator)
        self.grids = GridSampler(self.context, *self._last_size())
        self._check_sizes()
        self.checkpoint = self.folder.open(recipe, resume=resume, writes=accelerator.is_main_process)
        with accelerator.main_process_first():
            if self.checkpoint is not None:
                continue_with_data(self.folder.path, source, accept_changed=accept_changed_data)
            elif accelerator.is_main_process:
                record_data(self.folder.path, source)
        if isinstance(source, FiniteSource):
            first = phases_of(recipe)[0]
            self.data = source.summary(first.height, first.width)

    def _check_sizes(self) -> None:
        """Find out whether every phase can run, and every size can be validated at."""
        context, source = self.context, self.context.source
        for phase in phases_of(self.recipe):
            with _errors_of(phase.name):
                context.local_batch_slices(phase.options.global_batch_size, phase.options.micro_batch_size)
                check_size(source, phase.height, phase.width, phase.frames)
                context.visited(phase.height, phase.width, phase.frames)
                if isinstance(phase.options, Stage):
                    weights_of_timesteps(phase.options, self.schedule, torch.zeros(1))
        for height, width in self.recipe.validation.resolutions:
            with _errors_of(f"validation.resolutions: {height} x {width}"):
                check_size(source, height, width, self._last_size()[2])

    def train(self) -> Trainer:
        """Train, and save the student.

        Raises:
            DistillError, Interrupted: as `distill`.
        """
        with taking_time():
            self.accelerator.init_trackers("edit_compile", settings_of(self.recipe))
        with interruptible() as interrupt:
            before = self.checkpoint[0].before if self.checkpoint is not None else self._validate().to_dict()
            trainer = Trainer(self.context, self.folder.checkpoints, self._record, interrupt, before, self._write_grid)
            trainer.run(self.checkpoint)
        if self.recipe.lora is not None and self.recipe.lora.merge:
            merge_lora(self.student.model)
        with working(f"saving to {self.folder.path}"), min_tokens_set(self.student.model, self.min_tokens):
            save(self.student.model, self.folder.path, base=self.student.base, standalone=self.recipe.standalone)
        with taking_time():
            for tracker in self.accelerator.trackers:  # end_training() would end the process group too
                tracker.finish()
        return trainer

    def finish(self, trainer: Trainer) -> Result:
        """Measure the student and write what the run leaves behind.

        Raises:
            DistillError: the student predicts NaN or infinity.
        """
        after = self._validate()
        speeds: tuple[Speed, ...] = ()
        with self._optional("the speed"), min_tokens_set(self.student.model, 0 if shards(self.accelerator) else self.min_tokens):
            speeds = measure_speeds(self.context)
        before = ValidationResult.from_dict(trainer.before)
        result = Result(self.folder.path, self.student.model, before, after, trainer.seconds, speeds, self.data)
        self._write_grid(trainer.progress.total, after.total)
        if self.accelerator.is_main_process:
            plot_losses(self.folder.rows(), self.recipe, (before.total, after.total), self.folder.path / "losses.png")
            plan, base = plan_of(self.student.model).model_copy(update={"min_tokens": self.min_tokens}), self.student.base
            card = model_card(self.recipe, plan, base, before, after, speeds, self.folder.images(), self._costs())
            self.folder.finish(result.to_dict(), card)
            with self._optional("report.html", alone=True), working("writing the report"):
                write_report(self.folder.path)
        self.accelerator.wait_for_everyone()
        skipped = dict(gathered(list(self.context.source.skipped.items())))
        if self.accelerator.is_main_process:
            write_skipped(self.folder.path, skipped)
        return result

    def _costs(self) -> CostReport | None:
        """Count the FLOPs of the conversion; not where nobody knows the model's inputs, nor of a share of the parameters."""
        if not shards(self.accelerator):
            with self._optional("the count of FLOPs", alone=True), suppress(NoExampleInputsError):
                return cost(self.student.model, pipeline=self.student.base, rates=known_rates())
        return None

    def _place(self, model: nn.Module, trained: Collection[str]) -> None:
        """Put a model on its devices, in the recipe's precision and in evaluation mode: teacher and student must see the same.

        Args:
            trained: names of parameters, which stay in float32.
        """
        model.eval()
        if shards(self.accelerator):
            shard(model, trained, self.recipe, self.accelerator, self.student.loaded_in)
        else:
            set_precision(model, trained, self.recipe.precision)
            model.to(self.accelerator.device)

    def _validate(self) -> ValidationResult:
        return validate_everywhere(self.context, *self._last_size())

    def _last_size(self) -> tuple[int, int, int | None]:
        """Return the height, width and frames of the last stage."""
        last = phases_of(self.recipe)[-1]
        return last.height, last.width, last.frames

    def _record(self, row: MetricsRow) -> None:
        self.folder.add(row)
        with taking_time():
            self.accelerator.log({name: value for name, value in row.items() if isinstance(value, int | float)}, step=row["total"])
        self.report(row)

    def _write_grid(self, total: int, error: float | None = None) -> None:
        with self._optional("the sample grid"):
            self.grids.save(self.folder.samples(total), error)

    @contextmanager
    def _optional(self, what: str, *, alone: bool = False) -> Iterator[None]:
        """Log errors instead of raising them: an image that does not fit into memory must not cost the student.

        Args:
            alone: whether no other process takes part.
        """
        try:
            yield
        except (OSError, RuntimeError, EditCompileError) as error:
            if shards(self.accelerator) and not alone:
                raise  # the other processes wait in the middle of a forward
            log.warning("%s is left out: %s", what, str(error).partition("\n")[0] or type(error).__name__)


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Say of which phase or size an error is."""
    try:
        yield
    except DistillError as error:
        raise DistillError(f"{what}: {error}") from error
