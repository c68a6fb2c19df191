"""Threads that call student and teacher at several sizes."""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path

import torch
from torch import Tensor

import edit_compile as ec
from attacks.processes import Wrong, forked
from attacks.workshop import checkpoint, inputs_of, original

THREADS, FORWARDS = 8, 200


def threads(number: int, folder: Path) -> str:
    compiled = number % 2 == 1

    def tried() -> int:
        student = ec.load(checkpoint(), original())
        if compiled:
            ec.compile(student)
        sizes = [(64, 96), (96, 64), (80, 80), (48, 112)]

        def output(size: tuple[int, int], as_teacher: bool) -> Tensor:
            with torch.no_grad(), ec.teacher(student) if as_teacher else contextlib.nullcontext():
                found: Tensor = student(**inputs_of(*size))[0]
            return found

        expected = {(size, kind): output(size, kind) for size in sizes for kind in (False, True)}
        wrong: list[str] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(FORWARDS):
                    size, kind = rng.choice(sizes), rng.random() < 0.5
                    if not torch.equal(output(size, kind), expected[size, kind]):
                        wrong.append(f"{size} {'teacher' if kind else 'student'} differs")
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print("\n".join(wrong[:3]))
        return int(bool(wrong))

    checkpoint()
    ended = forked(tried, limit=1800)
    if ended.status != 0:
        raise Wrong(f"{'compiled' if compiled else 'eager'}: status {ended.status}, {ended.last_line}")
    return f"{THREADS} threads x {FORWARDS} forwards, {'compiled' if compiled else 'eager'}"
