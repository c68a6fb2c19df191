"""The loop over phases of steps: first the layerwise fit, then the stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.distillation.context import Context, NoisyBatch, trained_parameters
from edit_compile.distillation.data import BatchRequest
from edit_compile.distillation.data.prefetch import prefetch
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.processes import gathered, waiting_for_others
from edit_compile.distillation.recipe.schedule import Phase, phases_of
from edit_compile.distillation.recipe.schema import Stage
from edit_compile.distillation.train.checkpoints import Checkpoint, CheckpointMetadata, Saving, checkpoint_path, describe_last
from edit_compile.distillation.train.distributed import gather_full, reshard, wrap
from edit_compile.distillation.train.interrupt import Interrupt
from edit_compile.distillation.train.metrics import Average, MetricsRow, losses_of
from edit_compile.distillation.train.optimizer import MovingAverage, learning_rate, make_optimizers
from edit_compile.distillation.train.spike_guard import SpikeGuard
from edit_compile.distillation.train.step import layerwise_gradients, stage_gradients
from edit_compile.distillation.train.train_context import own_random_state
from edit_compile.distillation.train.train_state import TrainState
from edit_compile.errors import DistillError, Interrupted
from edit_compile.progress import Work, working
from edit_compile.student.site import converted_sites


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        total: steps done in all phases.
        began: when training would have begun without interruptions, on the monotonic clock.
        guard: of the current phase.
        interval: the metrics since the last row.
        work: what is told of the current phase.
    """

    total: int = 0
    began: float = field(default_factory=time.monotonic)
    guard: SpikeGuard = field(default_factory=SpikeGuard)
    interval: Average = field(default_factory=Average)
    work: Work = field(default_factory=lambda: Work("training"))

    @property
    def seconds(self) -> float:
        """The seconds of training, with those before an interruption."""
        return time.monotonic() - self.began


