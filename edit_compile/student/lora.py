"""LoRA of a converted model's Linears outside its sites, by PEFT: adding it, merging it, and writing it for other libraries.

PEFT puts a Linear with LoRA into a module of its own, which renames its weight: `path.weight` becomes `path.base_layer.weight`.
Checkpoints name the weights as the original model does; `plain_name` translates.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as serialize
from torch import Tensor, nn

from edit_compile.errors import ConfigError, EditCompileError, some_of
from edit_compile.extras import import_extra
from edit_compile.frozen import first_problem
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.handle import Conversion, ConvertedModel, Lora, unwrap
from edit_compile.student.site import TEACHER, converted_sites
from edit_compile.torch_internals import is_sharded

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER, FOLDER = "default", "lora"
_ADAPTED = ("base_layer", "original_module")  # parts of PEFT's layers
_OF_ADAPTERS = re.compile(rf"\.({'|'.join(_ADAPTED)})(?=\.)")
_BASE, _OWN = "base_layer", ("lora_A", "lora_B")
_PEFT_FILES, _DIFFUSERS_FILE = ("adapter_config.json", "adapter_model.safetensors"), "pytorch_lora_weights.safetensors"
FILES = (*_PEFT_FILES, _DIFFUSERS_FILE)
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
        ConfigError: a glob matches no Linear, or rank or alpha is not positive.
        EditCompileError: PEFT is not installed, the model has LoRA already, or the weights are sharded.
    """
    model = unwrap(student)
    if model.edit_conversion.lora is not None:
        raise EditCompileError("the converted model has LoRA already: merge it with edit_compile.merge_lora, or go on training it")
    known = _linears(model)
    globs = (targets,) if isinstance(targets, str) else tuple(targets)
    for glob in globs:
        if not any(fnmatchcase(path, glob) for path in known):
            raise ConfigError(f"lora.targets: {glob!r} matches no Linear outside the converted sites; there are: {some_of(known)}")
    adapted = tuple(path for path in known if any(fnmatchcase(path, glob) for glob in globs))
    try:
        lora = Lora(rank=rank, alpha=rank if alpha is None else alpha, targets=adapted)
    except ValidationError as error:
        raise ConfigError(f"lora.{first_problem(error)}") from None
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
    leave_out_for_teachers(model)
    model.edit_conversion.lora = lora


class OffForTeachers(nn.Module):
    """Mixed into a layer of PEFT's: in calls that run as the teacher it is what it adapts alone, whichever thread makes them.

    Unlike PEFT's `disable_adapters`, nothing is switched on the module, which other calls may be running.
    """

    edit_conversion: Conversion

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.edit_conversion.runtime.teacher_is_on(""):
            return self.get_submodule(_adapted_in(self))(*args, **kwargs)
        return super().forward(*args, **kwargs)


@cache
def _off_for_teachers(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (OffForTeachers, kind), {"__module__": kind.__module__})


def _adapted_in(layer: nn.Module) -> str:
    """Name the part of a layer of PEFT's that it adapts."""
    return next(name for name in _ADAPTED if name in layer._modules)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """List the layers by path that PEFT put into a model, for whoever."""
    if "peft" not in sys.modules:
        return {}
    kinds = (_peft().tuners.tuners_utils.BaseTunerLayer, _peft().utils.other.AuxiliaryTrainingWrapper)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def has_foreign_adapters(model: ConvertedModel) -> bool:
    """Say whether there is LoRA on a converted model that `add_lora` did not make."""
    own = model.edit_conversion.lora
    return any(own is None or path not in own.targets for path in adapted_layers(model))


def may_have_foreign_adapters(model: ConvertedModel) -> bool:
    """Do what `has_foreign_adapters` does where torch.compile traces it: by what PEFT notes on the model, which graphs are guarded by."""
    return len(getattr(model, "peft_config", {})) > (model.edit_conversion.lora is not None)


def leave_out_for_teachers(model: ConvertedModel) -> None:
    """Have calls as the teacher run without the adapters that are in a converted model now."""
    layers = {path: layer for path, layer in adapted_layers(model).items() if not isinstance(layer, OffForTeachers)}
    sites = tuple(f"{path}." for path in converted_sites(model)) if layers else ()  # whose teachers have none
    for path, layer in layers.items():
        if not path.startswith(sites):
            layer.__dict__["edit_conversion"] = model.edit_conversion
            kind: Any = type(layer)
            layer.__class__ = _off_for_teachers(kind)


