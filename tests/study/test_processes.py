"""Studies by processes that are killed, and by two at once; and runs that were there, compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def came_out(tmp_path_factory):
    command = [sys.executable, str(Path(__file__).with_name("study_processes.py")), str(tmp_path_factory.mktemp("studies"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": TESTS})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_study_that_was_killed_comes_out_the_same(came_out):
    found, _ = came_out
    assert found["kills"] == 3
    assert found["straight"]["states"] == ["finished"] * 4
    assert {"error.after", "flops.16 x 16", "parameters.added"} <= found["straight"]["numbers"]["other"].keys()
    assert found["killed"] == found["straight"]


@pytest.mark.slow
def test_two_processes_share_the_cells(came_out):
    found, _ = came_out
    assert found["trained by two"] == 2
    assert found["two"] == found["straight"]


@pytest.mark.slow
def test_what_was_measured_of_a_student_is_not_taken_for_anothers(came_out):
    found, (other, replaced) = came_out
    assert other == replaced
    assert {name: other[name] for name in found["straight"]["numbers"]["other"]} == found["straight"]["numbers"]["other"]
