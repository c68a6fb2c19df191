"""Measures models: what is there already, with the same settings, is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from edit_compile.adapters.load_model import load_model
from edit_compile.bench import compare_speed, cost, size_in_words
from edit_compile.bench.conversion_cost import added_parameters
from edit_compile.demo import features
from edit_compile.demo import models as demo
from edit_compile.distillation.models import Student, make_student
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.errors import ConfigError, GridError, NoExampleInputsError, StudyError
from edit_compile.files import sha256
from edit_compile.student.lora import lora_names
from edit_compile.study.cells import claimed
from edit_compile.study.drawn import Drawn, draw_by_recipe, draw_demo, has_features, real_features
from edit_compile.study.measured import Measure, Measured, read_measured, write_measured
from edit_compile.study.schema import Latency, Measures

_OF_DEMOS_ONLY = "is measured of the demo models only, whose images a program can read"
_NO_FEATURES = "there are no features for videos"
_BY_CONFIGURATION = ("parameters", "flops", "latency")  # do not depend on the seed


@dataclass
class Subject:
    """A converted model to be measured.

    Attributes:
        folder: where `measured.json` is, and `result.json` if it was trained.
        load: loads it; called once, and only if something is missing.
        alike: folders of models that differ by their weights only.
        draws: whether images are wanted of a model that is no demo model.
    """

    folder: Path
    load: Callable[[], Student]
    alike: Sequence[Path] = ()
    draws: bool = True

    @cached_property
    def student(self) -> Student:
        """The converted model, and where its base is."""
        return self.load()

    @property
    def model(self) -> nn.Module:
        """The converted model."""
        return self.student.model.eval()


@dataclass
class Measurer:
    """Measures the models of one study: all have the same base.

    Attributes:
        base: where the original model is, as users name it.
        recipe: of the first run: what models that are no demo models draw, and how.
        sizes: at which FLOPs are counted, in pixels.
        teacher: the folder of what was measured of the original model.
        lock: the file that one process at a time holds while it measures the teacher.
    """

    base: str
    recipe: Recipe
    measures: Measures
    latency: Latency | None
    sizes: Sequence[tuple[int, ...]]
    teacher: Path
    lock: Path
    _settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._settings = {"samples": self.measures.samples, "sampling_steps": self.measures.sampling_steps}

    @property
    def is_demo(self) -> bool:
        """Whether the models are the package's demo models."""
        return self.base in demo.SOURCES

    def measure_teacher(self) -> None:
        """Measure the original model."""
        with claimed(self.lock, wait=True):
            measured = read_measured(self.teacher).with_measure("error", Measure(values={"after": 0.0}))
            if self._lacks_drawn(self.teacher, measured):
                if self.is_demo:
                    measured = self._with_drawn_demo(self.teacher, measured, load_model(self.base).model, None)
                else:
                    measured = self._with_drawn(self.teacher, measured, lambda: make_student(self.recipe), teacher=True)
            write_measured(self.teacher, measured)

    def measure(self, subject: Subject) -> Measured:
        """Measure a converted model, all but what is there; writes what was found after each kind.

        Raises:
            EditCompileError, OSError, RuntimeError: a measurement fails that should not.
        """
        before = measured = read_measured(subject.folder)
        for kind, found in _of_run(subject.folder).items():
            measured = measured.with_measure(kind, found)
        if not self.is_demo:
            for kind in ("adherence", "frechet"):
                measured = measured.with_measure(kind, Measure(reason=_OF_DEMOS_ONLY))
        for kind, (settings, measure) in self._of_conversion().items():
            if not measured.has(kind, settings):
                measured = measured.with_measure(kind, self._of_alike(subject, kind, settings) or measure(subject, settings))
                write_measured(subject.folder, measured)
        if self._lacks_drawn(subject.folder, measured) and (self.is_demo or subject.draws):
            if self.is_demo:
                teacher = Drawn.read(self.teacher)
                if teacher is None:
                    raise StudyError(f"{self.teacher}: what the teacher drew cannot be read; remove the folder and compare again")
                measured = self._with_drawn_demo(subject.folder, measured, subject.model, teacher)
            else:
                measured = self._with_drawn(subject.folder, measured, lambda: subject.student, teacher=False)
        if measured != before:
            write_measured(subject.folder, measured)
        return measured

    def _of_conversion(self) -> dict[str, tuple[dict[str, Any], Callable[[Subject, dict[str, Any]], Measure]]]:
        """Name what is measured of a conversion, whatever its weights: settings, and how."""
        kinds: dict[str, tuple[dict[str, Any], Callable[[Subject, dict[str, Any]], Measure]]] = {"parameters": ({}, _parameters)}
        if self.sizes:
            kinds["flops"] = ({"sizes": [size_in_words(size) for size in self.sizes]}, self._flops)
        if self.latency is not None:
            sizes = [size_in_words(size) for size in self.latency.sizes]
            kinds["latency"] = ({"sizes": sizes, "runs": self.latency.runs}, self._latency)
        return kinds

    def _of_alike(self, subject: Subject, kind: str, settings: dict[str, Any]) -> Measure | None:
        measured = (read_measured(folder) for folder in subject.alike)
        return next((one.measures[kind] for one in measured if one.has(kind, settings)), None)

    def _flops(self, subject: Subject, settings: dict[str, Any]) -> Measure:
        try:
            report = cost(subject.model, self.sizes, pipeline=None if self.is_demo else subject.student.base)
        except NoExampleInputsError as error:
            return Measure(settings=settings, reason=str(error))
        if not report.costs:
            return Measure(settings=settings, reason="; ".join(report.errors.values()))
        values: dict[str, float] = {}
        for one in report.costs:
            values |= {one.size: float(one.after), f"{one.size}.teacher": float(one.before), f"{one.size}.ratio": one.after / one.before}
        return Measure(settings=settings, values=values, reason="; ".join(report.errors.values()) or None)

    def _latency(self, subject: Subject, settings: dict[str, Any]) -> Measure:
        assert self.latency is not None
        values: dict[str, float] = {}
        try:
            for row in compare_speed(subject.model, self.latency.sizes, runs=self.latency.runs):
                size = size_in_words((row.height, row.width) if row.frames is None else (row.frames, row.height, row.width))
                ratio = {"ratio": 1 / row.speedup.median, "ratio.low": 1 / row.speedup.high, "ratio.high": 1 / row.speedup.low}
                seconds = {"seconds": row.student.median, "seconds.teacher": row.teacher.median}
                values |= {f"{size}.{name}": value for name, value in {**ratio, **seconds}.items()}
        except (GridError, NoExampleInputsError) as error:
            return Measure(settings=settings, reason=str(error))
        return Measure(settings=settings, values=values)

    def _lacks_drawn(self, folder: Path, measured: Measured) -> bool:
        if self.is_demo:
            settings = [("adherence", self._settings), ("frechet", self._frechet_settings())]
            return self.measures.samples > 0 and not (all(measured.has(*one) for one in settings) and Drawn.read(folder) is not None)
        return self.measures.gallery > 0 and not measured.has("gallery", self._gallery_settings())

    def _frechet_settings(self) -> dict[str, Any]:
        return {**self._settings, "features": sha256(features.WEIGHTS)[:12]}

    def _gallery_settings(self) -> dict[str, Any]:
        return {"captions": self.measures.gallery, "sampling_steps": self.recipe.samples.steps, "seed": self.recipe.seed}

    def _with_drawn_demo(self, folder: Path, measured: Measured, model: nn.Module, teacher: Drawn | None) -> Measured:
        """Let a demo model draw. Without what the teacher drew, it is the teacher."""
        drawn, adherence = draw_demo(model, self.measures.samples, self.measures.sampling_steps)
        drawn.save(folder)
        shares = {name: value for name, value in adherence.to_dict().items() if isinstance(value, float)}
        measured = measured.with_measure("adherence", Measure(settings=self._settings, values=shares))
        return measured.with_measure("frechet", self._frechet(drawn, teacher, demo.trained_on(model)))

    def _frechet(self, drawn: Drawn, teacher: Drawn | None, data: demo.TrainingData) -> Measure:
        settings = self._frechet_settings()
        if drawn.features is None or not has_features(data):
            return Measure(settings=settings, reason=_NO_FEATURES)
        if len(drawn.features) < 2:
            return Measure(settings=settings, reason="measure.samples: one sample is too few")
        real = features.frechet_distance(real_features(data, len(drawn.features)), drawn.features)
        of_teacher = drawn.features if teacher is None else teacher.features
        assert of_teacher is not None
        to_teacher = 0.0 if teacher is None else features.frechet_distance(of_teacher, drawn.features)
        return Measure(settings=settings, values={"real": real, "teacher": to_teacher})

    def _with_drawn(self, folder: Path, measured: Measured, load: Callable[[], Student], *, teacher: bool) -> Measured:
        """Let a model draw by the first run's recipe."""
        settings, reason = self._gallery_settings(), None
        try:
            draw_by_recipe(self.recipe, load(), self.measures.gallery, teacher=teacher).save(folder)
        except (StudyError, ConfigError) as error:
            reason = str(error)
        return measured.with_measure("gallery", Measure(settings=settings, reason=reason))


def _parameters(subject: Subject, settings: dict[str, Any]) -> Measure:
    numbers, adapters = dict(subject.model.named_parameters()), lora_names(subject.model)
    added = added_parameters(subject.model) + sum(numbers[name].numel() for name in adapters)
    total = sum(p.numel() for p in numbers.values())
    return Measure(settings=settings, values={"added": float(added), "total": float(total)})


def _of_run(folder: Path) -> dict[str, Measure]:
    """Read what a finished run measured itself."""
    path = folder / "result.json"
    if not path.exists():
        return {}
    result = json.loads(path.read_text())
    errors = result["held_out_error"]
    values = {"before": errors["before"]["total"], "after": errors["after"]["total"], "samples": float(errors["after"]["samples"])}
    values |= {f"{size}.{when}": error for when in ("before", "after") for size, error in errors[when]["resolutions"].items()}
    return {"error": Measure(values=values), "training": Measure(values={"seconds": float(result["seconds"])})}
