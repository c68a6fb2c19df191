"""A pipeline without weights, which still runs up to the first call of its denoiser: that tells the denoiser's inputs.

Its networks are on the meta device; what they return reaches the pipeline as zeros on the CPU. Schedulers, tokenizers and
image processors are real.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import new_class
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edit_compile.adapters.hub_access import hub_files
from edit_compile.adapters.module_limit import limited_modules
from edit_compile.adapters.pipelines import PIPELINE_INDEX
from edit_compile.errors import EditCompileError, ModelNotFoundError, first_line
from edit_compile.files import read_small

_WEIGHTS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth", "*.onnx*", "*.msgpack", "*.h5", "*.gguf")


def pipeline_structure(name: str) -> Any:
    """Assemble the pipeline of a folder or hub id without its weights.

    Raises:
        ModelNotFoundError: a part of it is missing or damaged, or of a library that is not installed.
    """
    folder = pipeline_files(name)
    try:
        return _assembled(folder)
    except EditCompileError:
        raise
    except Exception as error:  # its parts raise whatever their files run into
        raise ModelNotFoundError(f"{folder / PIPELINE_INDEX}: no pipeline can be made of it: {first_line(error)}") from error


def _assembled(folder: Path) -> Any:
    index = json.loads(read_small(folder / PIPELINE_INDEX))
    settings = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    kind = _find_class("diffusers", index["_class_name"], folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old schedulers' settings, which do not matter here
        components = {part: _component(folder / part, part, *entry) for part, entry in _entries(index)}
        pipeline = kind(**{**settings, **components})
    # Its own `_execution_device` is that of its networks.
    pipeline.__class__ = new_class(kind.__name__, (kind,), exec_body=lambda names: names.update(_execution_device=torch.device("cpu")))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_files(name: str) -> Path:
    """Return a pipeline's folder; of a hub id, everything but the weights is downloaded to the hub's cache."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else hub_files(name, left_out=_WEIGHTS)


def _entries(index: dict[str, Any]) -> Iterator[tuple[str, list[str | None]]]:
    """Yield the components' names with their library and class."""
    return ((part, entry) for part, entry in index.items() if not part.startswith("_") and isinstance(entry, list) and len(entry) == 2)


def _component(folder: Path, part: str, library: str | None, class_name: str | None) -> Any:
    if library is None or class_name is None or part == "safety_checker":
        return None
    kind = _find_class(library, class_name, folder)
    try:
        return _without_weights(kind, folder) if issubclass(kind, nn.Module) else kind.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{folder}: {class_name} cannot be made: {first_line(error)}") from error


def _find_class(library: str, name: str, where: Path) -> Any:
    """Find a class by its library, or by the pipeline's own module in diffusers that defines it."""
    for module in (library, f"diffusers.pipelines.{library}"):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ModelNotFoundError(f"{where} needs {name} of {library}, which is not installed or has no such class")


def _without_weights(kind: Any, folder: Path) -> nn.Module:
    of_diffusers = hasattr(kind, "from_config")
    config = kind.load_config(folder) if of_diffusers else kind.config_class.from_pretrained(folder)
    with torch.device("meta"), limited_modules(config if of_diffusers else config.to_dict()):
        model: nn.Module = kind.from_config(config) if of_diffusers else kind(config)
    model.eval()
    for method in ("forward", "encode", "decode"):
        if callable(getattr(model, method, None)):
            setattr(model, method, _on_meta(getattr(model, method)))
    return model


def _on_meta(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method on the meta device, and give zeros on the CPU for what it returns."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        with _AllTrue():  # type: ignore[no-untyped-call]
            returned = method(*args, **kwargs)
        return pytree.tree_map(lambda leaf: torch.zeros_like(leaf, device="cpu") if isinstance(leaf, Tensor) else leaf, returned)

    return call


class _AllTrue(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what code asks of the values of meta tensors as if they were 1 or True: that masks hide nothing, mostly."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return True if x.dtype is torch.bool else 1.0 if x.is_floating_point() else 1
            if func is torch.ops.aten.nonzero.default:
                return x.new_empty((x.numel(), x.ndim), dtype=torch.int64)
        return func(*args, **(kwargs or {}))
