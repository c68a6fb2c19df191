"""Data of kind `images`: a folder of pictures with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edit_compile.distillation.data.captioned import CaptionedData
from edit_compile.distillation.data.sources.folder import Folder


class ImagesData(CaptionedData):
    """A folder of pictures.

    Attributes:
        path: the folder; pictures in folders below it count too.
        caption: the key of captions in `metadata.jsonl`. Default: caption, text or prompt.
    """

    kind: Literal["images"]
    path: Path
    caption: str | None = None

    def corpus(self, skipped: dict[str, str]) -> Folder:
        """The pictures, by index; metadata that cannot be read is added to `skipped`."""
        return Folder(self.path, self.caption, skipped)
