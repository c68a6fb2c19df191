"""LoRA of a converted model's Linears outside its sites, by PEFT: adding it, merging it, and writing it for other libraries.

PEFT puts a Linear with LoRA into a module of its own, which renames its weight: `path.weight` becomes `path.base_layer.weight`.
Checkpoints name the weights as the original model does; `plain_name` translates.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edit_compile.errors import ConfigError, EditCompileError, some_of
from edit_compile.files import replacing, write_text
from edit_compile.student.handle import Conversion, ConvertedModel, Lora, unwrap
from edit_compile.student.site import converted_sites
from edit_compile.torch_internals import is_sharded

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER, FOLDER = "default", "lora"
_BASE, _OWN = "base_layer", ("lora_A", "lora_B")
_PEFT_FILES, _DIFFUSERS_FILE = ("adapter_config.json", "adapter_model.safetensors"), "pytorch_lora_weights.safetensors"
_PEFT_PREFIX, _DIFFUSERS_PREFIX, _DIFFUSERS_HEADER = "base_model.model", "transformer", "lora_adapter_metadata"


def add_lora(student: Any, rank: int, alpha: float | None = None, targets: Iterable[str] = ("*",)) -> list[str]:
    """Add LoRA to Linears outside the sites of a converted model, in place. It starts at zero: outputs stay as they are.

    Calls as the teacher run without it. `save` writes it, `load` restores it, `merge_lora` adds it to the weights.

    Args:
        student: a converted model, or what holds one.
        rank: of the two matrices.
        alpha: the update's scale before it is divided by the rank; default: the rank.
        targets: globs over the paths of Linears. Left out are those whose weight is tied to another module's, which merging
            would change too.

    Returns:
        The paths of the Linears that have it now.

    Raises:
        ConfigError: a glob matches no Linear.
        EditCompileError: PEFT is not installed, the model has LoRA already, or the weights are sharded.
    """
    model = unwrap(student)
    if model.edit_conversion.lora is not None:
        raise EditCompileError("the converted model has LoRA already: merge it with edit_compile.merge_lora, or go on training it")
    known = _linears(model)
    globs = tuple(targets)
    for glob in globs:
        if not any(fnmatchcase(path, glob) for path in known):
            raise ConfigError(f"lora.targets: {glob!r} matches no Linear outside the converted sites; there are: {some_of(known)}")
    lora = Lora(rank=rank, alpha=alpha or rank, targets=tuple(path for path in known if any(fnmatchcase(path, g) for g in globs)))
    install_lora(model, lora)
    return list(lora.targets)


def install_lora(model: ConvertedModel, lora: Lora) -> None:
    """Put LoRA into the Linears at its paths, B at zero and A random from torch's generator.

    Raises:
        EditCompileError: PEFT is not installed, or a path has no Linear to adapt.
    """
    peft, known = _peft(), _linears(model)
    for path in lora.targets:
        if path not in known:
            raise EditCompileError(f"{path} is not a Linear outside the converted sites: LoRA cannot be added to it")
        if is_sharded(known[path].weight):
            raise EditCompileError(f"{path}.weight is sharded: add LoRA before the model is wrapped")
    trainable = {id(p): p.requires_grad for p in model.parameters()}  # PEFT freezes all else
    is_structure = any(linear.weight.is_meta for linear in known.values())
    peft.inject_adapter_in_model(peft_config(lora), model, ADAPTER, low_cpu_mem_usage=is_structure)
    for parameter in model.parameters():
        parameter.requires_grad_(trainable.get(id(parameter), True))
    for path in lora.targets:
        layer = model.get_submodule(path)
        layer.__dict__["edit_conversion"] = model.edit_conversion
        kind: Any = type(layer)
        layer.__class__ = _off_for_teachers(kind)
    model.edit_conversion.lora = lora


class OffForTeachers(nn.Module):
    """Mixed into PEFT's layer: in calls that run as the teacher it is the Linear alone, whichever thread makes them.

    Unlike PEFT's `disable_adapters`, nothing is switched on the module, which other calls may be running.
    """

    edit_conversion: Conversion
    base_layer: nn.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.edit_conversion.runtime.teacher_is_on(""):
            original: Tensor = self.base_layer(x, *args, **kwargs)
            return original
        adapted: Tensor = super().forward(x, *args, **kwargs)
        return adapted


@cache
def _off_for_teachers(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (OffForTeachers, kind), {"__module__": kind.__module__})


def merge_lora(student: Any) -> list[str]:
    """Add a converted model's LoRA to the weights of its Linears, in place, which makes these the student's own, as `unshare` does.

    The merged weights have the wider dtype of weight and LoRA. The original ones are kept for `teacher`.

    Returns:
        The names of the merged weights.

    Raises:
        EditCompileError: there is no LoRA, or the weights are sharded or offloaded.
    """
    model = unwrap(student)
    conversion, layers = model.edit_conversion, lora_layers(model)
    if conversion.lora is None:
        raise EditCompileError(f"{type(model).__name__} has no LoRA to merge")
    for path, layer in layers.items():
        if is_sharded(layer.base_layer.weight) or layer.base_layer.weight.is_meta:
            raise EditCompileError(f"{path}.weight is sharded or offloaded: save the student, load it again, and merge that")
    for path, layer in layers.items():
        linear, delta = layer.base_layer, layer.get_delta_weight(ADAPTER).detach()
        conversion.originals.setdefault(f"{path}.weight", linear.weight)
        dtype = torch.promote_types(linear.weight.dtype, delta.dtype)
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype) + delta.to(dtype))
        _replace(model, path, linear)
    conversion.lora = None
    described = vars(model).get("peft_config", {})
    described.pop(ADAPTER, None)
    if not described:
        vars(model).pop("peft_config", None)
    return [f"{path}.weight" for path in layers]


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """List the Linears with LoRA of a converted model by path; those that `add_lora` made, not a user's own."""
    if not isinstance(model, ConvertedModel) or model.edit_conversion.lora is None:
        return {}
    return {path: model.get_submodule(path) for path in model.edit_conversion.lora.targets}


