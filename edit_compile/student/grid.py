"""Publishing the image tokens' grid to the sites, for the duration of a forward.

The model's forward pre-hook works out (h, w) from its inputs; sites read it as the shape of a zero-stride tensor,
which torch.compile keeps symbolic where integers on a module would recompile at every resolution. No globals.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.errors import EditCompileError, GridError
from edit_compile.student.grid_sources import Source, measure_from

RUNTIME = "edit_runtime"


class Runtime:
    """What a converted model and its sites share: the forward's grid, whether the teacher is on, and whether sites keep their outputs.

    Attributes:
        grid: of the forward that runs, as the shape of a tensor.
        given: what the caller stated, in the same form.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.grid: Tensor | None = None
        self.given: Tensor | None = None
        self.teaching = False
        self.recording = False
        self.measure = measure_from(source)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        copied = Runtime(self.source)
        copied.given, copied.teaching = self.given, self.teaching
        memo[id(self)] = copied
        return copied

    def current_grid(self, site: nn.Module) -> Tensor:
        if self.grid is not None:
            return self.grid
        if self.given is not None:
            return self.given
        raise GridError(
            f"{site.edit_path} ran outside the model's forward, where the grid of its image tokens is not known; "
            "call the whole model, or wrap the call in edit_compile.grid(model, height, width)"
        )


def publish_with(model: nn.Module, runtime: Runtime, paths: Iterable[str]) -> None:
    """Let the model's forward publish its grid to the sites at `paths`."""
    from torch._dynamo.eval_frame import skip_code  # capture has loaded it; importing this package must not

    skip_code(_Publish.__call__.__code__)
    setattr(model, RUNTIME, runtime)
    for holder in sorted({".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)}):
        model.get_submodule(holder).register_forward_hook(_Republish(runtime))
    model.register_forward_pre_hook(_Publish(runtime), with_kwargs=True)
    model.register_forward_hook(_Withdraw(runtime))


class _Publish:
    """The pre-hook. torch.compile may meet it in two ways: traced as part of an outer model, it belongs to the graph;
    called on its own before the compiled forward, it must run eagerly, or its sizes would be constants of a graph.
    A grid that no graph can measure is measured eagerly in either case, at the price of a graph break.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.eagerly: Callable[..., None] = torch.compiler.disable(_publish, reason=runtime.measure.obstacle)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        traceable = self.runtime.given is not None or self.runtime.measure.obstacle is None
        if torch.compiler.is_exporting() or (torch.compiler.is_compiling() and traceable):
            _publish(self.runtime, model, args, kwargs)
        else:
            self.eagerly(self.runtime, model, args, kwargs)


def _publish(runtime: Runtime, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if runtime.teaching:
        return
    like = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if like is None:
        raise GridError(f"{type(model).__name__} was called without any tensor")
    if runtime.given is None:
        height, width = runtime.measure(model, args, kwargs)
    else:
        height, width = runtime.given.shape
        if not torch.compiler.is_compiling():
            runtime.measure.check(height, width, model, args, kwargs)
    runtime.grid = as_grid(height, width, like)


class _Republish:
    """After a module's forward. Checkpointed modules run again in backward and need the grid of their own forward then:
    whichever gradient reaches the module's output first publishes it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        runtime, grid = self.runtime, self.runtime.grid
        if grid is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return

        def publish(gradient: Tensor) -> None:
            runtime.grid = grid

        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(publish)


class _Withdraw(_Republish):
    """After the model's forward the grid goes."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        super().__call__(module, args, output)
        self.runtime.grid = None


def as_grid(height: int, width: int, like: Tensor) -> Tensor:
    """A grid as the shape of a tensor without content."""
    shape = like.new_empty((1, 1)).detach().expand(height, width)
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not torch.compiler.is_compiling():
        dynamo.maybe_mark_dynamic(shape, [0, 1])  # symbolic from the first graph on
    return shape


def converted_model(model: Any) -> nn.Module:
    """The converted model itself, given it, a pipeline with it, or a wrapper around it (DDP, torch.compile).

    Raises:
        EditCompileError: there is none.
    """
    for found in (model, *(getattr(model, name, None) for name in ("transformer", "module", "_orig_mod"))):
        if isinstance(found, nn.Module) and isinstance(found.__dict__.get(RUNTIME), Runtime):
            return found
    raise EditCompileError(f"{type(model).__name__} is not converted; edit_compile.linearize(model) gives a converted copy")


def runtime_of(model: Any) -> Runtime:
    """The runtime of `converted_model(model)`."""
    return converted_model(model).__dict__[RUNTIME]


@contextmanager
def grid(model: Any, height: int, width: int) -> Iterator[None]:
    """State the grid of image tokens for the forwards inside, where it does not follow from the inputs or must not be
    read from them (position ids under torch.compile and torch.export).

    Args:
        model: a converted model, or a pipeline with one.
        height, width: in image tokens.

    Raises:
        GridError: not a grid, or (in the forward) one that the model's inputs cannot have.
    """
    if not all(isinstance(size, int) and size > 0 for size in (height, width)):
        raise GridError(f"a grid is two positive whole numbers of image tokens, not {height!r} x {width!r}")
    runtime = runtime_of(model)
    before = runtime.given
    runtime.given = as_grid(height, width, torch.empty(0))
    try:
        yield
    finally:
        runtime.given = before
