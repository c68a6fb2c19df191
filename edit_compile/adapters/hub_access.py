"""Access to the Hugging Face hub that fails at once where there is no network, and then still finds what is cached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edit_compile.errors import ModelNotFoundError

ALIASES = {
    "stabilityai/sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "stabilityai/sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
}
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


def download_error(name: str, error: Exception, online: bool) -> ModelNotFoundError:
    """Say in one line why `name` is neither cached nor downloaded, and what to do."""
    if not online:
        return ModelNotFoundError(
            f"{name} is not a local path, is not cached, and the hub cannot be reached: "
            "check the network and HF_HUB_OFFLINE, or give the path of a local copy"
        )
    return ModelNotFoundError(f"{name} cannot be downloaded: {first_line(error)}; give the path of a local copy")


def first_line(error: Exception) -> str:
    """Return the first line that an error's message has, or its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
