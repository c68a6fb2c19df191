"""Models with random weights, cut to a few of their repeated blocks: for timing, which does not depend on weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from edit_compile.adapters.load_model import LoadedModel, load_model
from edit_compile.errors import ModelNotFoundError
from edit_compile.extras import need


def random_model(name: str, *, blocks: int | None = None, device: str = "cpu", dtype: torch.dtype | None = None) -> LoadedModel:
    """Make the model that a name stands for with random weights, in evaluation mode. None are loaded.

    Args:
        name: as of `load_model`.
        blocks: of every run of equal blocks make so many at most.

    Raises:
        ModelNotFoundError: nothing is found under the name, or the model cannot be cut.
    """
    loaded = load_model(name, structure_only=True)
    config = _config_of(loaded.model)
    if blocks is not None:
        config = _shortened(loaded.model, config, blocks)
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        model = _make(loaded.model, config) if config is not None else _of_timm(name)
    if blocks is not None:
        _cut(model, blocks)
    model = nn.Module.to(model, device=device, dtype=dtype)  # of diffusers, `to` warns of modules that are meant to stay in float32
    return replace(loaded, model=model.eval(), has_weights=True)


def repeated_runs(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """Yield the outermost lists whose elements are modules of one class that hold others, by path: a model's repeated blocks."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside and _is_run(list(module)):
            found.append(path)
            yield path, module


def _is_run(elements: list[nn.Module]) -> bool:
    return len(elements) > 1 and len({type(each) for each in elements}) == 1 and all(any(each.children()) for each in elements)


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the config that a model of diffusers is made of; None for others."""
    config = getattr(model, "config", None)
    return dict(config) if isinstance(config, Mapping) and hasattr(type(model), "from_config") else None


def _make(like: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    return cast("nn.Module", cast("Any", type(like)).from_config(config))


def _of_timm(name: str) -> nn.Module:
    need("timm", name)
    import timm

    model: nn.Module = timm.create_model(name.partition("/")[2], pretrained=False)
    return model


def _shortened(model: nn.Module, config: dict[str, Any] | None, blocks: int) -> dict[str, Any] | None:
    """Change the numbers in a config that make runs of blocks longer than wanted: those with which nothing else changes.

    A number is tried if it is a run's length, by making the structure anew. What cannot be found here is cut afterwards.
    """
    for path, run in repeated_runs(model):
        for key in [k for k, v in (config or {}).items() if type(v) is int and v == len(list(run)) > blocks]:
            assert config is not None
            changed = {**config, key: blocks}
            try:
                with torch.device("meta"):
                    made = _make(model, changed).get_submodule(path)
            except Exception:  # whatever a class does with a number that is another thing's
                continue
            elements = list(made.children())
            if len(elements) == blocks and _shapes(elements[0]) == _shapes(next(iter(run.children()))):
                config = changed
                break
    return config


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _cut(model: nn.Module, blocks: int) -> None:
    for path, run in list(repeated_runs(model)):
        elements = list(run.children())
        if len(elements) > blocks:
            shorter = nn.Sequential(*elements[:blocks]) if isinstance(run, nn.Sequential) else nn.ModuleList(elements[:blocks])
            model.set_submodule(path, shorter)
    if not any(True for _ in model.parameters()):
        raise ModelNotFoundError(f"{type(model).__name__} has no parameters left")
