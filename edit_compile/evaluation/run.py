"""`edit-compile evaluate`: samples teacher and student for many prompts, and judges the images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edit_compile.adapters.model_names import without_address
from edit_compile.errors import CheckpointError, ConfigError
from edit_compile.evaluation import clip
from edit_compile.evaluation.images import SampledImages, read_prompts, real_images
from edit_compile.evaluation.metrics import Metric, chosen_metrics
from edit_compile.files import alone_in, sha256, write_text
from edit_compile.progress import each
from edit_compile.report.compare_samples import open_sampler, sample_options
from edit_compile.student.checkpoint import INDEX, base_of
from edit_compile.student.hub import checkpoint_folder
from edit_compile.version import __version__

FILE = "evaluation.json"


@dataclass(frozen=True)
class MetricResult:
    """What a metric found.

    Attributes:
        teacher, student: its values; None where it does not judge the teacher.
        against: what their images were compared with.
        network, resize: which network's features, and how images come to its size.
        libraries: versions by name.
        better: "higher" or "lower".
    """

    name: str
    teacher: float | None
    student: float
    against: str
    network: str
    resize: str
    libraries: dict[str, str]
    better: str


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        model: the folder that was evaluated.
        base: where its base model is, as the checkpoint says.
        images: the folder of the images that were made.
        real: how many real images there were, and how they were brought to size.
        height, width: of the images, in pixels.
        seeds: the first and the last; an image of teacher and student has the same.
        sampling: steps, guidance and dtype, None for the pipeline's default.
    """

    model: str
    base: str | None
    images: str
    real: dict[str, Any] | None
    samples: int
    prompts: dict[str, Any]
    height: int
    width: int
    seeds: tuple[int, int]
    sampling: dict[str, Any]
    metrics: tuple[MetricResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {"edit_compile": __version__, **asdict(self)}


def evaluate(
    folder: str | Path,
    prompts: str | Path | Sequence[str],
    *,
    output: str | Path | None = None,
    images: str | Path | None = None,
    metrics: Sequence[str] = (),
    samples: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    clip_name: str | None = None,
    base: str | Path | None = None,
    **options: Any,
) -> Evaluation:
    """Sample from teacher and student with the same noise, and judge the images by torchmetrics.

    The images are written beside the output as they are made; called again after an interruption, it goes on with those that
    are missing.

    Args:
        folder: a converted model's, its pipeline's, or a finished run's; or the hub id of one.
        prompts: a text file with a prompt a line, or the prompts.
        output: the JSON file to write; default: `evaluation.json` in the folder, if it is one. Images go to a folder of its name,
            without its ending.
        images: a folder of real images, for the Frechet distances; without it they compare the student's with the teacher's.
        metrics: names of `METRICS`; default: all.
        samples: how many images each of both makes; more than there are prompts repeat them with other noise. Default: one a prompt.
        batch_size: images sampled and judged at once.
        device: of sampling by a pipeline and of the networks that judge; default: CUDA, if there is any. The demo models sample on the CPU.
        clip_name: a CLIP model, by hub id or folder; default: `clip.DEFAULT`.
        base: the base pipeline; default: as the checkpoint says.
        options: height, width, steps, guidance, seed and dtype, as of `sample`.

    Raises:
        ConfigError: an option is wrong, or weights are not at hand; nothing was sampled.
        EditCompileError: a library is missing.
        CheckpointError: the folder does not hold a converted model, or its base cannot be loaded.
    """
    folder = Path(without_address(str(folder))).expanduser()
    given = read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else list(prompts)
    if not given:
        raise ConfigError("no prompt was given")
    place, where = checkpoint_folder(folder), _device(device)
    if not (place / INDEX).is_file():
        raise CheckpointError(f"{folder} holds no converted model: {INDEX} is missing")
    file = _result_file(folder, output)
    chosen, real = chosen_metrics(metrics, clip_name or clip.DEFAULT), real_images(Path(images)) if images is not None else ()
    count = samples if samples is not None else len(given)
    _check_count(chosen, count)
    sampling = sample_options(**options, device=device)
    for metric in each(chosen, "loading the networks that judge", len(chosen)):
        metric.prepare()
    made_for = tuple(given[number % len(given)] for number in range(count))
    kept = SampledImages(file.with_suffix(""), made_for, sampling.seed, batch_size, where, real)
    how = {name: value for name, value in asdict(sampling).items() if name != "device"}
    origin = str(base) if base is not None else base_of(folder)
    with alone_in(kept.path, "evaluates into", ConfigError):
        kept.open({"checkpoint": sha256(place / INDEX), "base": origin, "prompts": given, **how})
        kept.make(lambda: open_sampler(folder, base, sampling))
        height, width = kept.size()
        found = Evaluation(
            model=str(folder),
            base=origin,
            images=str(kept.path),
            real=_real(Path(images), len(real), (height, width)) if images is not None else None,
            samples=count,
            prompts={"file": str(prompts) if isinstance(prompts, str | Path) else None, "count": len(given)},
            height=height,
            width=width,
            seeds=(sampling.seed, sampling.seed + count - 1),
            sampling={name: how[name] for name in ("steps", "guidance", "dtype")},
            metrics=tuple(_measured(metric, kept) for metric in each(chosen, "judging images", len(chosen))),
        )
        write_text(file, json.dumps(found.to_dict(), indent=2))
    return found


def _result_file(folder: Path, output: str | Path | None) -> Path:
    """Return the file of an evaluation's result.

    Raises:
        ConfigError: nothing can be written beside the model, which is on the hub, or the file has another ending.
    """
    if output is None and not folder.is_dir():
        raise ConfigError(f"{folder} is on the hub: say where the result is written, with -o FILE.json (output=)")
    file = Path(output) if output is not None else folder / FILE
    if file.suffix.lower() != ".json":
        raise ConfigError(f"-o {file}: the result is a .json file, and images go to a folder of its name")
    return file


def _device(name: str | None) -> torch.device:
    """Find a device; by default CUDA, if there is any.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).partition(chr(10))[0]}") from None
    return device


def _check_count(metrics: Sequence[Metric], count: int) -> None:
    for metric in metrics:
        if count < metric.least:
            raise ConfigError(f"{metric.name} needs {metric.least} samples or more, not {count}: use more prompts, or --samples")


def _real(folder: Path, count: int, size: tuple[int, int]) -> dict[str, Any]:
    return {"folder": str(folder), "count": count, "resize": f"scaled by Lanczos' filter to cover {size[0]} x {size[1]} px, middle kept"}


def _measured(metric: Metric, images: SampledImages) -> MetricResult:
    values = metric.measure(images)
    return MetricResult(
        metric.name,
        values.get("teacher"),
        values["student"],
        metric.compared_with(images.has_real),
        metric.network,
        metric.resize,
        metric.versions(),
        metric.better,
    )
