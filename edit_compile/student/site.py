"""Converted sites: the same module at the same path, with a generated forward, a design's module and a hidden teacher."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.designs.ops.token_spans import Grids
from edit_compile.errors import RewriteError
from edit_compile.passes.site_compiler import SiteForward
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.handle import Conversion, Generated
from edit_compile.torch_internals import attention_is_changed, compile_again, is_compiled_module, is_sharded, without_hooks

TEACHER = "_edit_teacher"
_SETTABLE = ("training", "forward")  # attributes that act on a converted site as on any module


class ConvertedSite(Generated):
    """Mixed into a site's own class, so that it stays an instance of it.

    The teacher, the original module with its original weights, is not a submodule: it is in no state dict, no optimizer
    and no wrapper's shards, but it follows `.to()`.

    Attributes:
        edit_path: where it is in the model.
        edit_grid_index: on which of the model's grids.
        edit_names: of the attributes and modules that it had at conversion.
        edit_called: of the modules in it that its forward calls; others are part of it.

    Raises:
        RewriteError: an attribute is set that the forward was generated from: the change would have no effect.
    """

    edit_path: str
    edit_grid_index: int
    edit_names: frozenset[str]
    edit_called: frozenset[str]

    @property
    def edit_teacher(self) -> nn.Module:
        teacher: nn.Module = self.__dict__[TEACHER]
        return teacher

    def edit_teacher_is_on(self) -> bool:
        """Tell the generated forward whether the original attention runs in this call."""
        return self.edit_conversion.runtime.teacher_is_on(self.edit_path)

    def edit_current_grid(self) -> Grids:
        """Tell the generated forward the grid of this call, as the shape of a tensor; of several images, of each.

        Raises:
            GridError: no call of the model is running.
        """
        return self.edit_conversion.runtime.grid_of(self.edit_path, self.edit_grid_index)

    def edit_teacher_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original attention. Wrappers that move or cast weights as they go (offloading, sharding) do not know the
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
        moved: dict[int, Any] = {}  # of a copy: other calls may use the teacher's weights as they are
        for tensor in (*teacher.parameters(), *teacher.buffers()):
            own = tensor.detach().to(like.device, dtype if tensor.dtype in dtypes and cast else None)
            moved[id(tensor)] = nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own
        return copy.deepcopy(teacher, moved)(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if TEACHER in self.__dict__:
            self.edit_teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if "edit_path" in self.__dict__ and not name.startswith("_") and self._has_no_effect(name, value):
            raise RewriteError(
                f"{self.edit_path} is converted: setting its {name} would have no effect, for its forward was generated from what "
                "it was at conversion; set it on the original model and convert that again"
            )
        super().__setattr__(name, value)

    def _has_no_effect(self, name: str, value: Any) -> bool:
        if isinstance(value, Tensor):  # the forward reads those that it has
            return not hasattr(self, name)
        if isinstance(value, nn.Module):
            is_called = any(f"{path}.".startswith(f"{name}.") for path in self.edit_called)
            return not is_called and type(value) is not type(self._modules.get(name))
        now = self.__dict__.get(name)
        return name in self.edit_names and name not in _SETTABLE and now is not value and now != value

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}, linearized" if own else "linearized"


def class_of_site(original: type[nn.Module], forward: Callable[..., Any], *, is_attention: bool) -> type[nn.Module]:
    """Make the class of the sites that share a forward: torch.compile takes its graphs for all of them.

    What it has in the place of attention does not follow what changes softmax attention from outside, which is refused.
    """

    @functools.wraps(forward)
    def kept(site: ConvertedSite, *args: Any, **kwargs: Any) -> Any:
        if is_attention and attention_is_changed() and not site.edit_teacher_is_on():
            raise RewriteError(
                f"{site.edit_path} is converted: what changes the result of scaled_dot_product_attention here, like perturbed-attention "
                "guidance, would have no effect on it; leave that out, or call the model inside edit_compile.teacher"
            )
        output = forward(site, *args, **kwargs)
        site.edit_conversion.runtime.keep(site, output)
        return output

    names: dict[str, Any] = {"forward": kept, "edit_called": getattr(forward, "called", frozenset())}
    return type(f"Linear{original.__name__}", (ConvertedSite, original), names)


def convert_site(
    model: nn.Module,
    path: str,
    compiled: SiteForward,
    cls: type[nn.Module],
    conversion: Conversion,
    grid: int,
    read_only: bool = False,
) -> None:
    """Put a converted site in the place of the module at a path.

    Args:
        cls: see `class_of_site`.
        grid: the site's `edit_grid_index`.
        read_only: its own weights are in the teacher's memory, and are not written to until they are sharded.
    """
    module = model.get_submodule(path)
    teacher = without_hooks(module)  # which run around the site's own forward
    same = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()} if read_only else {}
    own = copy.deepcopy(module, same)  # trained weights are the student's own; the teacher keeps sharing its
    own.__class__ = cls
    tensor = next(_floats(module), None)
    with torch.device("meta" if tensor is not None and tensor.is_meta else "cpu"):  # a structure without weights pays for no initial values
        design = compiled.build(path)
    dtype = None if tensor is None or read_only else tensor.dtype  # files may be less precise than what is made of them
    setattr(own, ADDED, design.to(device=tensor.device, dtype=dtype) if tensor is not None else design)
    for parameter in _floats(own):
        parameter.requires_grad_(True)
    own.train(module.training)
    own.__dict__["edit_names"] = frozenset((*vars(own), *own._modules))
    own.__dict__ |= {TEACHER: teacher.requires_grad_(False), "edit_conversion": conversion, "edit_grid_index": grid, "edit_path": path}
    owner, _, name = path.rpartition(".")
    holder = model.get_submodule(owner)
    setattr(holder, name, own)
    if is_compiled_module(holder):
        compile_again(holder)


def converted_sites(model: nn.Module) -> dict[str, ConvertedSite]:
    """List the converted sites of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ConvertedSite)}


def _autocast_is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the meta device has none


def _floats(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from (p for p in module.parameters() if p.is_floating_point())
