"""What a model's own source has at run time, where this package is not: grids reach the sites, and nothing else is kept of a call.

`standalone` copies it into the files that it writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.designs.ops.token_spans import Grids
from edit_compile.errors import GridError
from edit_compile.passes.site_graph import ADDED
from edit_compile.student.grid_sources import GridSource

_calls = threading.local()  # the grids of this thread's call


class LinearSite(nn.Module):
    """Mixed into the class of a module whose attention was made linear.

    Attributes:
        edit_path: where it is in the model.
        edit_grid_index: on which of the model's grids.
    """

    edit_path: str
    edit_grid_index: int

    def edit_current_grid(self) -> Grids:
        """Return the grid of this call's image tokens, as the shape of a tensor; of several images, of each.

        Raises:
            GridError: no call of the model is running.
        """
        grids: tuple[Grids, ...] | None = getattr(_calls, "grids", None)
        if grids is None:
            raise GridError(f"{self.edit_path} ran outside the model's forward, where the grid of its image tokens is not known")
        return grids[self.edit_grid_index]


def make_linear(model: nn.Module, sites: Iterable[tuple[str, type[nn.Module], Callable[[], nn.Module], int]]) -> None:
    """Make modules of a model linear: each gets another class, and what that class adds.

    Args:
        sites: of each, its path, its class, what makes the added module, and on which of the model's grids it is.
    """
    for path, kind, make, grid in sites:
        site = model.get_submodule(path)
        site.__class__ = kind
        setattr(site, ADDED, make())
        site.__dict__ |= {"edit_path": path, "edit_grid_index": grid}


def call_with_grids(
    source: GridSource, model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run a model's forward, and let its sites know the grids of the image tokens.

    Raises:
        GridError: the inputs do not tell them.
    """
    like = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if like is None:
        raise GridError(f"{type(model).__name__} was called without any tensor")
    shapes = [[torch.empty((), device=like.device).expand(each) for each in images] for images in source.sizes(model, args, kwargs, None)]
    before = getattr(_calls, "grids", None)
    _calls.grids = tuple(images[0] if len(images) == 1 else tuple(images) for images in shapes)
    try:
        return forward(*args, **kwargs)
    finally:
        _calls.grids = before


def assembled(kind: type[nn.Module], **attributes: Any) -> nn.Module:
    """Make a module of its attributes, parameters and submodules, without its constructor; values come from the file of weights."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module
