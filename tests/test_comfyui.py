"""The nodes for ComfyUI, as ComfyUI uses nodes: by their mappings, their fields, and graphs in its API format."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import edit_compile as ec

FOLDER = Path(__file__).parent.parent / "integrations" / "comfyui"
PROMPT = "a picture with a black background showing a small red circle in the upper left part of the picture and nothing else"
WIDGETS = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}


@pytest.fixture(scope="module")
def pack():
    """Imported as a folder of `custom_nodes` is: by its path, under a name of no package."""
    spec = importlib.util.spec_from_file_location("custom_nodes_edit_compile", FOLDER / "__init__.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    ec.save(ec.linearize("demo/dit"), folder, base="demo/dit")
    return folder


def execute(pack, graph, wanted):
    """The outputs of a node, after those it is wired to; every input is checked against its field as ComfyUI checks them."""
    kind = pack.NODE_CLASS_MAPPINGS[graph[wanted]["class_type"]]
    fields = kind.INPUT_TYPES()
    given, known = graph[wanted]["inputs"], {**fields["required"], **fields.get("optional", {})}
    assert fields["required"].keys() <= given.keys() <= known.keys()
    values = {}
    for name, value in given.items():
        type_name, *rest = known[name]
        options = rest[0] if rest else {}
        if isinstance(value, list):  # a wire from another node's output
            source, number = value
            assert pack.NODE_CLASS_MAPPINGS[graph[source]["class_type"]].RETURN_TYPES[number] == type_name
            value = execute(pack, graph, source)[number]
        elif isinstance(type_name, list):
            assert value in type_name
        else:
            assert type(value) is WIDGETS[type_name]
            assert not isinstance(value, int | float) or options.get("min", value) <= value <= options.get("max", value)
        values[name] = value
    outputs = getattr(kind(), kind.FUNCTION)(**values)
    assert isinstance(outputs, tuple)
    assert len(outputs) == len(kind.RETURN_TYPES)
    return outputs


def graph_with(checkpoint, **drawing):
    graph = json.loads((FOLDER / "workflow.json").read_text())
    graph["1"]["inputs"] |= {"checkpoint": str(checkpoint), "dtype": "float32"}
    graph["2"]["inputs"] |= {"prompt": PROMPT, "steps": 2, **drawing}
    return graph


def test_nodes_are_what_comfyui_expects(pack):
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in pack.NODE_CLASS_MAPPINGS.values():
        assert isinstance(node.CATEGORY, str)
        assert all(isinstance(name, str) for name in node.RETURN_TYPES)
        assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
        fields = node.INPUT_TYPES()
        assert fields.keys() <= {"required", "optional", "hidden"}
        function = inspect.signature(getattr(node, node.FUNCTION)).parameters
        assert [name for name in function if name != "self"] == [name for group in fields.values() for name in group]
        for name, (type_name, *rest) in {**fields["required"], **fields.get("optional", {})}.items():
            options = rest[0] if rest else {}
            assert isinstance(type_name, list) or type_name in (*WIDGETS, "IMAGE", "EDIT_COMPILE_STUDENT"), name
            if not isinstance(type_name, list) and type_name in WIDGETS:
                assert type(options["default"]) is WIDGETS[type_name]
            assert (name in fields["required"]) == (function[name].default is inspect.Parameter.empty)


def test_a_graph_draws_what_sample_draws(pack, checkpoint):
    expected = ec.sample(checkpoint, [PROMPT, PROMPT], steps=2, seed=5)
    (drawn,) = execute(pack, graph_with(checkpoint, seed=5, batch_size=2), "2")
    assert (drawn.dtype, drawn.shape) == (torch.float32, (2, 32, 32, 3))
    assert 0 <= drawn.min() < drawn.max() <= 1
    assert np.array_equal(drawn.numpy(), np.stack(expected.student))
    (original,) = execute(pack, graph_with(checkpoint, seed=5, batch_size=2, attention="teacher"), "2")
    assert np.array_equal(original.numpy(), np.stack(expected.teacher))
    (wide,) = execute(pack, graph_with(checkpoint, width=40, height=32), "2")
    assert wide.shape == (1, 32, 40, 3)


def test_a_checkpoint_that_was_written_again_is_loaded_again(pack, checkpoint):
    load = pack.NODE_CLASS_MAPPINGS["EditCompileLoadStudent"]
    before = load.IS_CHANGED(str(checkpoint), "float32")
    assert load.IS_CHANGED(str(checkpoint), "float32") == before
    os.utime(checkpoint / "edit_compile.json", (1, 1))
    assert load.IS_CHANGED(str(checkpoint), "float32") != before
    assert load.IS_CHANGED("user/repository", "float32") == ""
