"""The command line: tables, JSON, exit codes, errors in one line."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import edit_compile as ec
from edit_compile.cli import UNTRAINED, main


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def test_inspect_shows_the_plan(run):
    result = run("inspect", "--model", "demo/mm-dit")
    assert result.exit_code == 0
    assert "5 of 5 attention sites rewritten" in result.stdout
    assert "transformer_blocks.{0..3}.attn" in result.stdout
    assert "mm-edit" in result.stdout
    assert "[image" in result.stdout


def test_convert_saves_what_load_reads(run, tmp_path):
    result = run("convert", "--model", "demo/mm-dit", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["actions"] == {"mm-edit": 4, "edit": 1}
    assert found["parameters_added"] > 0
    assert UNTRAINED in result.stderr
    student = ec.load(tmp_path / "out")
    assert all(p.isfinite().all() for p in student.parameters())
    with torch.no_grad():
        x, text, pooled = torch.randn(1, 3, 24, 32), torch.randn(1, 32, 64), torch.randn(1, 64)
        y = student(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.ones(1)).sample
    assert y.shape == x.shape


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "--model", "demo/none"), 1, "error: no demo model 'none'; there are: mm-dit"),
        (("convert", "--model", "arch/dit-xl-2", "-o", "x"), 1, "is structure only, without weights"),
        (("inspect", "--model", "demo/mm-dit", "--include", "nowhere"), 1, "error: 'nowhere' matches no attention; there are:"),
        (("inspect", "--model", "demo/mm-dit", "--eta", "best"), 2, "'best' is not one of 'ratio', 'exact', 'calibrated'"),
        (("inspect",), 2, "Missing option '--model'"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(run, arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1