def lora_names(model: nn.Module) -> set[str]:
    """Name the parameters of a converted model's LoRA, as its state dict does."""
    return {f"{path}.{part}.{ADAPTER}.weight" for path in lora_layers(model) for part in _OWN}


def plain_name(model: nn.Module, name: str) -> str:
    """Translate the name of a weight in a state dict to the one that it has without LoRA."""
    path, _, leaf = name.rpartition(f".{_BASE}.")
    lora = model.edit_conversion.lora if isinstance(model, ConvertedModel) else None
    return f"{path}.{leaf}" if lora is not None and path in lora.targets else name


def state_name(model: nn.Module, name: str) -> str:
    """Undo `plain_name`."""
    path, _, leaf = name.rpartition(".")
    lora = model.edit_conversion.lora if isinstance(model, ConvertedModel) else None
    return f"{path}.{_BASE}.{leaf}" if lora is not None and path in lora.targets else name


def without_lora(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave LoRA out of a state dict, under the names that weights have without it."""
    if not lora_layers(model):
        return tensors
    own = lora_names(model)
    return {plain_name(model, name): tensor for name, tensor in tensors.items() if name not in own}


def peft_config(lora: Lora) -> LoraConfig:
    """Describe LoRA as PEFT does.

    Raises:
        EditCompileError: PEFT is not installed.
    """
    # A list would match the ends of paths: `proj_out` those of the blocks too.
    config: LoraConfig = _peft().LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="|".join(map(re.escape, lora.targets)))
    return config


def write_for_others(folder: Path, lora: Lora | None, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint's LoRA as PEFT's files and diffusers' file into a folder of its own; without LoRA, remove those of an earlier one.

    Args:
        folder: the checkpoint's.
        tensors: of the checkpoint.
    """
    place = folder / FOLDER
    if lora is None:
        for name in (*_PEFT_FILES, _DIFFUSERS_FILE):
            (place / name).unlink(missing_ok=True)
        return
    described: Any = peft_config(lora)
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in described.to_dict().items()}
    place.mkdir(exist_ok=True)
    own = {f"{path}.{part}.weight": tensors[f"{path}.{part}.{ADAPTER}.weight"] for path in lora.targets for part in _OWN}
    write_text(place / _PEFT_FILES[0], json.dumps(config, indent=2, sort_keys=True, default=str))
    for name, prefix in ((_PEFT_FILES[1], _PEFT_PREFIX), (_DIFFUSERS_FILE, _DIFFUSERS_PREFIX)):
        header = {f"{prefix}.{key}": value for key, value in config.items()}  # diffusers has no other way to know alpha
        with replacing(place / name) as temporary:
            metadata = {"format": "pt", _DIFFUSERS_HEADER: json.dumps(header, default=str)}
            save_file({f"{prefix}.{key}": value for key, value in own.items()}, temporary, metadata=metadata)


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise EditCompileError(f"LoRA needs PEFT: pip install 'edit-compile[lora]' ({error})") from error


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """List the Linears outside the sites whose weight is theirs alone; subclasses may read their weight in other ways than by a call."""
    sites = tuple(f"{path}." for path in converted_sites(model))
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = ((path, module) for path, module in model.named_modules() if type(module) is nn.Linear and not f"{path}.".startswith(sites))
    return {path: module for path, module in found if uses[id(module.weight)] == 1}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)
