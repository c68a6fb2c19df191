"""For all tests: hypothesis without deadlines, since the first call of an operation on a busy machine takes as long as it takes."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
