"""Counting the FLOPs of one forward on the meta device: no weights, no memory.

A FLOP is a multiplication or an addition in a matrix product, a convolution or attention; pointwise work is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edit_compile.errors import GridError
from edit_compile.passes.native_attention import native_attention
from edit_compile.passes.structural_hash import structural_hash


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward.

    Attributes:
        total: of the whole model.
        parts: of each submodule that was asked for, by path.
        ran: by the path of each of them, of which it is the number: another one, if that ran in its place.
    """

    total: int
    parts: Mapping[str, int]
    ran: Mapping[str, str] = field(compare=False)


@contextmanager
def telling_of_too_many_tokens(size: str) -> Iterator[None]:
    """Raise GridError where a size in words has more numbers in a tensor than torch can count, inside."""
    try:
        yield
    except RuntimeError as error:
        if "size calculation overflowed" not in str(error):
            raise
        raise GridError(f"{size} px is too large: its attention has more numbers than fit into 64 bits") from error


def block_keys(model: nn.Module, blocks: Iterable[str]) -> dict[str, Any]:
    """Return a key for each of the submodules at `blocks`, which equal ones share: for several counts, it is made once."""
    return {path: structural_hash(model.get_submodule(path)) for path in blocks}


def count_flops(
    model: nn.Module, inputs: Mapping[str, Any], paths: Iterable[str] = (), blocks: Mapping[str, Any] | Iterable[str] = ()
) -> FlopCount:
    """Count the FLOPs of `model(**inputs)`, all on the meta device.

    diffusers' native attention is counted whatever backend is set: the others hide their products.

    Args:
        paths: submodules to count one by one.
        blocks: submodules of which equal ones, called with equal shapes, run only once; or what `block_keys` gives for them.
    """
    keys = blocks if isinstance(blocks, Mapping) else block_keys(model, blocks)
    with _equal_blocks_run_once(model, keys) as equal, torch.no_grad(), native_attention(model), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts = counter.get_flop_counts()

    def counted(path: str) -> int:
        return sum(counts.get(f"{type(model).__name__}.{path}", {}).values())

    total = counter.get_total_flops() + sum(counted(first) for first in equal.values())
    ran = {path: _in_first(path, equal) for path in paths}
    return FlopCount(total, {path: counted(first) for path, first in ran.items()}, ran)


def _in_first(path: str, equal: Mapping[str, str]) -> str:
    """Find, for a path in a block that was skipped, the same path in the block that ran."""
    block = next((block for block in equal if path == block or path.startswith(f"{block}.")), "")
    return equal[block] + path[len(block) :] if block else path


@contextmanager
def _equal_blocks_run_once(model: nn.Module, keys: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Inside, a block equal to one that ran returns that one's output. Yields the skipped blocks, each with the one that ran."""
    equal: dict[str, str] = {}
    seen: dict[Any, tuple[str, Any]] = {}
    modules = {path: model.get_submodule(path) for path in keys}

    def run(path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = (keys[path], repr(pytree.tree_map(_shape, (args, kwargs))))
        if key in seen:
            equal[path] = seen[key][0]
        else:
            seen[key] = (path, forward(*args, **kwargs))
        return seen[key][1]

    own = {path: vars(module).get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.forward = partial(run, path, module.forward)
        yield equal
    finally:
        for path, module in modules.items():
            del module.forward
            vars(module).update({"forward": own[path]} if own[path] is not None else {})


def _shape(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
