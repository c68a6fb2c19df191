"""How long a forward should take, by what it does and how fast a machine is. Nothing is run but the structure, on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from edit_compile.bench.roofline import Roofline
from edit_compile.designs.ops.parts import Part, Softmax
from edit_compile.passes.native_attention import native_attention
from edit_compile.torch_internals import attention_replaced

FUSED = 3 / 4  # of what operations read and write one by one, where torch.compile fuses them: fits benchmarks/results/2026-11-26-floor.md


@dataclass
class Traffic:
    """What a forward does apart from attention, and its attention.

    Attributes:
        flops: of products and convolutions.
        bytes: that all other operations read and write.
        operations: that do something.
        attention: the softmax attention of each site, by path; under "" what is in none of them.
    """

    flops: int = 0
    bytes: int = 0
    operations: int = 0
    attention: dict[str, list[Softmax]] = field(default_factory=dict)

    def rest(self, rates: Roofline, *, compiled: bool) -> float:
        """Predict the seconds of all that is not attention at a site."""
        others = sum(map(rates.seconds, self.attention.get("", ())))
        if compiled:
            return self.flops / rates.product + FUSED * self.bytes / rates.bandwidth + others
        return self.flops / rates.product + self.bytes / rates.bandwidth + self.operations * rates.overhead + others


@dataclass(frozen=True)
class Prediction:
    """Seconds of one forward: of all but attention at rewritten sites, and of that at each of them, before and after."""

    rest: float
    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def seconds_before(self) -> float:
        return self.rest + sum(self.before.values())

    @property
    def seconds_after(self) -> float:
        return self.rest + sum(self.after.values())


def predict(traffic: Traffic, parts: Mapping[str, tuple[Part, ...]], rates: Roofline, *, compiled: bool, batch: int = 1) -> Prediction:
    """Predict a forward of a model before and after its conversion, a sample of it.

    Args:
        traffic: of the model before.
        parts: what the designs have in the place of attention, and what they add, by site, of a sample.
        batch: samples in the forward.
    """
    before = {path: sum(map(rates.seconds, traffic.attention.get(path, ()))) / batch for path in parts}
    after = {path: sum(map(rates.seconds, found)) for path, found in parts.items()}
    return Prediction(traffic.rest(rates, compiled=compiled) / batch, before, after)


@torch.no_grad()
def count_traffic(model: nn.Module, inputs: Mapping[str, Any], sites: Sequence[str]) -> Traffic:
    """Count what a forward of a structure does, all on the meta device.

    Args:
        sites: paths of modules whose attention is told apart.
    """
    found = Traffic()
    with native_attention(model), _attention_noted(model, sites, found), FlopCounterMode(display=False) as counter, _Bytes(found):
        model(**inputs)
    found.flops = counter.get_total_flops()
    return found


class _Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Add up what operations read and write that make new tensors, but for products and convolutions."""

    def __init__(self, found: Traffic) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given, new = (list(filter(lambda leaf: isinstance(leaf, Tensor), pytree.tree_leaves(tree))) for tree in ((args, kwargs), made))
        memory = {tensor.untyped_storage()._cdata for tensor in given}
        name = str(func)
        if "empty" in name or all(tensor.untyped_storage()._cdata in memory for tensor in new):
            return made
        self.found.operations += 1
        if not any(word in name for word in ("mm", "convolution")):
            self.found.bytes += sum(tensor.numel() * tensor.itemsize for tensor in (*given, *new))
        return made


@contextmanager
def _attention_noted(model: nn.Module, sites: Sequence[str], found: Traffic) -> Iterator[None]:
    """Note softmax attention on the meta device instead of computing it inside; elsewhere, as in other threads, it is computed."""
    inside = [""]

    def attention(own: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta:
            return own(query, key, value, *args, **kwargs)
        *batch, queries, channels = query.shape
        part = Softmax(queries, key.shape[-2], channels, value.shape[-1], math.prod(batch))
        found.attention.setdefault(inside[-1], []).append(part)
        return query.new_empty(*batch, queries, value.shape[-1])

    def entering(path: str) -> Callable[..., None]:
        return lambda *_: inside.append(path)

    def leaving(*_: Any) -> None:
        inside.pop()

    hooks = []
    for path in sites:
        module = model.get_submodule(path)
        hooks += [module.register_forward_pre_hook(entering(path)), module.register_forward_hook(leaving)]
    try:
        with attention_replaced(attention):
            yield
    finally:
        for hook in hooks:
            hook.remove()
