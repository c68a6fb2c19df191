"""Progress: who is told of work, and what a terminal shows of it."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import edit_compile as ec
from edit_compile.cli import main
from edit_compile.cli.command import say
from edit_compile.progress import each, listening, working
from edit_compile.report.compare_samples import SampleOptions, open_sampler
from edit_compile.report.progress_display import ProgressDisplay
from edit_compile.report.progress_lines import Pace, ProgressLines, line_of
from edit_compile.words import bytes_in_words, clock, duration_in_words, without_paths


class Heard:
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def began(self, work):
        self.told.append(("began", work.what, work.total))

    def advanced(self, work):
        self.told.append(("advanced", work.what, work.done))

    def ended(self, work):
        self.told.append(("ended", work.what, work.done))

    def closed(self):
        pass


def test_what_an_error_left_is_not_shown_any_more():
    display = ProgressDisplay(Console(file=io.StringIO(), force_terminal=True))

    def fails():
        for _ in each("ab", "letters", 2):
            assert 1 / 0

    with pytest.raises(ZeroDivisionError) as kept, listening(display):
        fails()
    assert kept.traceback  # which keeps the loop's frame, and the generator in it
    assert display.lines().renderables == []


def test_a_listener_hears_of_work_inside_alone():
    heard = Heard()
    with working("before"), listening(heard):
        assert list(each("ab", "letters", 2)) == ["a", "b"]
        with pytest.raises(ZeroDivisionError), working("more", 5, 3) as work:
            work.advance(1 // 0 if work.advance() is None else 1)
    with working("after"):
        pass
    letters = [("began", "letters", 2), ("advanced", "letters", 1), ("advanced", "letters", 2), ("ended", "letters", 2)]
    assert heard.told == [*letters, ("began", "more", 5), ("advanced", "more", 4), ("ended", "more", 4)]


def test_phase_step_and_time_left_come_first_and_fit_into_80_columns():
    with working("stage 0 (2 of 3)", 2000, 100) as work:
        pace = Pace(work.done)
        assert line_of(work, pace) == "stage 0 (2 of 3)  100/2,000  0:00"
        pace.began -= 10
        pace._steps[0] = (pace.began, 100)
        work.advance(20)
        pace.add(work.done)
        work.note = "loss 0.0123  " + "feature 0.456  " * 8
        shown = line_of(work, pace)
    assert shown.startswith("stage 0 (2 of 3)  120/2,000  15:40 left  loss 0.0123")
    written = io.StringIO()
    display = ProgressDisplay(Console(file=written, force_terminal=True, width=80))
    display.began(work)
    display.ended(work)
    lines = [line for line in written.getvalue().split("\n") if "stage 0" in line]
    assert lines
    assert "120/2,000" in lines[0]
    assert "…" in lines[0]


def test_without_a_total_the_time_since_it_began_is_shown():
    with working("importing PyTorch") as work:
        assert line_of(work, Pace(0)) == "importing PyTorch  0:00"
    assert [clock(seconds) for seconds in (7.4, 754, 3723)] == ["0:07", "12:34", "1:02:03"]


def test_without_a_terminal_a_line_is_said_now_and_then(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with listening(ProgressLines(lines.append)), working("stage 0", 100) as work:
        work.note = "loss 0.5"
        for _ in range(100):
            now[0] += 0.7
            work.advance()
    assert lines == ["stage 0  43/100  0:40 left  loss 0.5", "stage 0  86/100  0:10 left  loss 0.5"]


def test_bytes_durations_and_paths_in_words():
    assert [bytes_in_words(number) for number in (3 * 2**20, 700 * 2**20, 5 * 2**30)] == ["3 MiB", "0.7 GiB", "5.0 GiB"]
    durations = ["8.2 s", "119.0 s", "2.0 min", "2.5 h", "3.0 days"]
    assert [duration_in_words(seconds) for seconds in (8.2, 119, 120, 9000, 3 * 86400)] == durations
    data = {"path": "/home/me/photos", "many": ["~/x", "a/b", 1], "name": "user/model"}
    assert without_paths(data) == {"path": "photos", "many": ["x", "a/b", 1], "name": "user/model"}


def test_planning_tells_of_every_pass_and_site():
    heard = Heard()
    with listening(heard):
        ec.plan("demo/dit")
    begun = [what for told, what, _ in heard.told if told == "began"]
    passes = ["planning: canonicalize model", "planning: find sites", "planning: classify model", "planning: decide sites"]
    assert [what for what in begun if what in passes] == passes
    assert begun[0] == "capturing PixArtTransformer2DModel"
    assert ("ended", "planning: sites", 10) in heard.told


class Pipe:
    """A pipeline that calls back after each of its steps, as diffusers' do."""

    def __call__(self, prompt, generator, num_inference_steps=4, output_type="np", callback_on_step_end=None):
        for step in range(num_inference_steps):
            assert callback_on_step_end(self, step, None, {}) == {}
        return SimpleNamespace(images=np.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("steps", [None, 2])
def test_pipelines_tell_of_their_steps(steps):
    heard = Heard()
    _, sample_many = open_sampler(Pipe(), None, SampleOptions(steps=steps))
    with listening(heard):
        assert len(sample_many(["a"], [0])) == 1
    assert heard.told[-1] == ("ended", "sampling: steps", steps or 4)


def test_lines_are_folded_between_words_on_a_terminal_alone(monkeypatch, capsys):
    line = "125,640 parameters added, saved to converted-of-a-long-name"
    monkeypatch.setenv("COLUMNS", "40")
    for terminal, said in ((False, [line]), (True, ["125,640 parameters added, saved to", "converted-of-a-long-name"])):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=terminal: answer)
        with click.Context(main):
            say(line)
        assert capsys.readouterr().err.splitlines() == said


@pytest.mark.parametrize("columns", [None, "80"])
def test_nothing_is_shown_where_there_is_no_terminal(columns, tmp_path):
    result = CliRunner().invoke(main, ["recipe", "demo-dit", "--explain"], env={"COLUMNS": columns})
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""


def test_one_warning_of_another_library_is_left_out():
    names = []
    logger, handler = logging.getLogger("bitsandbytes.backends.cpu.ops"), logging.Handler()
    handler.emit = lambda record: names.append(record.getMessage())
    logger.addHandler(handler)
    try:
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no kernels")
        logger.warning("something else: %s", "heard")
    finally:
        logger.removeHandler(handler)
    assert names == ["something else: heard"]
