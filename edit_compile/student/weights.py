"""Which weights a converted model shares with the model it was made from, and which are its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.errors import ConfigError, EditCompileError, RewriteError, some_of
from edit_compile.student.handle import ConvertedModel, unwrap
from edit_compile.student.lora import lora_layers, lora_names, plain_name, without_lora
from edit_compile.student.site import converted_sites
from edit_compile.torch_internals import is_sharded

_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy a module tree over the same storage: moving or converting the copy leaves the original as it is.

    The copy's parameters are frozen: a step on them would change the original too (see `unshare`). Parameters of a
    class of their own (quantized ones) are copied.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if type(tensor) is nn.Parameter:
            memo[id(tensor)] = nn.Parameter(tensor.data, requires_grad=False)
        elif not isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = tensor.detach()
    with torch.no_grad():
        return copy.deepcopy(model, memo)


def unshare(student: Any, include: Iterable[str] = ("*",)) -> list[str]:
    """Give a converted model weights of its own outside its sites as well, so that they can be trained.

    `linearize` shares and freezes them: a step on them would change the original model too. The original weights are
    kept for `teacher`, and `save` writes the student's. Call it before an optimizer, DDP or FSDP takes the parameters.

    Args:
        student: a converted model, or what holds one: a pipeline, DDP, torch.compile, PEFT.
        include: globs over names of parameters outside the sites.

    Returns:
        The names of all weights outside the sites that are the student's own now.

    Raises:
        ConfigError: a glob matches no weight outside the sites.
        EditCompileError: the student's weights are sharded or offloaded, or have LoRA.
    """
    model = unwrap(student)
    sites = tuple(f"{path}." for path in converted_sites(model))
    shared = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point() and not n.startswith(sites)]
    for glob in (globs := tuple(include)):
        if not any(fnmatchcase(name, glob) for name, _ in shared):
            raise ConfigError(f"{glob!r} matches no weight outside the converted sites; there are: {some_of(n for n, _ in shared)}")
    if lora_layers(model):
        raise EditCompileError("weights with LoRA cannot be unshared: call edit_compile.unshare before LoRA is added, or merge that first")
    originals = model.edit_conversion.originals
    copies: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for name, parameter in shared:
        if name in originals or not any(fnmatchcase(name, glob) for glob in globs):
            continue
        if is_sharded(parameter) or parameter.is_meta:
            raise EditCompileError(f"{name} is sharded or offloaded; call edit_compile.unshare before wrapping the model")
        owner, _, leaf = name.rpartition(".")
        originals[name] = parameter
        setattr(model.get_submodule(owner), leaf, copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone())))
    return list(originals)


class OriginalWeights:
    """Gives the teacher of a model that was unshared: a copy of the module tree, over the same weights but those trained.

    Putting the original weights into the model itself for a while would put them into every other call that is running.
    """

    def __init__(self) -> None:
        self.made: tuple[Any, nn.Module] | None = None  # and what it was made of: replaced at once, for threads may meet here

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return the copy; a new one whenever the model was moved or cast.

        Raises:
            EditCompileError: the trained weights are sharded or offloaded.
        """
        state, made = [(id(t), t.device, t.dtype) for t in itertools.chain(model.parameters(), model.buffers())], self.made
        if made is None or made[0] != state:
            self.made = made = (state, with_original_weights(model))
        return made[1]


def with_original_weights(model: nn.Module) -> nn.Module:
    """Copy the module tree of a converted model over the same weights and the same handle, with the original weights outside the sites.

    Raises:
        EditCompileError: the trained weights are sharded or offloaded.
    """
    assert isinstance(model, ConvertedModel)
    conversion = model.edit_conversion
    own = {plain_name(model, name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    memo: dict[int, Any] = {id(conversion): conversion, id(conversion.runtime): conversion.runtime}
    memo |= {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    for site in converted_sites(model).values():
        memo[id(site.edit_teacher)] = site.edit_teacher
    for name, original in conversion.originals.items():
        parameter = own[name]
        if is_sharded(parameter) or parameter.is_meta:
            raise EditCompileError(
                f"{name} was trained, and is sharded or offloaded now: the teacher cannot take its place; "
                "run the original model as the teacher"
            )
        memo[id(parameter)] = nn.Parameter(original.detach().to(parameter), requires_grad=False)
    return copy.deepcopy(model, memo)


def separate_teacher(student: nn.Module) -> nn.Module:
    """Copy the module tree of a converted model over the same weights, the original ones outside the sites, with a handle of its own.

    Weights that `unshare` gives the student afterwards are not the copy's. Moving the student moves what they share.
    """
    assert isinstance(student, ConvertedModel)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(student.parameters(), student.buffers())}
    for site in converted_sites(student).values():
        memo[id(site.edit_teacher)] = site.edit_teacher
    own = {plain_name(student, name): p for name, p in student.named_parameters(remove_duplicate=False)}
    memo |= {id(own[name]): original for name, original in student.edit_conversion.originals.items()}
    teacher = copy.deepcopy(student, memo)
    teacher.edit_conversion.originals = {}
    return teacher


def original_state(student: ConvertedModel) -> dict[str, Tensor]:
    """Make the state dict of the model that a student was made from."""
    sites, originals = converted_sites(student), student.edit_conversion.originals
    prefixes = tuple(f"{path}." for path in sites)
    state = {name: t for name, t in without_lora(student, student.state_dict()).items() if not name.startswith(prefixes)}
    for path, site in sites.items():
        state |= {f"{path}.{name}": tensor for name, tensor in site.edit_teacher.state_dict().items()}
    return state | {name: original.detach().to(state[name]) for name, original in originals.items()}


def trained_tensors(student: ConvertedModel) -> dict[str, Tensor]:
    """List what is a student's own: the state of its sites, what was unshared, and LoRA.

    The names are those of its state dict, but for unshared weights that LoRA renames (see `student.lora`).
    """
    prefixes, unshared = tuple(f"{path}." for path in converted_sites(student)), student.edit_conversion.originals
    adapters, named = lora_names(student), ((plain_name(student, name), name, t) for name, t in student.state_dict().items())
    return {plain: t.detach() for plain, name, t in named if plain.startswith(prefixes) or plain in unshared or name in adapters}


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Look at all numbers that are here.

    Raises:
        RewriteError: a tensor holds NaN or infinity; says which.
    """
    for name, tensor in tensors:
        known = tensor.dtype in _NUMBERS and tensor.numel() and not tensor.is_meta and not is_sharded(tensor)
        if known and not all(bound.isfinite() for bound in torch.aminmax(tensor.detach())):
            raise RewriteError(f"{what}: the weight {name} holds NaN or infinity; load the weights again, or restore an earlier state")
