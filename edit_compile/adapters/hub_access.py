"""Access to the Hugging Face hub that fails at once where there is no network, and then still finds what is cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


@contextmanager
def only_cached() -> Iterator[None]:
    """Let the hub's client find what it has downloaded before, and nothing else."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def download_error(name: str, error: Exception, online: bool) -> ModelNotFoundError:
    """Say in one line why `name` is neither cached nor downloaded, and what to do."""
    if not online:
        return ModelNotFoundError(
            f"{name} is not a local path, is not cached, and the hub cannot be reached: "
            "check the network and HF_HUB_OFFLINE, or give the path of a local copy"
        )
    return ModelNotFoundError(f"{name} cannot be downloaded: {first_line(error)}; give the path of a local copy")


@contextmanager
def hub_errors(name: str, without_files: str = "lacks a file") -> Iterator[None]:
    """Access the hub, and say in one line why it does not give what is asked for inside.

    Args:
        name: the hub id.
        without_files: what is wrong with the repository if it does not have the files, after its name.

    Raises:
        ModelNotFoundError: instead of what the hub's client raises.
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
            raise ModelNotFoundError(f"the hub has no {name}, or it is private: check the name, or run `hf auth login`") from error
        except RevisionNotFoundError as error:
            raise ModelNotFoundError(f"{name} has no such revision on the hub; its page lists branches, tags and commits") from error
        except LocalEntryNotFoundError as error:
            raise download_error(name, error, online=False) from error
        except EntryNotFoundError as error:
            raise ModelNotFoundError(f"{name} {without_files}") from error
        except OSError as error:
            raise download_error(name, error, online) from error


def hub_files(name: str, revision: str | None, wanted: Sequence[str], *, left_out: Sequence[str] = ()) -> Path:
    """Download files of a repository to the hub's cache, those that are not in it yet; returns the folder of the commit there.

    Args:
        wanted, left_out: glob patterns over paths in the repository.

    Raises:
        ModelNotFoundError: the hub does not give them; says why.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(left_out) or None))


def card_of(name: str) -> dict[str, str]:
    """Return what the card of a model on the hub says of its licence and its task; nothing where the card cannot be read."""
    from huggingface_hub import ModelCard

    with hub_access():
        try:
            data = ModelCard.load(name).data.to_dict()
        except Exception:  # of the hub's client, of its HTTP library, of YAML: the card is written without
            return {}
    fields = ("license", "license_name", "license_link", "pipeline_tag")
    return {field: str(data[field]) for field in fields if isinstance(data.get(field), str)}


def first_line(error: Exception) -> str:
    """Return the first line that an error's message has, or its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
