"""What belongs to one call of a converted model: the grid of its image tokens, and whether teacher or student runs.

Nothing of it is kept on the model. While the model's forward runs, its `Frame` is in a `threading.local`; a forward is
synchronous, so that neither another thread nor another asyncio task can come between. What `with` blocks state for the calls
inside (`edit_compile.teacher`, `edit_compile.grid`) lasts longer, and is in a context variable, which tasks do not share.

Sites read the grid as the shape of a zero-stride tensor, which torch.compile keeps symbolic where integers would recompile at
every resolution. A frame in a `threading.local` of the conversion costs no graph: new threads, new frames and deep copies
of the model reuse those of the first call. Traced code must not ask whose frame it is, for torch.compile does not guard identity.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from edit_compile.designs.ops.token_spans import Grids, grids_of, image_tokens
from edit_compile.errors import GridError
from edit_compile.ir.plan import Plan
from edit_compile.student.grid_sources import grid_source
from edit_compile.torch_internals import NO_BACKWARD, TRACES_CONTEXT_VARIABLES, after_backward, backward_id, is_exporting, mark_dynamic

_OF_CALLS = ("frame", "backward")  # attributes of `Runtime.local`: the call's frame, and the backward pass it was put back for


class Outputs:
    """What the converted sites gave out in one call.

    A chain, the newest first: torch.compile would guard on the length of a list, and compile every block anew.
    """

    def __init__(self) -> None:
        self.newest: tuple[Any, Any, Any] | None = None

    def take(self) -> list[tuple[Any, Any]]:
        """Return sites and their outputs in order of execution, and forget them."""
        found, entry = [], self.newest
        while entry is not None:
            site, output, entry = entry
            found.append((site, output))
        self.newest = None
        return found[::-1]


class Frame(NamedTuple):
    """One call.

    Attributes:
        teacher: whether the original attention runs.
        grids: the image tokens' grids as the shapes of tensors without content, in the order of the grid source; where several
            images are in the sequence, a tuple of them. None for a teacher.
        outputs: where sites leave what they give out, if that was asked for.
        students: paths of sites that run as converted although the others are the teacher.
    """

    teacher: bool
    grids: tuple[Grids, ...]
    outputs: Outputs | None
    students: frozenset[str] = frozenset()


class Statement:
    """What a `with` block says of the calls inside, until it is left.

    Attributes:
        teacher: the original attention runs.
        original: given the model, the one whose forward runs instead.
        grid: the grid of image tokens, as the shape of a tensor; of several images, of each.
        outputs: where sites leave what they give out.
        students: paths of sites that run as converted although `teacher` holds.
    """

    def __init__(
        self,
        teacher: bool = False,
        original: Callable[[nn.Module], nn.Module] | None = None,
        grid: tuple[Tensor, ...] | None = None,
        outputs: Outputs | None = None,
        students: frozenset[str] = frozenset(),
    ) -> None:
        self.teacher, self.original, self.grid, self.outputs, self.students = teacher, original, grid, outputs, students
        self.holds = True


class _Local(threading.local):
    """What a thread holds, from its first look on: torch.compile guards on whether the attribute is there, and would compile anew."""

    def __init__(self) -> None:
        self.frame: Frame | None = None


class Runtime:
    """How the calls of one converted model find their grid and mode; its sites hold it too."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.source = grid_source(plan)
        self.local = _Local()
        self.statements: ContextVar[tuple[Statement, ...]] = ContextVar("edit_statements", default=())
        disable: Any = torch.compiler.disable
        self._grids_eagerly: Callable[..., tuple[Grids, ...]] = disable(self._grids, reason=self.source.untraceable_reason)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """Copy a runtime: what holds for the original here and now, as while it is captured, holds for the copy."""
        copied = Runtime(self.plan)
        if self.statements.get():
            copied._state(self.statements.get())
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Runtime, (self.plan,)

    @contextmanager
    def stating(self, statement: Statement) -> Iterator[None]:
        """Make a statement hold inside, for this context's calls: its own thread and asyncio task, and tasks begun inside.

        Blocks may be left in any order: each takes back its own statement, wherever it is left.
        """
        self._state((*self.statements.get(), statement))
        try:
            yield
        finally:
            statement.holds = False
            self._state(tuple(other for other in self.statements.get() if other is not statement))

    def _state(self, statements: tuple[Statement, ...]) -> None:
        self.statements.set(statements)
        self.local.statements = statements

    def stated(self) -> Statement:
        """Sum up what holds here and now; of two blocks inside each other, the inner one's word."""
        found = Statement()
        traced = torch.compiler.is_compiling() and not TRACES_CONTEXT_VARIABLES
        for statement in getattr(self.local, "statements", ()) if traced else self.statements.get():
            if statement.holds:
                found.students = statement.students if statement.teacher else found.students
                found.teacher = found.teacher or statement.teacher
                found.original = statement.original if found.original is None else found.original
                found.grid = found.grid if statement.grid is None else statement.grid
                found.outputs = found.outputs if statement.outputs is None else statement.outputs
        return found

    def run(
        self,
        forward: Callable[..., Any],
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        original: Callable[[nn.Module], nn.Module | None],
    ) -> Any:
        """Run a converted model's original forward, with its own frame around it.

        Args:
            original: gives the model that runs as the teacher below `min_tokens`, if there is one.

        Raises:
            GridError: the grid is unknown, or cannot be that of these inputs.
        """
        stated = self.stated()
        grids = () if stated.teacher and not stated.students else self._measured(stated.grid, model, args, kwargs)
        frame = Frame(stated.teacher, grids, stated.outputs, stated.students)
        if stated.teacher and stated.original is not None:
            model = stated.original(model)
        elif not stated.teacher and self._is_below_min_tokens(grids) and (below := original(model)) is not None:
            model, frame = below, Frame(True, (), stated.outputs)
        before, backward = self.frame(), self._set_backward(NO_BACKWARD)
        self.local.frame = frame
        try:
            output = forward(model, *args, **kwargs)
        finally:
            self._set_backward(backward)
            self.local.frame = before
        self.restore_for_recompute(output, frame)
        return output

    def _is_below_min_tokens(self, grids: tuple[Grids, ...]) -> bool:
        """Tell whether a call's image tokens are fewer than pay for what conversion adds.

        Not where gradients are recorded, for they are to train what was added; nor in an exported graph, which holds for all sizes.
        """
        if not self.plan.min_tokens or torch.is_grad_enabled() or is_exporting():
            return False
        base = next((grid for index, grid in enumerate(grids) if self.source.is_base(index)), grids[0])
        return image_tokens(base) < self.plan.min_tokens

    def _set_backward(self, number: int) -> int:
        """Set the backward pass that the frame is for, and return the one before; one that is over has failed."""
        if torch.compiler.is_compiling():
            return NO_BACKWARD
        before: int = getattr(self.local, "backward", NO_BACKWARD)
        self.local.backward = number
        return before if before == backward_id() else NO_BACKWARD

    def frame(self) -> Frame | None:
        """Tell the frame of the call that is running in this thread; not one of a backward pass that failed, which nothing took back."""
        frame = self.local.frame
        if frame is None or torch.compiler.is_compiling():
            return frame
        return frame if getattr(self.local, "backward", NO_BACKWARD) in (NO_BACKWARD, backward_id()) else None

    def recomputes(self) -> bool:
        """Tell whether the frame of this thread was put back for a backward pass."""
        return getattr(self.local, "backward", NO_BACKWARD) != NO_BACKWARD

    def _measured(
        self, stated: tuple[Tensor, ...] | None, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Grids, ...]:
        """torch.compile may meet this in two ways: traced with the model, it belongs to the graph; called on its own, after a graph
        break, it must run eagerly, or its sizes would be constants. A grid that no graph can measure is measured eagerly in either
        case, at the price of a graph break.
        """
        traceable = stated is not None or self.source.untraceable_reason is None
        traced = is_exporting() or (torch.compiler.is_compiling() and traceable)
        return (self._grids if traced else self._grids_eagerly)(stated, model, args, kwargs)

    def _grids(
        self, stated: tuple[Tensor, ...] | None, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Grids, ...]:
        like = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if like is None:
            raise GridError(f"{type(model).__name__} was called without any tensor")
        sizes = self.source.sizes(model, args, kwargs, None if stated is None else grids_of(stated))
        return tuple(_one_or_several(tuple(as_grid(grid, like.device) for grid in images)) for images in sizes)

    def grid_of(self, path: str, index: int) -> Grids:
        """Tell a site its grid in this call; the grids of several images.

        Raises:
            GridError: no call of the model is running.
        """
        frame = self.frame()
        if frame is not None:
            return frame.grids[index]
        stated = self.stated().grid
        if stated is not None and self.source.is_base(index):
            return _one_or_several(stated)
        raise GridError(
            f"{path} ran outside the model's forward, where the grid of its image tokens is not known; "
            "call the whole model, or wrap the call in edit_compile.grid(model, height, width)"
        )

    def teacher_is_on(self, path: str) -> bool:
        """Tell a site whether its original attention runs in this call.

        Compiled code must not read the path unless it has to: blocks that differ in it would have a graph each.
        """
        frame = self.frame()
        mode = self.stated() if frame is None else frame
        return mode.teacher and not (mode.students and path in mode.students)

    def keep(self, site: nn.Module, output: Any) -> None:
        """Keep a site's output, if the call's outputs were asked for."""
        frame = self.frame()
        if frame is not None and frame.outputs is not None:
            frame.outputs.newest = (site, output, frame.outputs.newest)

    def restore_for_recompute(self, output: Any, frame: Frame) -> None:
        """Let a backward pass that reaches a module's output run checkpointed modules again in the frame of their own forward.

        Whichever gradient comes first puts the frame back, for its backward pass only. What sites give out then is not kept.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        local, (teacher, grids, outputs, students) = self.local, frame
        asked = outputs is not None  # compiled code differs by it. Tensors must not be referred to from a hook: it lives as long as they do

        def restore(gradient: Tensor) -> None:
            backward, here = backward_id(), vars(local)  # of this thread; backward may end in another one
            if here.get("backward", NO_BACKWARD) != backward:
                after_backward(functools.partial(_put_back, here, {name: here[name] for name in _OF_CALLS if name in here}))
                here["backward"] = backward
            here["frame"] = Frame(teacher, grids, Outputs() if asked else None, students)

        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(restore)  # type: ignore[no-untyped-call]


class RestoreForRecompute:
    """The forward hook of a module that holds a converted site: a loss may start from its output, or a checkpoint end there."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        frame = self.runtime.frame()
        if frame is None:
            return
        if frame.outputs is not None and self.runtime.recomputes():
            frame.outputs.newest = None  # kept in the forward already
        self.runtime.restore_for_recompute(output, frame)


def _put_back(here: dict[str, Any], before: dict[str, Any]) -> None:
    for name in _OF_CALLS:
        here.pop(name, None)
    here.update(before)


def _one_or_several(grids: tuple[Tensor, ...]) -> Grids:
    return grids[0] if len(grids) == 1 else grids


def as_grid(sizes: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Make a grid: its sizes are the shape of a tensor without content."""
    shape = torch.empty((), device=device).expand(sizes)
    if not torch.compiler.is_compiling():
        mark_dynamic(shape)
    return shape
