"""Files that survive a crash, and several processes at once: written atomically, flushed to disk, told apart by their content, locked."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_BEAT, _STALE = 10.0, 60.0  # seconds between signs of life in a lock's file, and after which its owner counts as gone
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_LEFT = 3600.0  # seconds after which a temporary file counts as left behind
_SMALL = 2**28  # bytes
_RETRY = 0.2  # seconds between attempts to get a lock


def flush(path: Path) -> None:
    """fsync a file, or a directory where the system supports that."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in the errors of writing to it: once it is open, as on a full disk, the system's own do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write. At the end it replaces `path` atomically, flushed to disk; after an error, nothing has changed.

    Of several processes that do this at once, the last one's file is there in the end, as a whole.
    """
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):  # by processes that were killed
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def read_small(path: Path) -> bytes:
    """Read a file that is to be small: JSON that somebody else may have written.

    Raises:
        OSError: it cannot be read, is so large that it cannot be what it should be, or is a pipe or a device, which may have no end.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    with path.open("rb") as file:
        content = file.read(_SMALL + 1)
    if len(content) > _SMALL:
        raise OSError(f"{path} has more than {_SMALL:,} bytes")
    return content


def prompt_lines(path: Path) -> list[str]:
    """Read a text file with a prompt per line; empty lines do not count.

    Raises:
        ValueError: it cannot be read, or has none; a predicate in one line.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        lines = path.read_text("utf-8-sig").split("\n")  # `splitlines` also splits at separators that stand within prompts, such as U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if not any(map(str.strip, lines)):
        raise ValueError("has no prompts")
    return [line.strip() for line in lines if line.strip()]


def sha256(path: Path) -> str:
    """Hash a file's content with SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock inside; yields whether it could be had. It ends with its process, however that ends.

    The lock is the system's on a file. Network file systems may have none, or one that other machines do not see: therefore the
    owner also writes its name into the file and touches it all the time, and while it does, another machine does not get the lock.
    Afterwards the file is gone, and so are folders that were made for it and are empty.

    Args:
        path: of the file.
        wait: until it can be had.

    Raises:
        OSError: the file cannot be written.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    held = _claim(path)
    while held is None and wait:
        time.sleep(_RETRY)
        held = _claim(path)
    try:
        yield held is not None
    finally:
        if held is not None:
            held.release()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def alone_in(folder: Path, doing: str, error: type[Exception]) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder inside.

    Args:
        doing: what the others do there: "another process {doing} {folder}".
        error: the kind that is raised.

    Raises:
        error: another process is there; the folder is a file, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise error(f"{folder} is a file, not a folder; choose another with -o")
    with ExitStack() as stack:
        try:
            mine = stack.enter_context(claimed(folder / ".lock"))
        except OSError as problem:
            raise error(f"{folder} cannot be written: {problem.strerror}; choose another folder with -o") from None
        if not mine:
            raise error(f"another process {doing} {folder}, or did until a minute ago: wait for it, or choose another folder with -o")
        yield


class _Claim:
    """A lock that is held: an open file, which a thread touches."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file, self._released = path, file, threading.Event()
        file.seek(0)
        file.truncate()
        file.write(socket.gethostname())
        file.flush()
        self._beat = threading.Thread(target=self._touch, daemon=True, name=f"lock {path}")
        self._beat.start()

    def _touch(self) -> None:
        while not self._released.wait(_BEAT):
            with suppress(OSError):
                os.utime(self._path)

    def release(self) -> None:
        """Remove the file, then close it: nobody locks one that is no longer there without noticing."""
        self._released.set()
        self._beat.join()
        with suppress(OSError):
            self._path.unlink()
        self._file.close()


def _claim(path: Path) -> _Claim | None:
    """Try to get a lock; None if it is another's."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file, made = path.open("x+"), True
        except FileExistsError:
            try:
                file, made = path.open("r+"), False
            except FileNotFoundError:
                if path.is_symlink():
                    raise
                continue  # its owner has just removed it
        except FileNotFoundError:
            continue  # another process has just removed the folder
        try:
            locked = _lock(file)
            if locked is False or (not made and _shows_life(path, file, anywhere=locked is None)):
                file.close()
                return None
            if locked or made:
                if _is_at(path, file):
                    return _Claim(path, file)
            else:
                path.unlink(missing_ok=True)  # its owner is gone: begin anew, with a file that this process makes
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: TextIO) -> bool | None:
    """Lock a file; returns whether that was possible, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _shows_life(path: Path, file: TextIO, *, anywhere: bool) -> bool:
    """Tell whether a lock's file was touched a short time ago, by the file system's clock; by another machine's process, or anywhere."""
    if not anywhere and file.buffer.read() in (b"", socket.gethostname().encode()):
        return False
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime < _STALE


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
