"""Example inputs from a file."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import edit_compile as ec
from edit_compile.adapters.input_file import read_example_inputs
from edit_compile.adapters.load_model import load_model
from edit_compile.cli import main

SHAPES = """
hidden_states: {shape: [2, 3, 20, 28]}
encoder_hidden_states: {shape: [2, 13, 32]}
pooled_projections: {shape: [2, 32]}
timestep: {shape: [2], dtype: int64, fill: 3}
return_dict: false
"""


def written(tmp_path, text):
    path = tmp_path / "inputs.yaml"
    path.write_text(text)
    return path


def test_tensors_values_and_everything_else(tmp_path):
    found = read_example_inputs(
        written(tmp_path, "a: {shape: [2, 3], dtype: bfloat16, fill: 1}\nids: {values: [[0, 1]]}\nb: [{shape: [1]}, 4]\nc: {d: x}")
    )
    assert torch.equal(found["a"], torch.ones(2, 3, dtype=torch.bfloat16))
    assert torch.equal(found["ids"], torch.tensor([[0, 1]]))
    assert torch.equal(found["b"][0], torch.zeros(1))
    assert found["b"][1] == 4
    assert found["c"] == {"d": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {shape: [2, -3]}", r"inputs.yaml: a.shape.1: "),
        ("a: {shape: [2], dtype: float99}", "a: unknown dtype 'float99'; there are: float32"),
        ("a: {shape: [2], color: red}", "a.color: "),
        ("a: [{values: [[1], [2, 3]]}]", r"a\[0\].values: "),
        ("- 1", "must map the forward's arguments"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(ec.ConfigError, match=message):
        read_example_inputs(written(tmp_path, text))
    with pytest.raises(ec.ConfigError, match="cannot be read"):
        read_example_inputs(tmp_path / "nothing.yaml")


def test_the_command_line_plans_a_model_without_adapter_by_them(tmp_path):
    load_model("demo/mm-dit").model.save_pretrained(tmp_path / "model")
    shapes = written(tmp_path, SHAPES.replace("32]", f"{load_model('demo/mm-dit').model.config.joint_attention_dim}]"))
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "model"), "--example-inputs", str(shapes), "--json"])
    assert result.exit_code == 0, result.stderr
    assert "keep" not in json.loads(result.stdout)["actions"]
