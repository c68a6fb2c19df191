"""Installing rewritten sites: the same module at the same path, with a new forward, added modules and a hidden teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.config import LinearizeConfig
from edit_compile.designs import find_design
from edit_compile.grid import RUNTIME, Runtime
from edit_compile.passes.rewrite import ADDED, Additions

TEACHER = "_edit_teacher"


@dataclass(frozen=True)
class SiteForward:
    """What equal sites share: the generated forward, and what their design module is built from."""

    forward: Callable[..., Any]
    additions: Additions


class ConvertedSite(nn.Module):
    """Mixed into a site's own class, so that it stays an instance of it.

    The teacher, the original module with its original weights, is no submodule: it is in no state dict, no optimizer
    and no wrapper's shards, but it follows `.to()`.
    """

    edit_path: str

    @property
    def edit_teacher(self) -> nn.Module:
        return self.__dict__[TEACHER]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if TEACHER in self.__dict__:
            self.edit_teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}, linearized" if own else "linearized"


def install(model: nn.Module, path: str, site: SiteForward, config: LinearizeConfig, runtime: Runtime, classes: dict[Any, type]) -> None:
    """Convert the module at `path` in place. `classes` holds one class per original class and forward."""
    module = model.get_submodule(path)
    teacher = copy.copy(module)
    own = copy.deepcopy(module)  # trained weights are the student's own; the teacher keeps sharing its
    key = (type(module), id(site.forward))
    if key not in classes:
        classes[key] = type(f"Linear{type(module).__name__}", (ConvertedSite, type(module)), {"forward": site.forward})
    own.__class__ = classes[key]
    design = find_design(site.additions.design).build(site.additions, config)
    tensor = next(_floats(module), None)
    setattr(own, ADDED, design.to(device=tensor.device, dtype=tensor.dtype) if tensor is not None else design)
    own.requires_grad_(True)
    own.train(module.training)
    own.__dict__.update({TEACHER: teacher.requires_grad_(False), RUNTIME: runtime, "edit_path": path})
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, own)


def _floats(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module.parameters() if p.is_floating_point())


def converted_sites(model: nn.Module) -> dict[str, ConvertedSite]:
    """The converted sites of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ConvertedSite)}


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the same storage: moving or converting the copy leaves the original as it is."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensor.data, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = tensor.detach()
    with torch.no_grad():
        return copy.deepcopy(model, memo)
