"""Data of kind `images`: a folder of images, captions in a `metadata.jsonl`, `.csv` or `.parquet`, or in a `.txt` beside each."""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from torch import nn

from edit_compile.distillation.data.cache.encode import records_from
from edit_compile.distillation.data.captioned_images import CaptionedImages
from edit_compile.distillation.data.decode_image import IMAGE_SUFFIXES, looks_like_image
from edit_compile.distillation.data.records import (
    MAX_CAPTION,
    BadSample,
    Record,
    captions_in,
    check_usable,
    decoded_object,
    decoded_text,
    fingerprint_of,
    printable,
    summarize,
)
from edit_compile.distillation.data.registry import register_data
from edit_compile.errors import DistillError, EditCompileError, first_line
from edit_compile.extras import need
from edit_compile.words import counted

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_MAX_LINE = 2**24  # bytes of metadata.jsonl


@register_data("images")
class ImagesData(CaptionedImages):
    """A folder of images."""

    kind: Literal["images"]
    path: Path
    """The folder; images in folders below it count too."""
    caption: str | None = None
    """The key or column of captions in the metadata. Default: caption, text or prompt."""

    def check_files(self, model: nn.Module) -> None:
        """Find images with captions."""
        skipped: dict[str, str] = {}
        check_usable(records_from(self.records(skipped), 0), self.path, skipped)

    def records(self, skipped: dict[str, str]) -> ImageFolder:
        """Open the folder; lines of metadata that cannot be read are added to `skipped`."""
        return ImageFolder(self.path, self.caption, skipped)


class ImageFolder:
    """The captioned images of a folder and all below it, in the order of their paths.

    A folder's `metadata.jsonl` holds a line for each image: `{"file_name": "a.jpg", "caption": "..."}`, as the
    `imagefolder` of `datasets` reads it, and a `metadata.csv` or `metadata.parquet` a row with these columns; several lines of
    one image, or a list, are several captions. An image that no line names has its caption in a file beside it, `a.txt`.
    Hidden files and folders, and links to folders, are left out.
    """

    def __init__(self, path: Path, caption: str | None, skipped: dict[str, str]) -> None:
        """
        Args:
            caption: the key of the captions in the metadata; None for caption, text or prompt.
            skipped: what cannot be read is added here: lines, files of other kinds, what is hidden.

        Raises:
            DistillError: it is not a folder, or has no images.
        """
        _check_folder(path)
        self.path, self.caption = path, caption
        files = list(_files_below(path, skipped))
        self.fields: dict[Path, list[dict[str, Any]]] = {}
        for file in files:
            if file.name in METADATA:
                self._read_metadata(file, skipped)
        found = {file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
        self.files = sorted(found | self.fields.keys())
        if not self.files:
            raise DistillError(f"data.path: {path} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}); {summarize(skipped)}")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return printable(self.files[index])

    def record(self, index: int) -> Record:
        """Return an image's record.

        Raises:
            BadSample: it has no caption.
        """
        file = self.files[index]
        if file in self.fields:
            texts = [text for fields in self.fields[file] for text in captions_in(fields, self.caption)]
            return Record(self.name(index), file, tuple(texts))
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            raise BadSample(f"no metadata names it, and there is no {printable(beside.name)}")
        return Record(self.name(index), file, captions_in({"caption": decoded_text(_beginning(beside))}))

    def fingerprint(self) -> str:
        named = {file.parent / name for file in self.files for name in METADATA}
        metadata = sorted(file for file in named if file.name == METADATA[0] or _size(file) is not None)
        files = [*self.files, *(file.with_suffix(".txt") for file in self.files), *metadata]
        return fingerprint_of((os.path.relpath(file, self.path), _size(file)) for file in files)

    def _read_metadata(self, file: Path, skipped: dict[str, str]) -> None:
        try:
            for number, row in _READERS[file.suffix](file):
                self._add_row(file, number, row, skipped)
        except EditCompileError:
            raise
        except Exception as error:  # each format raises errors of its own
            skipped[printable(file)] = f"it cannot be read: {first_line(error)}"

    def _add_row(self, file: Path, number: int, row: Any, skipped: dict[str, str]) -> None:
        try:
            fields = decoded_object(row) if isinstance(row, bytes) else row
            if not fields["file_name"]:
                raise ValueError("it is empty")
            image = Path(os.path.normpath(file.parent / fields["file_name"]))
        except (BadSample, KeyError, TypeError, ValueError) as error:
            what = "a JSON object" if isinstance(row, bytes) else "a row"
            skipped[f"{printable(file)}:{number}"] = f"it is not {what} with a file_name: {error}"
        else:
            self.fields.setdefault(image, []).append(fields)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as opened:
        for number, line in enumerate(iter(lambda: opened.readline(_MAX_LINE), b""), 1):
            if line.strip():
                yield number, line


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a CSV file with a head; yields its rows, and the lines that they end in."""
    reader = csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline=""))
    for row in reader:
        yield reader.line_num, row


def _parquet_rows(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    need("distill", str(file), "datasets")  # which brings pyarrow
    import pyarrow.parquet

    return enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)


_READERS: dict[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {".jsonl": _lines, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _beginning(file: Path) -> bytes:
    """Read as much of a file as a caption may have, and a byte more.

    Raises:
        BadSample: it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_CAPTION + 1)
    except OSError as error:
        raise BadSample(f"its caption cannot be read: {error}") from error


def _size(file: Path) -> int | None:
    """Return a regular file's size in bytes; None if there is none of that name."""
    try:
        found = os.stat(file)  # noqa: PTH116 - the name may be one that no file can have
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise DistillError(f"data.path: {path} {'is not a directory' if path.exists() else 'does not exist'}")


def _files_below(folder: Path, skipped: dict[str, str]) -> Iterator[Path]:
    """Yield the regular files of a folder and those below it that are not hidden; images that are left out are added to `skipped`."""
    for parent, folders, names in os.walk(folder, onerror=lambda error: skipped.setdefault(printable(error.filename), str(error))):
        for name in sorted(folders):
            below = Path(parent, name)
            if below.is_symlink():
                skipped[printable(below)] = "it is a link to a folder, which is not followed"
            elif name.startswith(".") and (count := sum(file.suffix.lower() in IMAGE_SUFFIXES for file in below.rglob("*"))):
                skipped[printable(below)] = f"it is hidden; {counted(count, 'image')} in it"
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(parent, name)
            reason = _why_left_out(file)
            if reason is None:
                yield file
            elif looks_like_image(name):
                skipped[printable(file)] = reason


def _why_left_out(file: Path) -> str | None:
    if file.name.startswith("."):
        return "it is hidden"
    if not file.is_file():
        return "it is a link to nowhere" if file.is_symlink() else "it is not a regular file"
    if file.suffix.lower() not in IMAGE_SUFFIXES and looks_like_image(file.name):
        return f"images of kind {file.suffix} are not read: save it as another kind"
    return None