def adapt_teachers(model: ConvertedModel) -> None:
    """Have calls as the teacher run with all adapters, also in the sites, over the original weights. Of a copy that only they use."""
    layers = adapted_layers(model)
    for layer in layers.values():
        if isinstance(layer, OffForTeachers):
            layer.__class__ = type(layer).__bases__[1]
    for path, site in converted_sites(model).items():
        own = f"{path}.{ADDED}."  # what the original does not have
        inside = {
            name.removeprefix(f"{path}."): layer
            for name, layer in layers.items()
            if name.startswith(f"{path}.") and not name.startswith(own)
        }
        if inside:
            site.__dict__[TEACHER] = _with_adapters(site.edit_teacher, inside)


def _with_adapters(module: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """Copy a module over the same weights, with layers by path that adapt what it has there."""
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    for path, layer in layers.items():
        twin, adapted = copy.copy(layer), copied.get_submodule(path)
        vars(twin).update(_modules={**layer._modules, _adapted_in(layer): adapted}, merged_adapters=[])
        _replace(copied, path, twin)
    return copied


def merge_lora(student: Any) -> list[str]:
    """Add a converted model's LoRA to the weights of its Linears, in place, which makes these the student's own, as `unshare` does.

    The merged weights have the wider dtype of weight and LoRA. The original ones are kept for `teacher`.

    Returns:
        The names of the merged weights.

    Raises:
        EditCompileError: there is no LoRA, or the weights are sharded or offloaded, or were written to without `unshare`.
    """
    model = unwrap(student)
    conversion, layers = model.edit_conversion, lora_layers(model)
    if conversion.lora is None:
        raise EditCompileError(f"{type(model).__name__} has no LoRA to merge")
    for path, layer in layers.items():
        if is_sharded(layer.base_layer.weight) or layer.base_layer.weight.is_meta:
            raise EditCompileError(f"{path}.weight is sharded or offloaded: save the student, load it again, and merge that")
    weights = {f"{path}.weight": layer.base_layer.weight for path, layer in layers.items()}
    kept = {name: weight for name, weight in weights.items() if name not in conversion.originals}
    if changed := conversion.shared.written(kept, thoroughly=True):
        raise EditCompileError(f"{some_of(changed)} were written to since the conversion: save the student, load it again, and merge that")
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
    return list(weights)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """List the Linears with LoRA of a converted model by path; those that `add_lora` made, not a user's own."""
    if not isinstance(model, ConvertedModel) or model.edit_conversion.lora is None:
        return {}
    return {path: model.get_submodule(path) for path in model.edit_conversion.lora.targets}


def lora_names(model: nn.Module) -> set[str]:
    """Name the parameters of a converted model's LoRA, as its state dict does."""
    return {f"{path}.{part}.{ADAPTER}.weight" for path in lora_layers(model) for part in _OWN}


def plain_name(model: ConvertedModel, name: str) -> str:
    """Translate the name of a weight to the one that it has without adapters, those that other libraries add included."""
    return name if name in model.edit_conversion.fingerprint else _OF_ADAPTERS.sub("", name)


def state_name(model: nn.Module, name: str) -> str:
    """Undo `plain_name`."""
    path, _, leaf = name.rpartition(".")
    lora = model.edit_conversion.lora if isinstance(model, ConvertedModel) else None
    return f"{path}.{_BASE}.{leaf}" if lora is not None and path in lora.targets else name


def without_lora(model: ConvertedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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


def files_for_others(lora: Lora, tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """Make PEFT's files and diffusers' file of a checkpoint's LoRA, by name, the one without which the others are nothing last.

    Args:
        tensors: of the checkpoint.
    """
    described: Any = peft_config(lora)
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in described.to_dict().items()}
    own = {f"{path}.{part}.weight": tensors[f"{path}.{part}.{ADAPTER}.weight"] for path in lora.targets for part in _OWN}
    files = {}
    for name, prefix in ((_DIFFUSERS_FILE, _DIFFUSERS_PREFIX), (_PEFT_FILES[1], _PEFT_PREFIX)):
        header = {f"{prefix}.{key}": value for key, value in config.items()}  # diffusers has no other way to know alpha
        metadata = {"format": "pt", _DIFFUSERS_HEADER: json.dumps(header, default=str)}
        files[name] = serialize({f"{prefix}.{key}": value for key, value in own.items()}, metadata)
    return files | {_PEFT_FILES[0]: json.dumps(config, indent=2, sort_keys=True, default=str).encode()}


def _peft() -> Any:
    return import_extra("lora", "LoRA", "peft")


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """List the Linears outside the sites whose weight is theirs alone; subclasses may read their weight in other ways than by a call."""
    sites = tuple(f"{path}." for path in converted_sites(model))
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = ((path, module) for path, module in model.named_modules() if type(module) is nn.Linear and not f"{path}.".startswith(sites))
    return {path: module for path, module in found if uses[id(module.weight)] == 1}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)
