"""Access to the Hugging Face hub that fails at once where there is no network, and then still finds what is cached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TIMEOUT = 5.0  # seconds


def hub_reachable() -> bool:
    """Ask the hub for any answer, for at most five seconds."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # whichever HTTP library this version of the client is built on, it raises its own errors
        return False
    return True


@contextmanager
def hub_access(name: str = "") -> Iterator[bool]:
    """Put the hub's client in its offline mode if the hub cannot be reached.

    It would otherwise retry for half a minute, with a warning each time. Offline, cached files are found and others raise an OSError.

    Args:
        name: what is to be loaded; for a folder, the hub is not asked.

    Yields:
        Whether files can be downloaded.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # the user's own choice
        yield False
    elif (name and Path(name).is_dir()) or hub_reachable():
        yield True
    else:
        constants.HF_HUB_OFFLINE = True
        try:
            yield False
        finally:
            constants.HF_HUB_OFFLINE = False
