"""The images of an evaluation: made once, written one by one, and read again for every metric."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from edit_compile.api import teacher
from edit_compile.errors import ConfigError
from edit_compile.files import prompt_lines, write_text
from edit_compile.progress import working
from edit_compile.report.compare_samples import SampleMany
from edit_compile.report.image_grid import save_image

WHO = ("teacher", "student")
_SETTINGS, _ENDINGS = "settings.json", (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Size = tuple[int, int]


@dataclass(frozen=True)
class SampledImages:
    """The images that teacher and student made of the same prompts and noise, a PNG each, and beside them how they were made.

    Attributes:
        prompts: a prompt for each image.
        real: files of real images; empty without them.
    """

    path: Path
    prompts: tuple[str, ...]
    seed: int
    batch_size: int
    device: torch.device
    real: tuple[Path, ...] = ()

    @property
    def has_real(self) -> bool:
        """Whether there are real images."""
        return bool(self.real)

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder, or find it as it was left.

        Raises:
            ConfigError: it cannot be written, or its images were made in another way.
        """
        file = self.path / _SETTINGS
        try:
            before = json.loads(file.read_bytes()) if file.exists() else None
            if not isinstance(before, dict | None):
                raise ValueError(f"{_SETTINGS} is damaged")
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(before or settings, indent=2))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{self.path} cannot be used: {error}; choose another file with -o") from error
        changed = sorted(name for name in settings if before is not None and before.get(name) != settings[name])
        if before is not None and changed:
            one, short = changed[0], all(len(repr(value)) < 80 for value in (before.get(changed[0]), settings[changed[0]]))
            values = f" ({before.get(one)!r} then, {settings[one]!r} now)" if short else ""
            raise ConfigError(
                f"{self.path} has images that were made otherwise: {one}{values}; choose another file with -o, or remove the folder"
            )

    def make(self, load: Callable[[], tuple[Any, SampleMany]]) -> None:
        """Make what is missing. Each image is written as a whole; a run that was stopped goes on with the next.

        Args:
            load: gives the model, and a function that samples from it; called if anything is missing.

        Raises:
            ConfigError: the model makes videos, or an image cannot be written.
        """
        absent = {who: [n for n in range(len(self.prompts)) if not self.file(who, n).exists()] for who in WHO}
        total = 2 * len(self.prompts)
        done = total - sum(map(len, absent.values()))
        if done == total:
            return
        with working("loading the pipeline"):
            model, sample = load()
        with working("sampling images", total, done) as work:
            for who in WHO:
                for start in range(0, len(absent[who]), self.batch_size):
                    numbers = absent[who][start : start + self.batch_size]
                    self._make(who, numbers, model, sample)
                    work.advance(len(numbers))

    def _make(self, who: str, numbers: Sequence[int], model: Any, sample: SampleMany) -> None:
        prompts, seeds = [self.prompts[n] for n in numbers], [self.seed + n for n in numbers]
        if who == "teacher":
            with teacher(model):
                made = sample(prompts, seeds)
        else:
            made = sample(prompts, seeds)
        for number, pixels in zip(numbers, made, strict=True):
            if pixels.ndim != 3:
                raise ConfigError(f"the model makes videos, {pixels.shape[0]} frames each: only images are evaluated")
            try:
                save_image(Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)), self.file(who, number))
            except OSError as error:
                raise ConfigError(f"{self.file(who, number)} cannot be written: {error}") from error

    def file(self, who: str, number: int) -> Path:
        """Return where an image of "teacher" or "student" is."""
        return self.path / who / f"{number:06d}.png"

    def size(self) -> Size:
        """Return height and width of the images.

        Raises:
            ConfigError: the first cannot be read.
        """
        _, height, width = read(self.file(WHO[0], 0)).shape
        return height, width

    def batches(self, who: str) -> Iterator[Tensor]:
        """Yield the images of "teacher", "student" or "real", (B, 3, H, W) of uint8.

        Real ones are scaled and cropped to the size of the others.

        Raises:
            ConfigError: an image cannot be read.
        """
        files = self.real if who == "real" else [self.file(who, number) for number in range(len(self.prompts))]
        size = self.size() if who == "real" else None
        for start in range(0, len(files), self.batch_size):
            yield torch.stack([read(file, size) for file in files[start : start + self.batch_size]]).to(self.device)

    def batches_of_prompts(self) -> Iterator[list[str]]:
        """Yield the prompts of the same batches."""
        for start in range(0, len(self.prompts), self.batch_size):
            yield list(self.prompts[start : start + self.batch_size])


def read(file: Path, size: Size | None = None) -> Tensor:
    """Read an image as (3, H, W) of uint8; given a size, scaled by Lanczos' filter until it covers that, and cropped in the middle.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # damaged PNGs are SyntaxErrors
        raise ConfigError(f"{file} cannot be read as an image: {error}; remove it, and one that was sampled is made again") from error
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).movedim(2, 0)


def real_images(folder: Path) -> tuple[Path, ...]:
    """List the images of a folder and those inside it, by name.

    Raises:
        ConfigError: there is no such folder, or fewer than two images in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"--images {folder} is not a folder")
    found = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file()))
    if len(found) < 2:
        raise ConfigError(f"--images {folder} has {len(found)} images ({', '.join(_ENDINGS)}); Frechet distances need two or more")
    return found


def read_prompts(file: Path) -> list[str]:
    """Read a text file with a prompt a line; empty lines do not count.

    Raises:
        ConfigError: it cannot be read, or has none.
    """
    try:
        return prompt_lines(file)
    except ValueError as error:
        raise ConfigError(f"--prompts {file} {error}") from error
