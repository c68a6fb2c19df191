"""Timing: in turns, after a warm-up, teacher and student told apart."""

from __future__ import annotations

import functools

import pytest
import torch
from test_tables import shown

import edit_compile as ec
import toy
from edit_compile.bench import SpeedRow, Timing, compare_calls, compare_speed, latency, turns
from edit_compile.report.tables import speed_table


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed calls advance."""
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def taking(name, seconds, log):
        def call():
            log.append(name)
            now[0] += seconds.pop(0) if len(seconds) > 1 else seconds[0]

        return call

    return taking


def test_calls_take_turns_after_a_warm_up(clock):
    log = []
    teacher, student, speedup, memory = compare_calls(
        clock("teacher", [9.0, 9.0, 4.0, 6.0, 8.0], log), clock("student", [9.0, 9.0, 2.0, 2.0, 2.0], log), runs=3
    )
    assert log == ["teacher", "student"] * 5
    assert teacher == Timing(6.0, 5.0, 7.0)
    assert student == Timing(2.0, 2.0, 2.0)
    assert speedup == Timing(3.0, 2.5, 3.5)
    assert memory is None or len(memory) == 2


def test_teacher_and_student_are_run_as_such():
    student = ec.linearize(toy.Toy(blocks=1).eval(), example_inputs=toy.inputs())
    modes = []
    student.blocks[0].attn.register_forward_pre_hook(lambda site, args: modes.append((site.edit_teacher_is_on(), torch.is_grad_enabled())))
    rows = compare_speed(student, [(8, 12), (16, 12)], inputs_for=lambda h, w: toy.inputs(1, h, w), runs=1, warmup=1)
    assert [(row.height, row.width) for row in rows] == [(8, 12), (16, 12)]
    assert modes == [(True, False), (False, False)] * 4
    assert all(0 < row.student.low <= row.student.median <= row.student.high for row in rows)


def test_compiled_rows_compile_the_repeated_blocks(monkeypatch):
    monkeypatch.setattr(latency, "compile_regionally", functools.partial(ec.compile, backend="eager"))
    student = ec.linearize(toy.Toy(blocks=1).eval(), example_inputs=toy.inputs())
    compare_speed(student, [(8, 12)], inputs_for=lambda h, w: toy.inputs(1, h, w), runs=1, warmup=1, compiled=True)
    assert student.blocks[0]._compiled_call_impl is not None
    with ec.teacher(student):
        student(**toy.inputs(1, 8, 12))


def test_the_table():
    rows = [
        SpeedRow(32, 32, Timing(0.010, 0.009, 0.012), Timing(0.0125, 0.011, 0.013), Timing(0.8, 0.7, 0.9)),
        SpeedRow(1024, 64, Timing(12.5, 12.0, 13.0), Timing(5.0, 4.9, 5.1), Timing(2.5, 2.4, 2.61)),
    ]
    text = shown(speed_table(rows), 80)
    assert "32 x 32      10.0 ms     12.5 ms     0.80x  0.70 .. 0.90" in text
    assert "1024 x 64  12,500.0 ms  5,000.0 ms     2.50x  2.40 .. 2.61" in text
    assert "peak" not in text
    measured = [SpeedRow(1, 1, rows[0].teacher, rows[0].student, rows[0].speedup, (2**21, 2**20))]
    assert "2 MiB" in shown(speed_table(measured), 80)
