"""Installing rewritten sites: the same module at the same path, with a new forward, added modules and a hidden teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.errors import RewriteError
from edit_compile.passes.site_compiler import SiteForward
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.grid import RUNTIME, Runtime

TEACHER = "_edit_teacher"
_LIVE = ("training", "forward")  # attributes that act on a converted site as on any module


class ConvertedSite(nn.Module):
    """Mixed into a site's own class, so that it stays an instance of it.

    The teacher, the original module with its original weights, is no submodule: it is in no state dict, no optimizer
    and no wrapper's shards, but it follows `.to()`.

    Raises:
        RewriteError: an attribute is set that the forward was generated from: the change would have no effect.
    """

    edit_path: str

    @property
    def edit_teacher(self) -> nn.Module:
        return self.__dict__[TEACHER]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if TEACHER in self.__dict__:
            self.edit_teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def edit_teacher_is_on(self) -> bool:
        return self.edit_runtime.teaching

    def edit_current_grid(self) -> Tensor:
        return self.edit_runtime.current_grid(self)

    def edit_teacher_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original attention. Wrappers that move or cast weights as they go (offloading, sharding) do not know the
        teacher: its weights follow what it is given.
        """
        teacher, weight = self.edit_teacher, next(_floats(self.edit_teacher), None)
        like = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
        if weight is None or like is None or torch.compiler.is_compiling() or is_sharded(weight):
            return teacher(*args, **kwargs)
        dtypes = {parameter.dtype for parameter in _floats(teacher)}
        cast = len(dtypes) == 1 and not _autocast_is_on(like.device.type)
        dtype = like.dtype if cast else weight.dtype
        if (weight.device, weight.dtype) == (like.device, dtype):
            return teacher(*args, **kwargs)
        state = {name: t.to(like.device, dtype if t.dtype in dtypes and cast else None) for name, t in _state(teacher)}
        return torch.func.functional_call(teacher, state, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if "edit_path" in self.__dict__ and not name.startswith("_") and self._has_no_effect(name, value):
            raise RewriteError(
                f"{self.edit_path} is converted: setting its {name} would have no effect, for its forward was generated from what "
                "it was at conversion; set it on the original model and convert that again"
            )
        super().__setattr__(name, value)

    def _has_no_effect(self, name: str, value: Any) -> bool:
        if isinstance(value, nn.Module | nn.Parameter):
            return not hasattr(self, name)
        return name in self.__dict__ and name not in _LIVE and self.__dict__[name] is not value and self.__dict__[name] != value

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}, linearized" if own else "linearized"


def install_site(model: nn.Module, path: str, site: SiteForward, runtime: Runtime, classes: dict[Any, type]) -> None:
    """Convert the module at `path` in place. `classes` holds one class per original class and forward."""
    module = model.get_submodule(path)
    teacher = copy.copy(module)
    own = copy.deepcopy(module)  # trained weights are the student's own; the teacher keeps sharing its
    key = (type(module), id(site.forward))
    if key not in classes:
        classes[key] = type(f"Linear{type(module).__name__}", (ConvertedSite, type(module)), {"forward": site.forward})
    own.__class__ = classes[key]
    tensor = next(_floats(module), None)
    with torch.device("meta" if tensor is not None and tensor.is_meta else "cpu"):  # no structure-only model pays for initial values
        design = site.build(path)
    setattr(own, ADDED, design.to(device=tensor.device, dtype=tensor.dtype) if tensor is not None else design)
    for parameter in _floats(own):
        parameter.requires_grad_(True)
    own.train(module.training)
    own.__dict__.update({TEACHER: teacher.requires_grad_(False), RUNTIME: runtime, "edit_path": path})
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, own)


def _autocast_is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the meta device has none


def _floats(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from (p for p in module.parameters() if p.is_floating_point())


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def converted_sites(model: nn.Module) -> dict[str, ConvertedSite]:
    """The converted sites of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ConvertedSite)}


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as under FSDP2 (whose module is not imported for the question: it loads torch's compiler)."""
    return hasattr(tensor, "device_mesh")
