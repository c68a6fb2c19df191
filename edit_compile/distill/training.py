"""The loop: phases of steps, first the warm start, then the stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit_compile.distill.context import Context, trained_parameters
from edit_compile.distill.data import Request
from edit_compile.distill.losses import distillation_losses
from edit_compile.distill.metrics import Average, Row
from edit_compile.distill.optimizer import MovingAverage, learning_rate, make_optimizer
from edit_compile.distill.recipe import Recipe, Stage, WarmStart
from edit_compile.distill.warm_start import fitting
from edit_compile.sites import converted_sites


@dataclass(frozen=True)
class Phase:
    """A stage or the warm start, with its name and resolution."""

    name: str
    options: Stage | WarmStart
    height: int
    width: int


def phases_of(recipe: Recipe) -> list[Phase]:
    """What a recipe does, in order."""
    phases = []
    if recipe.warm_start is not None:
        phases.append(Phase("warm start", recipe.warm_start, *(recipe.warm_start.resolution or recipe.stage[0].resolution)))
    return phases + [Phase(f"stage {number}", stage, *stage.resolution) for number, stage in enumerate(recipe.stage)]


class Trainer:
    """Trains the student of a context in place. `report` gets every row of metrics on the main process."""

    def __init__(self, context: Context, report: Callable[[Row], None]) -> None:
        self.context, self.report = context, report
        self.trained = trained_parameters(context.student, context.recipe.train)
        self.model: nn.Module = context.student
        self.samples = 0
        self.average: MovingAverage | None = None

    def run(self) -> None:
        """All phases. At the end the student's weights are the moving average's, if there is one."""
        with only_trainable(self.context.student, self.trained):
            for phase in phases_of(self.context.recipe):
                self._run(phase)
        if self.average is not None:
            self.average.copy_to_parameters()

    def _run(self, phase: Phase) -> None:
        recipe, warm = self.context.recipe, isinstance(phase.options, WarmStart)
        optimizer = make_optimizer(self.trained, recipe.optimizer)
        if not warm and self.average is None and recipe.ema is not None:
            self.average = MovingAverage(self.trained, recipe.ema)
        rows = self.context.own_rows(phase.options.batch, phase.options.micro_batch)
        losses, since = Average(), time.monotonic()
        for step in range(phase.options.steps):
            rate = learning_rate(step, phase.options)
            for group in optimizer.param_groups:
                group["lr"] = rate
            measured = self._fit(phase, rows) if warm else self._distill(phase, rows)
            measured["grad_norm"] = self._clip(warm)
            optimizer.step()
            optimizer.zero_grad()
            if self.average is not None:
                self.average.update()
            self.samples += phase.options.batch
            losses.add(measured)
            if (step + 1) % recipe.log_every == 0 or step + 1 == phase.options.steps:
                self._log(phase, step + 1, rate, losses, time.monotonic() - since)
                since = time.monotonic()

    def _requests(self, phase: Phase, rows: list[range]) -> Iterator[tuple[Request, AbstractContextManager[None]]]:
        """The step's forwards, each with the context that puts off the exchange of gradients to the last."""
        for number, own in enumerate(rows):
            last = number == len(rows) - 1
            later = nullcontext() if last or self.model is self.context.student else self.context.accelerator.no_sync(self.model)
            yield Request(self.samples, phase.options.batch, own, phase.height, phase.width), later

    def _fit(self, phase: Phase, rows: list[range]) -> dict[str, Tensor]:
        """Gradients of one step of the warm start; its losses."""
        with fitting(self.context.student, 1 / len(rows)) as sites:
            for request, _ in self._requests(phase, rows):
                self.context.predict(self.context.student, self.context.sample(request))
        for parameter in self.trained.values():
            if parameter.grad is not None:
                parameter.grad = self.context.accelerator.reduce(parameter.grad, "mean")
        return {"feature": torch.stack(list(sites.values())).mean(), **_prefixed(sites)}

    def _distill(self, phase: Phase, rows: list[range]) -> dict[str, Tensor]:
        """Gradients of one step of a stage; its losses."""
        assert isinstance(phase.options, Stage)
        average = Average()
        for request, later in self._requests(phase, rows):
            with later:
                measured = distillation_losses(self.context, self.model, self.context.sample(request), phase.options.losses)
                self.context.accelerator.backward(measured.total / len(rows))
            average.add({"loss": measured.total.detach(), **measured.parts, **_prefixed(measured.sites)})
        return {name: value / len(rows) for name, value in average.sums.items()}

    def _clip(self, warm: bool) -> Tensor:
        """Clip gradients and return their norm; in the warm start every site on its own, for its loss is its own."""
        largest, accelerator = self.context.recipe.clip, self.context.accelerator
        if not warm:
            return torch.as_tensor(accelerator.clip_grad_norm_(list(self.trained.values()), largest))
        norms = [nn.utils.clip_grad_norm_(site.parameters(), largest) for site in converted_sites(self.context.student).values()]
        return torch.stack(norms).max()

    def _log(self, phase: Phase, step: int, rate: float, losses: Average, seconds: float) -> None:
        steps, accelerator = losses.steps, self.context.accelerator
        means = losses.take(lambda values: accelerator.reduce(values, "mean"))
        speed = {"seconds_per_step": seconds / steps, "samples_per_second": steps * phase.options.batch / seconds}
        place = {"phase": phase.name, "step": step, "steps": phase.options.steps, "samples": self.samples, "lr": rate}
        if accelerator.is_main_process:
            self.report({**place, **means, **speed})


def _prefixed(sites: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"feature/{path}": loss for path, loss in sites.items()}


@contextmanager
def only_trainable(student: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, nothing but the given parameters requires gradients."""
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    try:
        yield
    finally:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
