"""For all tests: hypothesis without deadlines, plans that are made once, and which tests a machine without a GPU skips.

The first call of an operation on a busy machine takes as long as it takes, so that no deadline can be set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from inspect import isfunction, ismethod
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from edit_compile import api
from edit_compile.ir import input_spec
from edit_compile.student import checkpoint

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module")
def compiled_once():
    """Compile what a module's tests plan and convert once: the same model, config and inputs give the same forwards again.

    Planning takes most of the time of many tests that are about something else. Models are the same if their modules, their settings
    and the shapes of their weights are.
    """
    kept: dict[Any, Any] = {}
    compile_plan, recompile = api.compile_plan, api.recompile

    def once(make: Any, model: nn.Module, *others: Any) -> Any:
        found = kept.setdefault((make, _structure(model), *map(_content, others)), [])
        if not found:
            found += [make(model, *others), model]  # the model is kept, so that ids in its structure stay its own
        return found[0]

    def planned(model: nn.Module, inputs: Any, config: Any, passes: Any = None) -> Any:
        return compile_plan(model, inputs, config, passes) if passes else once(compile_plan, model, inputs, config)

    def planned_again(model: nn.Module, plan: Any, passes: Any = None) -> Any:
        return recompile(model, plan, passes) if passes else once(recompile, model, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "compile_plan", planned)
        for module in (api, checkpoint):
            patch.setattr(module, "recompile", planned_again)
        yield


_OWN = vars(nn.Module()).keys()  # what every module has, hooks and weights among it


def _structure(model: nn.Module) -> str:
    """What a model computes, but for the values of its weights."""
    own = [
        (path, id(type(each)), {name: _setting(value) for name, value in vars(each).items() if name not in _OWN})
        for path, each in model.named_modules()
    ]
    weights = [(name, tuple(tensor.shape), tensor.dtype, tensor.device.type) for name, tensor in model.state_dict().items()]
    return repr((own, weights, model.training))


def _setting(value: Any) -> Any:
    """An attribute of a module, where that is plain data or has plain data; anything else is the same only as the object that it is."""
    if value is None or isinstance(value, bool | int | float | str | tuple | list | Mapping):
        return str(value)
    if isfunction(value) or ismethod(value) or not hasattr(value, "__dict__"):
        return id(value)
    return id(type(value)), {name: str(inner) for name, inner in vars(value).items()}


def _content(value: Any) -> str:
    """What a config, a plan or example inputs hold, values of tensors included."""
    if isinstance(value, Mapping):
        tensors = {name: _digest(each) for name, each in value.items()}
        return json.dumps([input_spec.encode(dict(value)), tensors], sort_keys=True)
    return f"{type(value).__name__} {value.model_dump_json()}"


def _digest(value: Any) -> str:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return hashlib.sha1(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return str(value.shape) if isinstance(value, torch.Tensor) else str(value)
