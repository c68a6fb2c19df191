"""Where tables go: the terminal, or a file."""

from __future__ import annotations

import os
import sys

from rich.console import Console

_WIDE = 200  # columns, where output goes to a file


def make_console() -> Console:
    """Make a console on stdout, as wide as the terminal or as $COLUMNS, and wide where output goes to a file."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE, highlight=False, emoji=False)
