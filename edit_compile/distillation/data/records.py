"""Captioned images as they are stored: names, encoded images and captions, decoded when needed; and those that cannot be."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from edit_compile.errors import DistillError, some_of
from edit_compile.files import write_text
from edit_compile.words import counted

CAPTION_KEYS = ("caption", "text", "prompt")
SKIPPED_FILE = "unreadable.json"
MAX_CAPTION = 2**20  # bytes
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One captioned image.

    Attributes:
        name: what it is called in messages.
        image: a file, its content, or the decoded image.
        captions: one or more; each draw of the image in training takes one of them, everything else the first.
    """

    name: str
    image: Path | bytes | Image.Image
    captions: tuple[str, ...]


class BadSample(Exception):
    """A sample cannot be used; the message says why, in what any file takes."""

    def __str__(self) -> str:
        return super().__str__().encode("utf-8", "backslashreplace").decode()


NamedRecord = tuple[str, Record | BadSample]


class RecordDataset(Protocol):
    """Records by index. `record` raises BadSample."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def record(self, index: int) -> Record: ...

    def fingerprint(self) -> str:
        """Return what changes when records are added, removed or renamed, or their files change in size."""
        ...


def fingerprint_of(parts: Iterable[object]) -> str:
    """Hash the text of some parts."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(f"{part}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def printable(path: str | Path) -> str:
    """Return a path as text that any file or terminal takes: bytes that are no UTF-8 as `\\xff`, halves of characters as `\\ud800`."""
    try:
        content = os.fsencode(path)
    except UnicodeEncodeError:
        content = str(path).encode("utf-8", "backslashreplace")
    return content.decode("utf-8", "backslashreplace")


def log_skip(skipped: dict[str, str], name: str, reason: BadSample) -> None:
    """Add a sample to those that were skipped, and log it the first time."""
    if name not in skipped:
        skipped[name] = str(reason)
        log.warning("skipped %s: %s", name, reason)


def summarize(skipped: Mapping[str, str]) -> str:
    """Describe the first few of the skipped samples."""
    return "; ".join(f"{name}: {reason}" for name, reason in islice(skipped.items(), 3)) or "nothing was skipped"


def check_usable(records: Iterable[NamedRecord], path: object, skipped: dict[str, str]) -> None:
    """Look for a record that can be used, and stop at the first.

    Args:
        path: where they are from, as the recipe's `data.path` says.
        skipped: what could not be read before any was asked for, by name, with the reason; those that cannot be used are added.

    Raises:
        DistillError: none can be used.
    """
    number = 0
    for name, record in records:
        if isinstance(record, Record):
            return
        skipped.setdefault(name, str(record))
        number += 1
    what = f"none of the {number:,} images of {path} can be used" if number else f"there are no images in {path}"
    raise DistillError(f"data.path: {what}: {summarize(skipped)}")


def write_skipped(folder: Path, skipped: Mapping[str, str]) -> None:
    """Write the skipped samples and the reasons to a file, and log their number. Without any, the file is removed."""
    path = folder / SKIPPED_FILE
    if not skipped:
        path.unlink(missing_ok=True)
        return
    write_text(path, json.dumps(dict(skipped), indent=2, ensure_ascii=False))
    log.warning("%s could not be read: see %s", counted(len(skipped), "sample"), path)


def captions_in(fields: Mapping[str, Any], key: str | None = None) -> tuple[str, ...]:
    """Find the caption, or a list of them, among a record's fields: under `key`, or under a usual name.

    Raises:
        BadSample: there is none, or it is not text.
    """
    keys = [key] if key is not None else [name for name in CAPTION_KEYS if name in fields]
    if not keys or keys[0] not in fields:
        raise BadSample(f"it has no {key or ' or '.join(CAPTION_KEYS)}, but {some_of(map(str, fields)) if fields else 'nothing'}")
    value = fields[keys[0]]
    found = value if isinstance(value, list) and value else [value]
    for text in found:
        if not isinstance(text, str) or not text.strip():
            raise BadSample(f"its {keys[0]} is {'empty' if text in ('', None, []) else f'not text but {text!r:.40}'}")
        _check_text(text, keys[0])
    return tuple(text.strip() for text in found)


def _check_text(text: str, key: str) -> None:
    """Refuse a caption that no tokenizer takes: JSON can hold half of a character."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise BadSample(f"its {key} is not text: {error}") from error
    if size > MAX_CAPTION:
        raise BadSample(f"its {key} has {size:,} bytes, more than {MAX_CAPTION:,}")


def decoded_text(content: bytes) -> str:
    """Decode a caption's file.

    Raises:
        BadSample: it is not UTF-8, or too long for a caption.
    """
    if len(content) > MAX_CAPTION:
        raise BadSample(f"its caption has {len(content):,} bytes or more; a caption has at most {MAX_CAPTION:,}")
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"its caption is not UTF-8: {error}") from error


def decoded_object(content: str | bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        BadSample: it is none.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its JSON is not valid: {error}") from error
    if not isinstance(found, dict):
        raise BadSample(f"its JSON is not an object but {found!r:.40}")
    return found
