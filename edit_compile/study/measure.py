"""Measures models: what is there already, of the same model with the same settings, is not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import nn

from edit_compile.adapters.load_model import load_model
from edit_compile.bench import compare_speed, cost, size_in_words, video_size
from edit_compile.bench.conversion_cost import added_parameters
from edit_compile.demo import features
from edit_compile.demo import models as demo
from edit_compile.distillation.models import Student, make_student
from edit_compile.distillation.recipe.schedule import phases_of
from edit_compile.distillation.recipe.schema import Recipe
from edit_compile.errors import ConfigError, GridError, NoExampleInputsError, StudyError
from edit_compile.files import claimed, sha256
from edit_compile.progress import working
from edit_compile.student.lora import lora_names
from edit_compile.study.drawn import Drawn, draw_by_recipe, draw_demo, has_features, real_features
from edit_compile.study.measured import Measurement, Measurements, Wanted, identity_of_run, read_measured, write_measured
from edit_compile.study.schema import Latency, Measures

_OF_DEMOS_ONLY = "is measured of the demo models only, whose images a program can read"
_NO_FEATURES = "there are no features for videos"


@dataclass
class Subject:
    """A converted model to be measured.

    Attributes:
        folder: where `measured.json` is, and `result.json` if it was trained.
        model: its identity.
        load: loads it; called once, and only if something is missing.
        alike: folders of runs whose students differ from it by their weights only.
        draws: whether images are wanted of a model that is no demo model.
    """

    folder: Path
    model: str
    load: Callable[[], Student]
    alike: Sequence[Path] = ()
    draws: bool = True

    @cached_property
    def student(self) -> Student:
        """The converted model, and where its base is."""
        with working(f"loading {self.folder}"):
            return self.load()

    @property
    def module(self) -> nn.Module:
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

    @property
    def is_demo(self) -> bool:
        """Whether the models are the package's demo models."""
        return self.base in demo.SOURCES

    @cached_property
    def teacher_identity(self) -> str:
        """The identity of the original model: by its files, where they are at hand."""
        if self.is_demo:
            folder = demo.folder(self.base.removeprefix("demo/"))
            return _hash([self.base, [(path.name, sha256(path)) for path in _files(folder)]])
        stats = [(str(path), path.stat()) for path in _files(Path(self.base))]  # which does not read all weights
        return _hash([self.base, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]])

    def untrained_identity(self, recipe: Recipe) -> str:
        """Return the identity of what a recipe begins to train."""
        begun = recipe.model_dump(mode="json", include={"model", "convert", "train", "lora", "seed", "precision"})
        return _hash([self.teacher_identity, begun])

    def wanted(self, *, draws: bool = True) -> Wanted:
        """Name what is measured of every student, with the settings.

        Args:
            draws: whether images are wanted of a model that is no demo model.
        """
        wanted: dict[str, dict[str, Any]] = {"error": {}, "training": {}, **{kind: said for kind, said, _ in self._of_conversion()}}
        if not self.is_demo:
            wanted |= {"adherence": {}, "frechet": {}}
        return wanted | (self._of_drawn() if self.is_demo or draws else {})

    def measure_teacher(self) -> None:
        """Measure the original model."""
        with claimed(self.lock, wait=True):
            measured = read_measured(self.teacher, self.teacher_identity).with_measure("error", Measurement(values={"after": 0.0}))
            if self._lacks_drawn(self.teacher, measured):
                if self.is_demo:
                    measured = self._with_drawn_demo(self.teacher, measured, load_model(self.base).model, is_teacher=True)
                else:
                    measured = self._with_drawn(self.teacher, measured, lambda: make_student(self.recipe), is_teacher=True)
            write_measured(self.teacher, measured)

    def of_teacher(self) -> Measurements:
        """Read what was measured of the original model."""
        return read_measured(self.teacher, self.teacher_identity).only(self.wanted())

    def measure(self, subject: Subject) -> Measurements:
        """Measure a converted model, all but what is there; writes what was found after each kind.

        Raises:
            EditCompileError, OSError, RuntimeError: a measurement fails that should not.
        """
        before = measured = read_measured(subject.folder, subject.model)
        for kind, found in _of_run(subject.folder).items():
            measured = measured.with_measure(kind, found)
        if not self.is_demo:
            for kind in ("adherence", "frechet"):
                measured = measured.with_measure(kind, Measurement(reason=_OF_DEMOS_ONLY))
        for kind, settings, measure in self._of_conversion():
            if not measured.has(kind, settings):
                with working(f"measuring {kind}"):
                    measured = measured.with_measure(kind, self._of_alike(subject, kind, settings) or measure(subject, settings))
                write_measured(subject.folder, measured)
        if (self.is_demo or subject.draws) and self._lacks_drawn(subject.folder, measured):
            if self.is_demo:
                measured = self._with_drawn_demo(subject.folder, measured, subject.module)
            else:
                measured = self._with_drawn(subject.folder, measured, lambda: subject.student)
        if measured != before:
            write_measured(subject.folder, measured)
        return measured

    def _of_conversion(self) -> list[tuple[str, dict[str, Any], Callable[[Subject, dict[str, Any]], Measurement]]]:
        """List what is measured of a conversion, whatever its weights: the kind, its settings, and how."""
        kinds: list[tuple[str, dict[str, Any], Callable[[Subject, dict[str, Any]], Measurement]]] = [("parameters", {}, _parameters)]
        if self.sizes:
            kinds.append(("flops", {"sizes": [size_in_words(size) for size in self.sizes]}, self._flops))
        if self.latency is not None:
            sizes = [size_in_words(size) for size in self.latency.sizes]
            kinds.append(("latency", {"sizes": sizes, "runs": self.latency.runs}, self._latency))
        return kinds

    def _of_alike(self, subject: Subject, kind: str, settings: dict[str, Any]) -> Measurement | None:
        measured = (read_measured(folder, identity_of_run(folder)) for folder in subject.alike)
        return next((one.measures[kind] for one in measured if one.has(kind, settings)), None)

    def _flops(self, subject: Subject, settings: dict[str, Any]) -> Measurement:
        try:
            report = cost(subject.module, self.sizes, pipeline=None if self.is_demo else subject.student.base)
        except NoExampleInputsError as error:
            return Measurement(settings=settings, reason=str(error))
        if not report.costs:
            return Measurement(settings=settings, reason="; ".join(report.errors.values()))
        values: dict[str, float] = {}
        for one in report.costs:
            values |= {one.size: float(one.after), f"{one.size}.teacher": float(one.before), f"{one.size}.ratio": one.after / one.before}
        return Measurement(settings=settings, values=values, reason="; ".join(report.errors.values()) or None)

    def _latency(self, subject: Subject, settings: dict[str, Any]) -> Measurement:
        assert self.latency is not None
        values: dict[str, float] = {}
        try:
            for row in compare_speed(subject.module, self.latency.sizes, runs=self.latency.runs):
                size = size_in_words((row.height, row.width) if row.frames is None else (row.frames, row.height, row.width))
                ratio = {"ratio": 1 / row.speedup.median, "ratio.low": 1 / row.speedup.high, "ratio.high": 1 / row.speedup.low}
                seconds = {"seconds": row.student.median, "seconds.teacher": row.teacher.median}
                values |= {f"{size}.{name}": value for name, value in {**ratio, **seconds}.items()}
        except (GridError, NoExampleInputsError) as error:
            return Measurement(settings=settings, reason=str(error))
        return Measurement(settings=settings, values=values)

    def _of_drawn(self) -> dict[str, dict[str, Any]]:
        """Name what is measured by letting a model draw, with the settings."""
        if not self.is_demo:
            return {"gallery": self._gallery_settings()} if self.measures.gallery else {}
        if not self.measures.samples:
            return {}
        settings = {"samples": self.measures.samples, "sampling_steps": self.measures.sampling_steps}
        return {"adherence": settings, "frechet": {**settings, "features": _features_hash()}}

    def _lacks_drawn(self, folder: Path, measured: Measurements) -> bool:
        wanted = self._of_drawn()
        if measured.lacks(wanted):
            return True
        images = any(measured.measures[kind].reason is None for kind in wanted)  # else there was nothing to draw
        return images and Drawn.read(folder, measured.model) is None

    def _gallery_settings(self) -> dict[str, Any]:
        recipe = self.recipe.model_dump(mode="json", include={"data", "timesteps", "seed"})
        size, samples = list(last_size(self.recipe)), self.recipe.samples
        guidance = {} if samples.guidance is None else {"guidance": samples.guidance}
        return {"captions": self.measures.gallery, "sampling_steps": samples.steps, **guidance, "size": size, **recipe}

    def _with_drawn_demo(self, folder: Path, measured: Measurements, model: nn.Module, *, is_teacher: bool = False) -> Measurements:
        """Let a demo model draw.

        Raises:
            StudyError: of a student, if what the teacher drew cannot be read.
        """
        teacher = None if is_teacher else Drawn.read(self.teacher, self.teacher_identity)
        if teacher is None and not is_teacher:
            raise StudyError(f"{self.teacher}: what the teacher drew cannot be read; remove the folder and compare again")
        with working(f"drawing {self.measures.samples} samples"):
            drawn, adherence = draw_demo(model, self.measures.samples, self.measures.sampling_steps)
        drawn.save(folder, measured.model)
        settings = self._of_drawn()
        shares = {name: value for name, value in adherence.to_dict().items() if isinstance(value, float)}
        measured = measured.with_measure("adherence", Measurement(settings=settings["adherence"], values=shares))
        return measured.with_measure("frechet", _frechet(drawn, teacher or drawn, demo.trained_on(model), settings["frechet"]))

    def _with_drawn(self, folder: Path, measured: Measurements, load: Callable[[], Student], *, is_teacher: bool = False) -> Measurements:
        """Let a model draw by the first run's recipe."""
        settings, reason = self._gallery_settings(), None
        try:
            with working(f"drawing {self.measures.gallery} samples"):
                draw_by_recipe(self.recipe, load(), self.measures.gallery, teacher=is_teacher).save(folder, measured.model)
        except (StudyError, ConfigError) as error:
            reason = str(error)
        return measured.with_measure("gallery", Measurement(settings=settings, reason=reason))


