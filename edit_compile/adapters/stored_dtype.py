"""In which precision a model's weights are stored: read in that, they stay mapped from their files and take no memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edit_compile.adapters.hub_access import hub_access
from edit_compile.adapters.load_model import LoadedModel
from edit_compile.adapters.model_names import hub_id, is_on_hub
from edit_compile.adapters.pipelines import DENOISERS
from edit_compile.demo import models as demo
from edit_compile.tensor_files import DTYPES

_FILES, _PLAIN = "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors"
_LOADED_IN = (torch.float32, torch.bfloat16, torch.float16)


def stored_dtype(structure: LoadedModel) -> torch.dtype | None:
    """Read from the header of a model's first safetensors file in which dtype most of it is.

    Args:
        structure: the model, which need not have weights; on the hub, that file is downloaded.

    Returns:
        None if it has no such file, is in none that is loaded, or its file cannot be had.
    """
    try:
        file = _first_file(structure)
        found = None if file is None else _most_frequent(file)
    except (OSError, ValueError, LookupError, SafetensorError):  # who loads the weights says why
        return None
    return found if found in _LOADED_IN else None


def loading_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which diffusers loads a weight of a model that it is told to load in `dtype`: of some modules, float32."""
    exact: Collection[str] = getattr(model, "_keep_in_fp32_modules", None) or ()
    return dtype if set(exact).isdisjoint(name.split(".")) else torch.float32


def _first_file(structure: LoadedModel) -> Path | None:
    kind, _, rest = structure.source.partition("/")
    if kind in ("arch", "timm"):
        return None
    folder = demo.folder(rest) if kind == "demo" else Path(structure.source)
    if is_on_hub(structure.source):
        return _first_on_hub(*hub_id(structure.source))
    for part in (*(folder / name for name in DENOISERS), folder):
        if files := sorted(part.glob(_FILES), key=lambda file: (file.name != _PLAIN and ".fp16" in file.name, file.name)):
            return files[0]
    return None


def _first_on_hub(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with hub_access():
        for part in DENOISERS:
            name = _PLAIN
            try:
                index = json.loads(Path(hf_hub_download(repository, f"{part}/{_PLAIN}.index.json", revision=revision)).read_text())
                name = min(index["weight_map"].values())
            except EntryNotFoundError:
                pass  # then the weights are in one file
            try:
                return Path(hf_hub_download(repository, f"{part}/{name}", revision=revision))
            except EntryNotFoundError:
                continue
    return None


def _most_frequent(path: Path) -> torch.dtype | None:
    counts: Counter[str] = Counter()
    file: Any
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            part = file.get_slice(name)
            counts[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    return DTYPES.get(counts.most_common(1)[0][0])
