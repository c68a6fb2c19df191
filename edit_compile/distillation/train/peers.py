"""Ends a run of several processes whose others are dead or hang: in a collective operation it would wait for them for hours.

Every process gives a sign of life every few seconds, in a store beside the one that torch.distributed uses, and looks at the others'.
They come from a thread: a process that only takes its time over a step, a compilation or a measurement is alive. With it comes whether
the process moves (see `movement`): where none does, and some wait in a collective operation for others that stand still, all end.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from edit_compile.distillation.processes import gathered, process
from edit_compile.distillation.train.movement import Movement
from edit_compile.torch_internals import is_communication_error

LOST = 75  # exit status where another process is lost: sysexits.h's EX_TEMPFAIL, for a run that --resume continues
BEAT, SILENCE = 3.0, 40.0  # seconds between signs of life, and after which a process counts as lost
SILENCE_AFTER_ERROR = 9.0  # likewise, where a collective operation has failed
STILL = 40.0  # seconds after which a process that stands still while others wait for it counts as hanging
_ENDED, _DONE, _THREADS = "ended: ", "done", "peers"


class _Sign(NamedTuple):
    """What a process said last, and when this one heard of it, on its own monotonic clock."""

    text: str
    heard: float


class Peers:
    """This process's view of the others."""

    def __init__(self, advice: Callable[[], str]) -> None:
        """
        Args:
            advice: says what is left, and how to go on.
        """
        self.rank, self.count = process()
        self._advice = advice
        self._host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._store = self._join(0) if self.rank == 0 else None
        found = gathered([(self._store.port if self._store is not None else 0, socket.gethostname())])
        self._port, self._hosts = found[0][0], [host for _, host in found]
        self._beats, self._own, self._movement = 0, "", Movement(_THREADS)
        self._signs = [_Sign("", time.monotonic())] * self.count
        self._answered = time.monotonic()  # by the store
        self._failed, self._stopped, self._ended = False, threading.Event(), threading.Event()
        for act in (self._beat, self._judge):
            threading.Thread(target=act, daemon=True, name=_THREADS).start()

    def _join(self, port: int) -> Any:
        answer = timedelta(seconds=SILENCE)
        store = torch.distributed.TCPStore  # type: ignore[attr-defined]
        return store(self._host, port, self.count, self.rank == 0, answer, wait_for_workers=False)

    def _beat(self) -> None:
        """Give signs of life and hear the others', until the first process, which has the store, is gone; if it is stopped, wait for it."""
        with suppress(RuntimeError):
            while not self._stopped.is_set():
                self._exchange()
                self._movement.uncounted = time.thread_time()
                self._stopped.wait(BEAT)
        self._ended.set()

    def _exchange(self) -> None:
        store = self._store = self._store or self._join(self._port)
        self._beats += 1
        store.set(str(self.rank), self._own or f"{self._beats} {self._doing()}")
        ranks = range(self.count)
        begun = [rank for rank in ranks if self._signs[rank].text or store.check([str(rank)])]
        for rank, said in zip(begun, store.multi_get([str(rank) for rank in begun]), strict=True):
            text = said.decode()
            if text != self._signs[rank].text or text.startswith(_DONE):
                self._signs[rank] = _Sign(text, time.monotonic())
        self._answered = time.monotonic()

    def _judge(self) -> None:
        """End this process once another is lost. Time in which this one did not run, stopped or busy, does not count."""
        tick = time.monotonic()
        while not self._stopped.wait(BEAT / 3):
            last, tick = tick, time.monotonic()
            if (gap := tick - last) > SILENCE / 3:
                self._answered += gap
                self._signs = [_Sign(sign.text, sign.heard + gap) for sign in self._signs]
                self._movement.forget()
                continue
            self._movement.look()
            if lost := self._lost(tick):
                self._end(lost, tick)
            still, waiting = self._still()
            if still:
                self._end_still(still, waiting)

    def _lost(self, now: float) -> list[int]:
        """List the processes that are lost. All signs of life come from the first one's store."""
        patience = SILENCE_AFTER_ERROR if self._failed else SILENCE
        if self.rank != 0 and now - self._answered > patience:
            return [0]
        silent = ((rank, now - sign.heard, sign.text.startswith(_ENDED)) for rank, sign in enumerate(self._signs) if rank != self.rank)
        return [rank for rank, seconds, ended in silent if seconds > (SILENCE_AFTER_ERROR if ended else patience)]

    def _doing(self) -> str:
        """Say whether this process moves, waits for others, or stands still, and where."""
        state = self._movement.state(STILL)
        return f"still {self._movement.place}" if state == "still" else state

    def _still(self) -> tuple[dict[int, str], list[int]]:
        """Say where the processes stand that stand still, and list those that wait for them; nothing if a process moves."""
        own = f"0 {self._doing()}"
        states = [(own if rank == self.rank else sign.text).split(" ", 2)[1:] for rank, sign in enumerate(self._signs)]
        still = {rank: state[1] for rank, state in enumerate(states) if len(state) == 2 and state[0] == "still"}
        waiting = [rank for rank, state in enumerate(states) if state == ["waits"]]
        return (still, waiting) if waiting and len(still) + len(waiting) == self.count else ({}, waiting)

    def _end_still(self, still: dict[int, str], waiting: list[int]) -> None:
        """End this process, which waits for others that hang, or hangs, once all have heard of it; the first that waits says why."""
        rank, place = next(iter(still.items()))
        if self.rank == waiting[0]:
            _say(f"process {rank} on {self._hosts[rank]} stands still at {place} while others wait for it: it hangs; {self._advice()}")
        time.sleep(2 * BEAT)
        _exit(LOST)

    def _end(self, lost: list[int], now: float) -> None:
        """End this process at once: its main thread waits in a collective operation, out of which it can't be called.

        The first of those that are left says why.
        """
        sign, who = self._signs[lost[0]], f"process {lost[0]} on {self._hosts[lost[0]]}"
        ended = sign.text.startswith(_ENDED)
        what = sign.text if ended else f"gave its last sign of life {now - sign.heard:.0f} s ago: it is dead or hangs"
        if self.rank == min(set(range(self.count)) - set(lost)):
            _say(f"{who} {what}; {self._advice()}")
        _exit(1 if ended else LOST)

    def leave(self, error: BaseException | None) -> None:
        """Say that this process ends, and why; the first one, which has the store, waits until the others know."""
        if error is not None and is_communication_error(error):
            self._failed = True  # most likely since another process is gone: then `_judge` ends this one, and says so
            time.sleep(2 * SILENCE_AFTER_ERROR)
        lines = str(error).splitlines() or [type(error).__name__]
        self._own = _DONE if error is None else f"{_ENDED}{lines[0]}"
        known = time.monotonic() + 2 * BEAT
        with suppress(RuntimeError):
            while not self._ended.is_set():
                self._exchange()
                if error is None or self.rank != 0 or self._all_leave() or time.monotonic() > known:
                    break
                time.sleep(BEAT / 10)
        self._stopped.set()

    def _all_leave(self) -> bool:
        return all(sign.text.startswith((_ENDED, _DONE)) for sign in self._signs)


def _say(reason: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(f"error: {reason}\n")
        sys.stderr.flush()


def _exit(status: int) -> None:
    """End this process at once, whatever its threads do."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


@contextmanager
def watching_peers(advice: Callable[[], str]) -> Iterator[None]:
    """End this process inside, with status `LOST` and a line on standard error, once another one is dead or hangs.

    Args:
        advice: says what is left, and how to go on.
    """
    if process()[1] == 1:
        yield
        return
    peers, failure = Peers(advice), None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        peers.leave(failure)