def last_size(recipe: Recipe) -> tuple[int, ...]:
    """Return the size of a recipe's last stage, in pixels."""
    last = phases_of(recipe)[-1]
    return tuple(video_size(last.height, last.width, last.frames))


def _files(folder: Path) -> list[Path]:
    """List a model's configuration and weights; none of what is no folder."""
    found = (path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".bin")) if folder.is_dir() else ()
    return sorted(path for path in found if path.is_file())


@cache
def _features_hash() -> str:
    return sha256(features.WEIGHTS)[:12]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _frechet(drawn: Drawn, teacher: Drawn, data: demo.TrainingData, settings: dict[str, Any]) -> Measurement:
    """Compute the Frechet distances of what a model drew to true images, and to what the teacher drew, which it may be itself."""
    if drawn.features is None or teacher.features is None or not has_features(data):
        return Measurement(settings=settings, reason=_NO_FEATURES)
    if len(drawn.features) < 2:
        return Measurement(settings=settings, reason="measure.samples: one sample is too few")
    real = features.frechet_distance(real_features(data, len(drawn.features)), drawn.features)
    to_teacher = 0.0 if teacher is drawn else features.frechet_distance(teacher.features, drawn.features)
    return Measurement(settings=settings, values={"real": real, "teacher": to_teacher})


def _parameters(subject: Subject, settings: dict[str, Any]) -> Measurement:
    numbers, adapters = dict(subject.module.named_parameters()), lora_names(subject.module)
    added = added_parameters(subject.module) + sum(numbers[name].numel() for name in adapters)
    total = sum(p.numel() for p in numbers.values())
    return Measurement(settings=settings, values={"added": float(added), "total": float(total)})


def _of_run(folder: Path) -> dict[str, Measurement]:
    """Read what a finished run measured itself.

    Raises:
        StudyError: its `result.json` is damaged, or another version of this package wrote it.
    """
    path = folder / "result.json"
    if not path.exists():
        return {}
    try:
        result = json.loads(path.read_bytes())
        errors = result["held_out_error"]
        values = {"before": errors["before"]["total"], "after": errors["after"]["total"], "samples": float(errors["after"]["samples"])}
        values |= {f"{size}.{when}": error for when in ("before", "after") for size, error in errors[when]["resolutions"].items()}
        found = {"error": Measurement(values=values), "training": Measurement(values={"seconds": float(result["seconds"])})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise StudyError(f"{path} cannot be read ({said}): damaged, or of another version; distil again, or leave the run out") from error
    return found
