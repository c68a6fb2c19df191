"""`edit-compile env`: what a report of a bug needs, also where torch is broken."""

from __future__ import annotations

import json
import subprocess
import sys

from click.testing import CliRunner

import edit_compile
from edit_compile.cli import main
from edit_compile.report.environment import environment, environment_lines


def test_versions_devices_and_backends():
    result = CliRunner().invoke(main, ["env", "--json"])
    found = json.loads(result.stdout)
    assert found["edit_compile"] == edit_compile.__version__
    assert found["libraries"]["torch"]
    assert found["devices"][0]["name"] == "cpu"
    assert "gloo" in found["backends"]


def test_lines_name_every_value_once():
    found = environment()
    lines = environment_lines({**found, "libraries": {"torch": "2.14", "peft": None}, "backends": {"nccl": True}})
    named = dict(line.split("  ", 1) for line in lines)
    assert named["torch"].strip() == "2.14"
    assert named["peft"].strip() == "none"
    assert named["nccl"].strip() == "yes"
    assert "threads" in named["device cpu"]


def test_a_broken_torch_is_said():
    code = "import sys; sys.modules['torch'] = None\nfrom edit_compile.cli import main\nmain(['env'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch_error" in result.stdout
    assert "diffusers" in result.stdout
