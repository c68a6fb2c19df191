"""Access to the Hugging Face hub that fails at once where there is no network, and then still finds what is cached."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edit_compile.adapters.model_names import hub_id
from edit_compile.errors import ModelNotFoundError, first_line

_TIMEOUT = 5.0  # seconds
_CLIENTS = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")  # whose errors are about the hub or the way to it
_lock, _holders, _before = threading.Lock(), 0, False  # of the client's offline mode, which is the process's: who wants it, and how it was


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

    if not constants.HF_HUB_OFFLINE and ((name and Path(name).is_dir()) or hub_reachable()):
        yield True
    else:
        with only_cached():
            yield False


@contextmanager
def only_cached() -> Iterator[None]:
    """Let the hub's client find what it has downloaded before, and nothing else: where several threads do, until the last one leaves."""
    from huggingface_hub import constants

    global _holders, _before
    with _lock:
        _before = _before if _holders else constants.HF_HUB_OFFLINE
        _holders += 1
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            constants.HF_HUB_OFFLINE = _holders > 0 or _before


def download_error(name: str, error: Exception, online: bool) -> ModelNotFoundError:
    """Say in one line why `name` is neither cached nor downloaded, and what to do."""
    if not online:
        return ModelNotFoundError(
            f"{name} is not a local path, is not cached, and the hub cannot be reached: "
            "check the network and HF_HUB_OFFLINE, or give the path of a local copy"
        )
    return ModelNotFoundError(f"{name} cannot be downloaded: {first_line(error).rstrip('.')}; give the path of a local copy")


def is_hub_error(error: Exception) -> bool:
    """Say whether the hub's client or its HTTP library raised an error, or the system for them."""
    modules = [kind.__module__.partition(".")[0] for kind in type(error).__mro__]
    return isinstance(error, OSError) or any(module.startswith(_CLIENTS) for module in modules)


@contextmanager
def hub_errors(name: str, without_files: str = "lacks a file") -> Iterator[None]:
    """Access the hub, and say in one line why it does not give what is asked for inside.

    Args:
        name: the hub id.
        without_files: what is wrong with the repository if it does not have the files, after its name.

    Raises:
        ModelNotFoundError: instead of what the hub's client and its HTTP library raise.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with hub_access() as online:
        try:
            yield
        except ModelNotFoundError:  # an OSError too, but it says what is wrong
            raise
        except HFValidationError as error:
            raise ModelNotFoundError(f"{name} is neither a local path nor a hub id: {first_line(error)}") from error
        except GatedRepoError as error:
            raise ModelNotFoundError(
                f"{name} is gated: accept its licence on its hub page and run `hf auth login`, or give the path of a local copy"
            ) from error
        except RepositoryNotFoundError as error:
            raise ModelNotFoundError(
                f"there is no folder {name} here, and the hub has no {hub_id(name)[0]}, or it is private: "
                "check the name, or run `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise ModelNotFoundError(f"{name} has no such revision on the hub; its page lists branches, tags and commits") from error
        except LocalEntryNotFoundError as error:
            raise download_error(name, error, online=False) from error
        except EntryNotFoundError as error:
            raise ModelNotFoundError(f"{name} {without_files}") from error
        except Exception as error:
            if not is_hub_error(error):
                raise
            raise download_error(name, error, online) from error


def hub_file(name: str, path: str) -> Path:
    """Download one file of a repository to the hub's cache, unless it is in it; returns where it is.

    Raises:
        ModelNotFoundError: the hub does not give it; says why.
    """
    from huggingface_hub import hf_hub_download

    repository, revision = hub_id(name)
    with hub_errors(name, f"has no {path}"):
        return Path(hf_hub_download(repository, path, revision=revision))


def hub_files(name: str, wanted: Sequence[str] | None = None, *, left_out: Sequence[str] = (), folder: Path | None = None) -> Path:
    """Download files of a repository, those that are not there yet; returns the folder with them.

    Args:
        name: the hub id; `user/repo@revision` for another than the newest.
        wanted, left_out: glob patterns over paths in the repository; default: all, and none.
        folder: where to; default: the folder of the commit in the hub's cache.

    Raises:
        ModelNotFoundError: the hub does not give them; says why.
    """
    from huggingface_hub import snapshot_download

    repository, revision = hub_id(name)
    with hub_errors(name):
        patterns: dict[str, Any] = {"allow_patterns": None if wanted is None else list(wanted), "ignore_patterns": list(left_out) or None}
        return Path(snapshot_download(repository, revision=revision, local_dir=folder, **patterns))


def card_of(name: str) -> dict[str, str]:
    """Return what the card of a model on the hub says of its licence and its task; nothing where the card cannot be read."""
    from huggingface_hub import ModelCard

    with hub_access():
        try:
            data = ModelCard.load(hub_id(name)[0]).data.to_dict()
        except Exception:  # of the hub's client, of its HTTP library, of YAML: the card is written without
            return {}
    fields = ("license", "license_name", "license_link", "pipeline_tag")
    return {field: str(data[field]) for field in fields if isinstance(data.get(field), str)}
