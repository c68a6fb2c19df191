"""The loop: phases of steps, first the warm start, then the stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.distillation.context import Context, Sample, trained_parameters
from edit_compile.distillation.data import Request
from edit_compile.distillation.data.prefetch import ahead
from edit_compile.distillation.data.seeding import seed_of
from edit_compile.distillation.recipe.schedule import Phase, phases_of
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.distillation.train.checkpoints import State, last_good, place_of, write_state
from edit_compile.distillation.train.distributed import gathered, reshard, whole, wrap
from edit_compile.distillation.train.features import recording
from edit_compile.distillation.train.interrupt import Interrupt
from edit_compile.distillation.train.metrics import Average, Row
from edit_compile.distillation.train.modes import own_random_state
from edit_compile.distillation.train.optimizer import MovingAverage, learning_rate, make_optimizer
from edit_compile.distillation.train.spike_guard import Guard
from edit_compile.distillation.train.step import stage_gradients, warm_start_gradients
from edit_compile.distillation.train.train_state import Live
from edit_compile.errors import DistillError, Interrupted
from edit_compile.student.site import converted_sites

Restored = tuple[State, dict[str, Tensor]]


@dataclass
class Trainer:
    """Trains the student of a context in place.

    Attributes:
        checkpoints: the folder they go to.
        report: is given every row of metrics, on the main process.
        interrupt: whether to stop.
        before: the held-out error before training, for the checkpoints.
        draw: given the number of steps done, draws samples with the average weights.
        seconds: of training, with what a restored run has behind it.
    """

    context: Context
    checkpoints: Path
    report: Callable[[Row], None]
    interrupt: Interrupt
    before: dict[str, Any]
    draw: Callable[[int], None]
    seconds: float = 0.0

    def run(self, restored: Restored | None = None) -> None:
        """All phases, or what is left of them. At the end the student's weights are the moving average's, if there is one.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was saved.
            DistillError: too many steps in a row had to be left out, or a checkpoint could not be written.
        """
        context, phases = self.context, phases_of(self.context.recipe)
        state = restored[0] if restored is not None else None
        self.total, self.began = (state.total, time.monotonic() - state.seconds) if state else (0, time.monotonic())
        self.model: nn.Module | None = None
        self.average: MovingAverage | None = None
        with ExitStack() as modes:
            modes.enter_context(own_random_state(context.accelerator.device))
            reshard(context.student)
            for number in range(state.phase if state else 0, len(phases)):
                phase = phases[number]
                if self.model is None and phase.losses is not None:
                    self._begin_stages(modes)
                self._run(number, phase, restored)
                restored = None
        self.seconds = time.monotonic() - self.began
        if self.average is not None:
            self.average.copy_to_parameters()
            self.average = None
        del self.live  # the optimizer's memory is needed for what comes now

    def _begin_stages(self, modes: ExitStack) -> None:
        student, teacher, recipe = self.context.student, self.context.teacher, self.context.recipe
        for model in dict.fromkeys((student, teacher)):
            modes.enter_context(recording(model))
        self.model = wrap(student, teacher, recipe, self.context.accelerator)
        if recipe.ema_decay is not None:
            self.average = MovingAverage(trained_parameters(student, recipe.train), recipe.ema_decay)

    def _run(self, number: int, phase: Phase, restored: Restored | None) -> None:
        context, steps = self.context, phase.options.steps
        done = self._begin(restored)
        rows = context.own_rows(phase.options.global_batch_size, phase.options.micro_batch_size)
        samples = _samples(context, phase, rows, range(done, steps))
        self.interval = Average()
        for step in range(done, steps):
            torch.manual_seed(seed_of(context.recipe.seed, "step", number, step, context.accelerator.process_index))
            stop = self._step(phase, step, self._gradients(phase, samples, len(rows)))
            self.total += 1
            self._after_step(number, phase, step + 1, stop)

    def _after_step(self, number: int, phase: Phase, step: int, stop: bool) -> None:
        """Log, draw and save, when it is time to."""
        recipe = self.context.recipe
        saves = stop or self.total % recipe.save_every == 0 or self.total == steps_of(recipe)
        if saves or step == phase.options.steps or step % recipe.log_every == 0:
            self._log(phase, step)
        if recipe.samples.every is not None and self.total % recipe.samples.every == 0:
            with self.average.applied() if self.average is not None else nullcontext():
                self.draw(self.total)
            reshard(self.context.student)
        if saves:
            place = self._save(number, step)
            if stop:
                raise Interrupted(f"stopped at {phase.name}, step {step} of {phase.options.steps}; saved in {place}")

    def _begin(self, restored: Restored | None) -> int:
        """A phase's optimizer, and what was saved in it; returns how many of its steps are done."""
        trained = trained_parameters(self.context.student, self.context.recipe.train)
        self.live = Live(trained, make_optimizer(trained, self.context.recipe.optimizer), self.average)
        self.guard = Guard()
        if restored is None:
            return 0
        state, tensors = restored
        self.live.load(tensors, state.numbers)
        tensors.clear()  # callers still refer to them
        self.guard = state.guard
        if self.average is not None:
            self.average.updates = state.averages
        return state.step

    def _gradients(self, phase: Phase, samples: Iterator[Sample], forwards: int) -> dict[str, Tensor]:
        if phase.losses is None or self.model is None:
            return warm_start_gradients(self.context, self.live.trained, samples, forwards)
        return stage_gradients(self.context, self.model, samples, forwards, phase.losses)

    def _step(self, phase: Phase, step: int, measured: dict[str, Tensor]) -> bool:
        """Take the step, unless it must be left out; returns whether to stop after it."""
        recipe, norm = self.context.recipe, self._clip(phase)
        stop = torch.full_like(norm, self.interrupt.requested, dtype=torch.float32)
        health = self.context.accelerator.reduce(torch.stack([measured["loss"].float(), norm.float(), stop]), "mean")
        loss, largest, stopping = health.tolist()
        self.guard, reason = self.guard.after(loss, largest, recipe.spike_factor)
        if reason is None:
            self.live.step(learning_rate(step, phase.options))
            self.interval.add({**measured, "grad_norm": norm})
        else:
            self.interval.skipped += 1
        self.live.optimizer.zero_grad()
        if self.guard.skipped_in_a_row > recipe.max_skipped_steps:
            raise DistillError(
                f"{phase.name}, step {step + 1}: {reason}; so it was with the {recipe.max_skipped_steps} steps before it, which were "
                f"left out; {last_good(self.checkpoints)}. A lower lr or clip may help"
            )
        return stopping > 0

    def _clip(self, phase: Phase) -> Tensor:
        """Clip gradients and return their norm; in the warm start every site on its own, for its loss is its own."""
        groups: list[Any] = [list(self.live.trained.values())]
        if phase.losses is None:
            groups = [list(site.parameters()) for site in converted_sites(self.context.student).values()]
        norms = [whole(nn.utils.clip_grad_norm_(group, self.context.recipe.max_grad_norm)) for group in groups]
        return torch.stack(norms).max().to(self.context.accelerator.device)  # of offloaded shards it is on the CPU

    def _save(self, phase: int, step: int) -> Path:
        """A checkpoint. All processes take part, the main one writes."""
        tensors = self.live.tensors(keep=self.context.accelerator.is_main_process)
        state = State(
            recipe=self.context.recipe.model_dump(mode="json"),
            phase=phase,
            step=step,
            total=self.total,
            averages=self.average.updates if self.average is not None else 0,
            guard=self.guard,
            numbers=self.live.numbers(),
            before=self.before,
            seconds=time.monotonic() - self.began,
        )
        if self.context.accelerator.is_main_process:
            write_state(self.checkpoints, state, tensors, self.context.recipe.keep_last)
        self.context.accelerator.wait_for_everyone()
        return place_of(self.checkpoints, self.total)

    def _log(self, phase: Phase, step: int) -> None:
        accelerator, interval, self.interval = self.context.accelerator, self.interval, Average()
        steps, seconds = interval.steps + interval.skipped, interval.seconds
        place = {"phase": phase.name, "step": step, "steps": phase.options.steps, "total": self.total, "samples": phase.position(step)}
        taken = {"skipped": interval.skipped, "lr": learning_rate(step - 1, phase.options)}
        means = interval.means(lambda values: accelerator.reduce(values, "mean"))
        speed = {"seconds_per_step": seconds / steps, "samples_per_second": steps * phase.options.global_batch_size / seconds}
        unreadable = len(set(gathered(list(self.context.source.skipped))))
        if accelerator.is_main_process:
            self.report({**place, **taken, **means, **speed, "unreadable": unreadable})


def steps_of(recipe: Recipe) -> int:
    """The steps of all phases."""
    return sum(phase.options.steps for phase in phases_of(recipe))


def _samples(context: Context, phase: Phase, rows: list[range], steps: range) -> Iterator[Sample]:
    batch = phase.options.global_batch_size
    requests = (Request(phase.position(step), batch, own, phase.height, phase.width) for step in steps for own in rows)
    return ahead(context.draw, requests) if context.source.concurrent else map(context.draw, requests)
