"""The metrics, by torchmetrics: each says what it needs before anything is sampled, and compares finished images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import urlparse

import torch
from torch import Tensor

from edit_compile.errors import ConfigError
from edit_compile.evaluation import clip
from edit_compile.extras import import_extra

_INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
_ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
Values = dict[str, float]


class ImageSets(Protocol):
    """The images that are compared, in batches (B, 3, H, W) of uint8; the n-th of teacher and student are of one prompt and noise."""

    @property
    def has_real(self) -> bool:
        """Whether there are real images."""

    @property
    def device(self) -> torch.device:
        """Where the batches are."""

    def batches(self, who: str) -> Iterator[Tensor]:
        """Yield the images of "teacher", "student" or "real"."""

    def batches_of_prompts(self) -> Iterator[list[str]]:
        """Yield the prompts of the same batches of teacher and student."""


class Metric(ABC):
    """A way to judge images.

    Attributes:
        name: what users call it.
        libraries: whose versions its result depends on, as pip names them; they must be installed.
        least: how many images it needs.
        against: what images are compared with, in words; given real images, `against_real`.
        better: "higher" or "lower".
    """

    name: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ("torchmetrics",)
    least: ClassVar[int] = 1
    better: ClassVar[str] = "lower"
    against: ClassVar[str]

    def __init__(self, clip_name: str = clip.DEFAULT, load_clip: Callable[[], clip.Clip] | None = None) -> None:
        """
        Args:
            load_clip: loads the CLIP model, for several metrics once; default: each loads its own.
        """
        self.clip_name, self.load_clip = clip_name, load_clip or cache(lambda: clip.Clip(clip_name))

    @property
    @abstractmethod
    def network(self) -> str:
        """The network whose features are compared."""

    @property
    @abstractmethod
    def resize(self) -> str:
        """How images come to the network's size."""

    @abstractmethod
    def missing(self) -> str | None:
        """Say which weights to fetch and where to put them; None if they are at hand."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to load
        """Load what may turn out not to be loadable, before anything is sampled.

        Raises:
            ConfigError: it cannot be loaded.
        """

    @abstractmethod
    def measure(self, images: ImageSets) -> Values:
        """Compare images; returns a value for "student", and for "teacher" where it can be judged as well."""

    def compared_with(self, has_real: bool) -> str:
        """Say what images are compared with."""
        return self.against

    def check_libraries(self) -> None:
        """Raise EditCompileError if a library is missing."""
        for library in self.libraries:
            import_extra("eval", self.name, library.replace("-", "_"))

    def versions(self) -> dict[str, str]:
        """Return the versions of its libraries."""
        return {library: version(library) for library in self.libraries}


class _ByClip(Metric):
    """A metric by the embeddings of CLIP."""

    libraries = ("torchmetrics", "transformers")

    def prepare(self) -> None:
        self.load_clip()

    @property
    def resize(self) -> str:
        return self.load_clip().sides

    def missing(self) -> str | None:
        return clip.missing(self.clip_name)


class ClipScore(_ByClip):
    """100 times the mean cosine of the embeddings of image and prompt, at least 0 (arXiv 2104.08718, there 2.5 times the cosine)."""

    name = "clip-score"
    better = "higher"
    against = "the prompt"

    @property
    def network(self) -> str:
        return self.clip_name

    def measure(self, images: ImageSets) -> Values:
        from torchmetrics.multimodal.clip_score import CLIPScore

        network = self.load_clip().to(images.device)
        found = {}
        for who in ("teacher", "student"):
            metric = CLIPScore(lambda: (network, network.processor)).to(images.device)
            for batch, prompts in zip(images.batches(who), images.batches_of_prompts(), strict=True):
                metric.update(batch, prompts)
            found[who] = float(metric.compute())
        return found


class _Frechet(Metric):
    """The Frechet distance of features (arXiv 1706.08500): to real images or, without them, from the student's to the teacher's."""

    least = 2

    def compared_with(self, has_real: bool) -> str:
        return "real images" if has_real else "the teacher's images"

    @abstractmethod
    def _feature(self, device: torch.device) -> Any:
        """Make the network, or name torchmetrics' own."""

    def measure(self, images: ImageSets) -> Values:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(self._feature(images.device), reset_real_features=False).to(images.device)
        for batch in images.batches("real" if images.has_real else "teacher"):
            metric.update(batch, real=True)
        found = {}
        for who in ("teacher", "student") if images.has_real else ("student",):
            for batch in images.batches(who):
                metric.update(batch, real=False)
            found[who] = float(metric.compute())
            metric.reset()
        return found


class FidInception(_Frechet):
    """The Frechet distance of Inception's features."""

    name = "fid-inception"
    libraries = ("torchmetrics", "torch-fidelity")
    network = "InceptionV3 of torch-fidelity, 2048 features"
    resize = "bilinear with antialiasing to 299 px by torchmetrics"

    def missing(self) -> str | None:
        return _missing_from_cache(_INCEPTION)

    def _feature(self, device: torch.device) -> int:
        return 2048


class FidClip(_ByClip, _Frechet):
    """The Frechet distance of CLIP's projected embeddings of images, not normalised."""

    name = "fid-clip"

    @property
    def network(self) -> str:
        return f"{self.clip_name}, projected embeddings of images"

    def _feature(self, device: torch.device) -> clip.Clip:
        return self.load_clip().to(device)


class Lpips(Metric):
    """The perceptual distance (LPIPS, arXiv 1801.03924) of teacher's and student's image of the same prompt and noise, a mean."""

    name = "lpips"
    libraries = ("torchmetrics", "torchvision")
    network = "LPIPS, AlexNet"
    resize = "none, but images with sides below 64 px are enlarged, pixel by pixel"
    against = "the teacher's image of the same noise"

    def missing(self) -> str | None:
        return _missing_from_cache(_ALEXNET)

    def measure(self, images: ImageSets) -> Values:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(images.device)
        for teacher, student in zip(images.batches("teacher"), images.batches("student"), strict=True):
            metric.update(_unit(teacher), _unit(student))
        return {"student": float(metric.compute())}


def _unit(images: Tensor) -> Tensor:
    """Bring images (B, 3, H, W) of uint8 to [0, 1], and to sides that AlexNet takes."""
    times = -(-64 // min(images.shape[-2:]))
    return images.repeat_interleave(times, 2).repeat_interleave(times, 3).float() / 255


def _missing_from_cache(url: str) -> str | None:
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    return None if place.is_file() else f"{url} to {place}"


METRICS: dict[str, type[Metric]] = {kind.name: kind for kind in (ClipScore, FidInception, FidClip, Lpips)}


def chosen_metrics(names: Sequence[str], clip_name: str) -> list[Metric]:
    """Make metrics by name, all if there are no names, and look whether they can be computed.

    Raises:
        ConfigError: a name is unknown, or weights are not at hand; names what to fetch.
        EditCompileError: a library is missing; names it.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"--metrics {name}: unknown metric; there are: {', '.join(METRICS)}")
    load_clip = cache(lambda: clip.Clip(clip_name))
    found = [METRICS[name](clip_name, load_clip) for name in dict.fromkeys(names or METRICS)]
    for metric in found:
        metric.check_libraries()
    absent: dict[str, list[str]] = {}
    for metric in found:
        what = metric.missing()
        if what is not None:
            absent.setdefault(what, []).append(metric.name)
    if absent:
        wanted = "; ".join(f"for {' and '.join(names)} fetch {what}" for what, names in absent.items())
        raise ConfigError(f"weights are not at hand: {wanted}; or leave them out with --metrics")
    return found