@dataclass
class Trainer:
    """Trains the student of a context in place.

    Attributes:
        checkpoints: the folder they are saved in.
        report: is given every row of metrics, on the main process.
        interrupt: whether to stop.
        before: the validation error before training, for the checkpoints.
        write_grid: given the number of steps done, samples images with the average weights.
        phases: what is trained, in order; default: all of the recipe.
        model: the student as the stages call it; None in the layerwise fit.
        average: of the weights; None in the layerwise fit, and without `ema_decay`.
        seconds: of training, once it is done.
    """

    context: Context
    checkpoints: Path
    report: Callable[[MetricsRow], None]
    interrupt: Interrupt
    before: dict[str, Any]
    write_grid: Callable[[int], None]
    phases: Sequence[Phase] = ()
    progress: Progress = field(default_factory=Progress, init=False)
    model: nn.Module | None = field(default=None, init=False)
    average: MovingAverage | None = field(default=None, init=False)
    seconds: float = field(default=0.0, init=False)
    _saving: Saving | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.phases = self.phases or phases_of(self.context.recipe)

    def run(self, checkpoint: Checkpoint | None = None) -> None:
        """Train all phases, or what is left of them. Afterwards the student's weights are the moving average, if there is one.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was saved.
            DistillError: too many consecutive steps had to be skipped, or a checkpoint could not be written.
        """
        context, phases = self.context, self.phases
        first, self.progress = 0, Progress()
        if checkpoint is not None:
            metadata = checkpoint[0]
            first, self.progress = metadata.phase, Progress(metadata.total, time.monotonic() - metadata.seconds)
        try:
            with own_random_state(context.accelerator.device):
                reshard(context.student)
                for number in range(first, len(phases)):
                    if self.model is None and phases[number].losses is not None:
                        self._begin_stages()
                    self._run_phase(number, phases[number], checkpoint)
                    checkpoint = None
        except Exception:
            if context.accelerator.num_processes == 1:  # others might not take part
                with suppress(DistillError):
                    self._finish_saving()
            raise
        self.seconds = self.progress.seconds
        if self.average is not None:
            self.average.copy_to_parameters()
            self.average = None

    def _begin_stages(self) -> None:
        student, teacher, recipe = self.context.student, self.context.teacher, self.context.recipe
        self.model = wrap(student, teacher, recipe, self.context.accelerator)
        if recipe.ema_decay is not None:
            self.average = MovingAverage(trained_parameters(student, recipe.train), recipe.ema_decay)

    def _run_phase(self, number: int, phase: Phase, checkpoint: Checkpoint | None) -> None:
        context, options = self.context, phase.options
        trained = trained_parameters(context.student, context.recipe.train)
        state = TrainState(trained, make_optimizers(context.student, trained, context.recipe.optimizer), self.average)
        done, self.progress.guard = 0, SpikeGuard()
        if checkpoint is not None:
            done = self._restore(state, checkpoint)
        slices = context.local_batch_slices(options.global_batch_size, options.micro_batch_size)
        batches = _batches(context, phase, slices, range(done, options.steps))
        self.progress.interval = Average()
        several = f" ({number + 1} of {len(self.phases)})" if len(self.phases) > 1 else ""
        with working(f"{phase.name}{several}", options.steps, done) as self.progress.work:
            for step in range(done, options.steps):
                torch.manual_seed(seed_of(context.recipe.seed, "step", number, step, context.accelerator.process_index))
                stop = self._take_step(phase, step, state, self._gradients(phase, state, batches, len(slices)))
                self.progress.total += 1
                self.progress.work.advance()
                self._after_step(number, phase, step + 1, state, stop)

    def _restore(self, state: TrainState, checkpoint: Checkpoint) -> int:
        """Set a phase's state to what was saved in it; returns how many of its steps are done."""
        metadata, saved = checkpoint
        state.load(saved, metadata.numbers)
        self.progress.guard = metadata.guard
        if self.average is not None:
            self.average.updates = metadata.averages
        return metadata.step

    def _gradients(self, phase: Phase, state: TrainState, batches: Iterator[NoisyBatch], forwards: int) -> dict[str, Tensor]:
        if phase.losses is None or self.model is None:
            return layerwise_gradients(self.context, state.trained, batches, forwards)
        stage = phase.options if isinstance(phase.options, Stage) else None
        return stage_gradients(self.context, self.model, batches, forwards, phase.losses, stage)

    def _take_step(self, phase: Phase, step: int, state: TrainState, losses: dict[str, Tensor]) -> bool:
        """Update the weights, unless the step must be skipped; returns whether to stop after it."""
        recipe, progress, norm = self.context.recipe, self.progress, self._clip(phase, state)
        flags = [self.interrupt.requested, self._saving is not None and self._saving.written()]
        health = torch.stack([losses["loss"].float(), norm.float(), *norm.new_tensor(flags, dtype=torch.float32)])
        with waiting_for_others():
            loss, mean_norm, stopping, written = self.context.accelerator.reduce(health, "mean").tolist()
        if written == 1:  # in all processes
            self._finish_saving()
        progress.guard, reason = progress.guard.after(loss, mean_norm, recipe.spike_factor)
        if reason is None:
            state.step(learning_rate(step, phase.options))
            progress.interval.add({**losses, "grad_norm": norm})
        else:
            progress.interval.skipped += 1
        state.optimizer.zero_grad()
        if progress.guard.consecutive_skips > recipe.max_skipped_steps:
            self._finish_saving()
            raise DistillError(
                f"{phase.name}, step {step + 1}: {reason}; the previous {recipe.max_skipped_steps} steps were skipped too; "
                f"{describe_last(self.checkpoints)}. A lower lr or max_grad_norm may help"
            )
        return bool(stopping > 0)

    def _clip(self, phase: Phase, state: TrainState) -> Tensor:
        """Clip gradients and return their norm; in the layerwise fit every site's on their own, since its loss is its own."""
        groups: list[Any] = [list(state.trained.values())]
        if phase.losses is None:
            groups = [list(site.parameters()) for site in converted_sites(self.context.student).values()]
        device, most = self.context.accelerator.device, self.context.recipe.max_grad_norm
        # On the CPU are the norms of offloaded shards, and of a site without gradients.
        return torch.stack([gather_full(nn.utils.clip_grad_norm_(group, most)).to(device) for group in groups]).max()

    def _after_step(self, number: int, phase: Phase, step: int, state: TrainState, stop: bool) -> None:
        """Log, write a sample grid and save, when it is time to."""
        recipe, total = self.context.recipe, self.progress.total
        ends = stop or total == sum(each.options.steps for each in self.phases)
        saves = ends or total % recipe.save_every == 0
        if saves or step == phase.options.steps or step % recipe.log_every == 0:
            self._log(phase, step)
        if recipe.samples.every is not None and total % recipe.samples.every == 0:
            with self.average.applied() if self.average is not None else nullcontext():
                self.write_grid(total)
            reshard(self.context.student)
        if saves:
            self._begin_saving(number, step, state)
            if ends or not recipe.save_in_background:
                self._finish_saving()
            if stop:
                place = checkpoint_path(self.checkpoints, total)
                raise Interrupted(f"stopped at {phase.name}, step {step} of {phase.options.steps}; saved in {place}")

    def _begin_saving(self, phase: int, step: int, state: TrainState) -> None:
        """Begin to save a checkpoint, once the one before is done. All processes take part."""
        self._finish_saving()
        progress, recipe = self.progress, self.context.recipe
        metadata = CheckpointMetadata(
            recipe=recipe.model_dump(mode="json"),
            phase=phase,
            step=step,
            total=progress.total,
            averages=self.average.updates if self.average is not None else 0,
            guard=progress.guard,
            numbers=state.numbers(),
            before=self.before,
            seconds=progress.seconds,
        )
        self._saving = Saving(self.checkpoints, metadata, state.tensors(), recipe.keep_last, in_background=recipe.save_in_background)

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being saved, if one is."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.finish()

    def _log(self, phase: Phase, step: int) -> None:
        accelerator, interval, self.progress.interval = self.context.accelerator, self.progress.interval, Average()
        steps, seconds, options = interval.steps + interval.skipped, interval.seconds, phase.options
        place = {"phase": phase.name, "step": step, "steps": options.steps, "total": self.progress.total, "samples": phase.position(step)}
        taken = {"skipped": interval.skipped, "lr": learning_rate(step - 1, options)}
        means = interval.means(lambda values: accelerator.reduce(values, "mean"))
        speed = {"seconds_per_step": seconds / steps, "samples_per_second": steps * options.global_batch_size / seconds}
        unreadable = len(set(gathered(list(self.context.source.skipped))))
        row = {**place, **taken, **means, **speed, "unreadable": unreadable}
        self.progress.work.note = losses_of(row)
        if accelerator.is_main_process:
            self.report(row)


def _batches(context: Context, phase: Phase, slices: list[range], steps: range) -> Iterator[NoisyBatch]:
    size = phase.options.global_batch_size
    height, width, frames = phase.height, phase.width, phase.frames
    requests = (BatchRequest(phase.position(step), size, rows, height, width, frames=frames) for step in steps for rows in slices)
    return prefetch(context.noisy_batch, requests) if context.source.concurrent else map(context.noisy_batch, requests)
