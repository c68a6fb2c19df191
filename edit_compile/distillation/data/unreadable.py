"""The end of a run: what of the data could not be read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from edit_compile.files import write_text

FILE = "unreadable.json"
log = logging.getLogger(__name__)


def write_unreadable(folder: Path, skipped: Mapping[str, str]) -> None:
    """Name the samples that were skipped, with the reasons, in a file and their number in the log. No file if there are none."""
    path = folder / FILE
    if not skipped:
        path.unlink(missing_ok=True)
        return
    write_text(path, json.dumps(dict(skipped), indent=2, ensure_ascii=False))
    log.warning("%d sample%s could not be read, named in %s", len(skipped), "" if len(skipped) == 1 else "s", path)
