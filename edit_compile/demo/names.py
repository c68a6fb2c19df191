"""The names of the demo models."""

from __future__ import annotations

IMAGE_NAMES, LARGE_NAMES, VIDEO_NAME = ("mm-dit", "dit"), ("mm-dit-64", "dit-64"), "video-dit"
NAMES = (*IMAGE_NAMES, *LARGE_NAMES, VIDEO_NAME)
SOURCES = tuple(f"demo/{name}" for name in NAMES)  # what users call them
