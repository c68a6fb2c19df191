"""What a student shares with the model it was made from, and which weights are its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edit_compile.errors import ConfigError, EditCompileError, RewriteError
from edit_compile.student.grid import converted_model
from edit_compile.student.site import converted_sites, is_sharded

ORIGINALS = "edit_originals"
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Original(NamedTuple):
    """A weight outside the sites that the student has a copy of: where the student's is, and the original."""

    owner: nn.Module
    leaf: str
    name: str
    parameter: nn.Parameter


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the same storage: moving or converting the copy leaves the original as it is.

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


def originals(student: nn.Module) -> list[Original]:
    """The weights outside the sites that `unshare` has copied."""
    return student.__dict__.get(ORIGINALS, [])


def unshare(student: Any, include: Iterable[str] = ("*",)) -> list[str]:
    """Give a converted model weights of its own outside its sites as well, so that they can be trained.

    `linearize` shares and freezes them: a step on them would change the original model too. The original weights are
    kept for `teacher`, and `save` writes the student's. Call it before an optimizer, DDP or FSDP takes the parameters.

    Args:
        student: a converted model, or a pipeline with one.
        include: globs over names of parameters outside the sites.

    Returns:
        The names of all weights outside the sites that are the student's own now.

    Raises:
        ConfigError: a glob matches no weight outside the sites.
        EditCompileError: the student's weights are sharded or offloaded.
    """
    model = converted_model(student)
    sites = tuple(f"{path}." for path in converted_sites(model))
    shared = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point() and not n.startswith(sites)]
    for glob in (globs := tuple(include)):
        if not any(fnmatchcase(name, glob) for name, _ in shared):
            raise ConfigError(f"{glob!r} matches no weight outside the converted sites; there are: {_some(n for n, _ in shared)}")
    found: list[Original] = model.__dict__.setdefault(ORIGINALS, [])
    done = {original.name for original in found}
    copies: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for name, parameter in shared:
        if name in done or not any(fnmatchcase(name, glob) for glob in globs):
            continue
        if is_sharded(parameter) or parameter.is_meta:
            raise EditCompileError(f"{name} is sharded or offloaded; call edit_compile.unshare before wrapping the model")
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        found.append(Original(holder, leaf, name, parameter))
        setattr(holder, leaf, copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone())))
    return [original.name for original in found]


@contextmanager
def original_weights(student: nn.Module) -> Iterator[None]:
    """Inside, the weights that `unshare` has copied are the original ones.

    Raises:
        EditCompileError: they are sharded or offloaded.
    """
    swaps = originals(student)
    own = [original.owner._parameters[original.leaf] for original in swaps]
    for original, parameter in zip(swaps, own, strict=True):
        if parameter is None or is_sharded(parameter) or parameter.is_meta:
            raise EditCompileError(
                f"{original.name} was trained, and is sharded or offloaded now: the teacher cannot take its place; "
                "run the original model as the teacher"
            )
    try:
        for original, parameter in zip(swaps, own, strict=True):
            weight = original.parameter.detach().to(parameter)  # type: ignore[arg-type]
            original.owner._parameters[original.leaf] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for original, parameter in zip(swaps, own, strict=True):
            original.owner._parameters[original.leaf] = parameter


def original_state(student: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model a student was made from."""
    sites = converted_sites(student)
    prefixes = tuple(f"{path}." for path in sites)
    state = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith(prefixes)}
    for path, site in sites.items():
        state |= {f"{path}.{name}": tensor for name, tensor in site.edit_teacher.state_dict().items()}
    return state | {original.name: original.parameter.detach().to(state[original.name]) for original in originals(student)}


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """
    Raises:
        RewriteError: a tensor holds NaN or infinity; says which.
    """
    for name, tensor in tensors:
        known = tensor.dtype in _NUMBERS and tensor.numel() and not tensor.is_meta and not is_sharded(tensor)
        if known and not all(bound.isfinite() for bound in torch.aminmax(tensor.detach())):
            raise RewriteError(f"{what}: the weight {name} holds NaN or infinity; load the weights again, or restore an earlier state")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
