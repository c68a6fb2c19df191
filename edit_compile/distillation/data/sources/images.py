"""Data of kind `images`: a folder of images, captions in a `metadata.jsonl` or in a `.txt` file beside each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from edit_compile.distillation.data.captioned_images import CaptionedImages
from edit_compile.distillation.data.records import IMAGE_SUFFIXES, BadSample, Record, caption_in, decoded_text
from edit_compile.distillation.data.registry import register_data
from edit_compile.errors import DistillError

METADATA = "metadata.jsonl"


@register_data("images")
class ImagesData(CaptionedImages):
    """A folder of images."""

    kind: Literal["images"]
    path: Path
    """The folder; images in folders below it count too."""
    caption: str | None = None
    """The key of captions in `metadata.jsonl`. Default: caption, text or prompt."""

    def records(self, skipped: dict[str, str]) -> ImageFolder:
        """Open the folder; lines of metadata that cannot be read are added to `skipped`."""
        return ImageFolder(self.path, self.caption, skipped)


class ImageFolder:
    """The captioned images of a folder and all below it, in the order of their paths.

    A folder's `metadata.jsonl` holds a line for each image: `{"file_name": "a.jpg", "caption": "..."}`, as the
    `imagefolder` of `datasets` reads it. An image that no line names has its caption in a file beside it, `a.txt`.
    """

    def __init__(self, path: Path, caption: str | None, skipped: dict[str, str]) -> None:
        """
        Args:
            caption: the key of the captions in `metadata.jsonl`; None for caption, text or prompt.
            skipped: lines that cannot be read are added here.

        Raises:
            DistillError: it is not a folder, or has no images.
        """
        if not path.is_dir():
            raise DistillError(f"data.path: {path} {'is not a directory' if path.exists() else 'does not exist'}")
        self.path, self.caption = path, caption
        self.fields = dict(self._metadata(skipped))
        found = {file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()}
        self.files = sorted(found | self.fields.keys())
        if not self.files:
            raise DistillError(f"data.path: {path} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def record(self, index: int) -> Record:
        """Return an image's record.

        Raises:
            BadSample: it has no caption.
        """
        file = self.files[index]
        if file in self.fields:
            return Record(str(file), file, caption_in(self.fields[file], self.caption))
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            raise BadSample(f"no line of {METADATA} names it, and there is no {beside.name}")
        return Record(str(file), file, caption_in({"caption": decoded_text(beside.read_bytes())}))

    def _metadata(self, skipped: dict[str, str]) -> Iterator[tuple[Path, dict[str, Any]]]:
        for file in sorted(self.path.rglob(METADATA)):
            for number, line in enumerate(file.read_bytes().splitlines(), 1):
                try:
                    fields = json.loads(line)
                    yield file.parent / fields["file_name"], fields
                except (ValueError, KeyError, TypeError) as error:
                    skipped[f"{file}:{number}"] = f"it is not a JSON object with a file_name: {error}"
