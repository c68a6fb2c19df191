"""Calls in forks with limits, and what may be wrong with how they end."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import edit_compile as ec
from edit_compile.cli import main

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pickle.find_class")


class Wrong(Exception):
    """A trial did not go as it should; the message says how."""


@dataclass(frozen=True)
class Ended:
    """How a fork ended.

    Attributes:
        status: its exit status; None if a signal ended it.
        said: what it wrote to stdout and stderr.
        hung: whether it was ended for taking too long.
    """

    status: int | None
    said: str
    seconds: float
    hung: bool = False

    @property
    def last_line(self) -> str:
        return next((line for line in reversed(self.said.splitlines()) if line.strip()), "nothing")


def forked(
    call: Callable[[], int | None], *, limit: float, at: float | None = None, send: int = signal.SIGKILL, memory: int | None = None
) -> Ended:
    """Run a call in a fork of this process, whose exit status is what it returns.

    Args:
        limit: seconds after which it is killed.
        at: seconds after which it gets the signal `send`.
        memory: bytes of address space that it may use more than this process does now.
    """
    with tempfile.TemporaryFile("w+") as output:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _in_fork(call, output.fileno(), memory)
        sent = False
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            now = time.monotonic() - began
            if done:
                output.seek(0)
                return Ended(os.WEXITSTATUS(status) if os.WIFEXITED(status) else None, output.read(), now)
            if now > limit:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                output.seek(0)
                return Ended(None, output.read(), now, hung=True)
            if at is not None and now >= at and not sent:
                os.kill(child, send)
                sent = True
            time.sleep(0.005)


def _in_fork(call: Callable[[], int | None], output: int, memory: int | None) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 99
    try:
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (pages + memory,) * 2)
        status = call() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def command(*arguments: object) -> Callable[[], int]:
    """Make a call that runs a command line, and returns its exit status."""

    def call() -> int:
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def watched(call: Callable[[], object]) -> Callable[[], int]:
    """Make a call for a fork that fails with 99 for errors that are not of this package, and with 98 if something is executed."""

    def refuse(event: str, arguments: object) -> None:
        if event in FORBIDDEN:
            print(f"{event} {arguments!r:.200}", flush=True)
            os._exit(98)

    def inside() -> int:
        sys.addaudithook(refuse)
        try:
            call()
        except ec.EditCompileError as error:
            if "\n" in str(error).strip():
                print(f"an error of several lines: {error}")
                return 97
            print(error)
            return 1
        return 0

    return inside


def judged(ended: Ended, what: str) -> str:
    if ended.hung:
        raise Wrong(f"{what}: nothing after {ended.seconds:.0f} s")
    if ended.status not in (0, 1):
        raise Wrong(f"{what}: status {ended.status}, {ended.last_line}")
    return f"{what}: {'taken' if ended.status == 0 else 'refused'}"
