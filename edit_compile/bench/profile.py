"""Which part of a forward takes which share of its time: by kinds of work, and by the modules of sites if blocks are not compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

OTHER, ALL = "outside the sites", "the whole model"
INSIDE = "in a site, outside its modules"
_MARK = "part: "
_CALLS = 3
_KINDS = (  # in the names of operations and kernels, the first that fits
    ("attention", ("scaled_dot_product", "flash", "fmha", "softmax")),
    ("convolution", ("conv", "dgrad", "fprop")),
    ("product", ("mm", "gemm", "linear", "matmul", "cutlass", "einsum")),
    ("normalisation", ("norm",)),
    ("copy", ("copy", "clone", "cat", "contiguous", "memcpy", "permute", "transpose")),
)


class Share(NamedTuple):
    """A share of a forward's time, between 0 and 1."""

    part: str
    kind: str
    share: float


def kind_of(operation: str) -> str:
    """Say what kind of work an operation or a kernel does, by its name; what is fused or pointwise is "pointwise"."""
    name = operation.lower()
    return next((kind for kind, words in _KINDS if any(word in name for word in words)), "pointwise")


@torch.no_grad()
def profile_shares(call: Callable[[], Any], model: nn.Module, sites: Mapping[str, str], device: torch.device) -> tuple[Share, ...]:
    """Profile some calls of a model, after a first one.

    Args:
        sites: the paths of modules, with what their part is called; of compiled blocks none, for there are no modules in their graphs.

    Returns:
        The shares of parts and kinds of work, the largest first.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    call()
    with _marked(model, sites), profile(activities=activities) as found:
        for _ in range(_CALLS):
            call()
    spent: Counter[tuple[str, str]] = Counter()
    by_kernel = device.type == "cuda" and not sites  # else by the operations that began them, which know their modules
    for event in found.events() or ():
        if (event.device_type.name == "CPU") == by_kernel or (by_kernel and event.is_user_annotation):
            continue  # the time of kernels is theirs and, once more, their operation's
        time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if time > 0 and not event.name.startswith((_MARK, "ProfilerStep")):
            spent[_part_of(event) if sites else ALL, kind_of(event.name)] += time
    total = sum(spent.values()) or 1
    return tuple(Share(part, kind, time / total) for (part, kind), time in spent.most_common())


def _part_of(event: Any) -> str:
    while event is not None and not event.name.startswith(_MARK):
        event = event.cpu_parent
    return OTHER if event is None else str(event.name.removeprefix(_MARK))


@contextmanager
def _marked(model: nn.Module, sites: Mapping[str, str]) -> Iterator[None]:
    """Have each module's calls inside recorded under the name of its part."""
    hooks, open_marks = [], list[Any]()

    def begin(name: str) -> Any:
        def hook(*_: Any) -> None:
            mark: Any = record_function(f"{_MARK}{name}")
            mark.__enter__()
            open_marks.append(mark)

        return hook

    def end(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    try:
        for path, name in sites.items():
            module = model.get_submodule(path)
            hooks += [module.register_forward_pre_hook(begin(name)), module.register_forward_hook(end)]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def parts_of_sites(model: nn.Module, sites: list[str]) -> dict[str, str]:
    """Name the parts of sites: each site's modules that hold no others, by their paths in it, alike for all sites."""
    found = {}
    for site in sites:
        module = model.get_submodule(site)
        found[site] = INSIDE
        found |= {f"{site}.{path}": path for path, inner in module.named_modules() if path and not any(inner.children())}
    return found
