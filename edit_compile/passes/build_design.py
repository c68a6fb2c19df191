"""The pass that has a design judge a site and make its module. A design is somebody else's code: whatever it gets wrong is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from edit_compile.designs.base import Design, Tap, Verdict, thinned_grid
from edit_compile.errors import ConfigError
from edit_compile.passes.capture import PROBE_DTYPE, meta_copy, what_failed
from edit_compile.passes.find_attention import Attention
from edit_compile.passes.graph_walk import between
from edit_compile.passes.op_traits import effect_on_tokens, first_token_mixing_node
from edit_compile.passes.rewrite import image_linear
from edit_compile.passes.site_graph import Declined, Refused, SiteGraph, example_grid, is_image

_EXAMPLE_BATCH = 2


def build_design(site: SiteGraph) -> int:
    """Ask the chosen design whether it takes the site, and make its module on the meta device; counts its taps.

    Raises:
        Refused: it does not, it wants a tap at a place that this site does not have, or its code fails.
    """
    design, options = site.choice.design, site.choice.options
    assert design is not None
    with design_code(site, "accepts"):
        verdict = design.accepts(site.facts, options)
    if not (isinstance(verdict, Verdict) and isinstance(verdict.reason, str)):
        raise Refused(f"`accepts` of the design {design.name!r} returns {verdict!r}, not a Verdict(ok, reason)")
    site.verdict = " ".join(verdict.reason.split())
    if not verdict.ok:
        raise Declined(site.verdict, site.core.node if isinstance(site.core, Attention) else None)
    with design_code(site, "__init__"), torch.device("meta"):
        built = design(site.facts, options)
        modules = set(built.modules()) - {built}
    with design_code(site, "taps"):
        site.taps = tuple(built.taps())
    for tap in site.taps:
        _check_tap(tap, modules, site)
    strides = {tap.stride for tap in site.taps if tap.stride} | ({()} if len([tap for tap in site.taps if tap.stride]) == 1 else set())
    if len({tap.where for tap in site.taps}) < len(site.taps) or len(strides) > 1:
        raise Refused(f"the design {design.name!r} has two taps at one place, or thins keys and values differently")
    for tap in site.taps:
        with design_code(site, f"tap {tap.where!r}"):
            _check_result(tap, site)
    site.design = built
    return len(site.taps)


@contextmanager
def design_code(site: SiteGraph, method: str) -> Iterator[None]:
    """Turn what a design's code raises inside into a refusal that names the design, the method and the line.

    A place that the site does not have, looked up in `Site.channels`, is refused for the reason that the site gives.
    """
    assert site.choice.design is not None
    try:
        yield
    except (Refused, ConfigError) as error:
        raise error if isinstance(error, Refused) else Refused(str(error)) from error
    except Exception as error:
        if isinstance(error, KeyError) and error.args and error.args[0] in site.facts.missing:
            raise Refused(site.facts.missing[error.args[0]]) from error
        raise Refused(f"`{method}` of the design {site.choice.design.name!r} fails: {what_failed(error)}") from error


def _check_tap(tap: Tap, modules: set[nn.Module], site: SiteGraph) -> None:
    if not isinstance(tap, Tap):
        raise Refused(f"`taps` gives {type(tap).__name__}, not a Tap(where, module)")
    place = site.places.get(tap.where)
    if not isinstance(place, fx.Node):
        raise Refused(place.reason if place is not None else f"a site of kind {site.plan.kind} has no place {tap.where!r}")
    if tap.module not in modules:
        raise Refused(f"the module of the tap {tap.where!r} is not one of the design's submodules; assign it to an attribute in __init__")
    if tap.form not in ("image", "tokens"):
        raise Refused(f"the tap {tap.where!r} has form={tap.form!r}; it is 'image' or 'tokens'")
    if tap.stride != ():
        _check_stride(tap, site)


def _check_stride(tap: Tap, site: SiteGraph) -> None:
    grid = example_grid(site.plan)
    steps = tap.stride if isinstance(tap.stride, tuple) else ()
    fits = len(steps) == len(grid) or (site.plan.grid is None and len(steps) in (2, 3))
    if not fits or not all(isinstance(step, int) and step > 0 for step in steps):
        raise Refused(f"the tap {tap.where!r} has stride={tap.stride!r}; it is a step of 1 or more for each of {len(grid)} dimensions")
    if not tap.where.endswith(("_key", "_value")):
        raise Refused(f"the tap {tap.where!r} thins tokens: only keys and values can be thinned")
    attention = site.core
    assert isinstance(attention, Attention), "a feed-forward network has no keys"
    last = attention.key if tap.where.endswith("_key") else attention.value
    projection = image_linear(last, site)
    mixing = first_token_mixing_node([n for n in between(projection, last) if n is not projection], site.axes, is_image)
    if mixing is not None:
        raise Refused(f"{site.plan.path}: {effect_on_tokens(mixing)} between projection and attention", mixing)


def _check_result(tap: Tap, site: SiteGraph) -> None:
    """Call a tap's module as the rewritten site does, in the example's grid, and refuse a result of another shape than it says."""
    grid, channels = example_grid(site.plan), site.facts.channels[tap.where]
    thinned = thinned_grid(grid, tap.stride)
    given, wanted = (_EXAMPLE_BATCH, channels, *grid), (_EXAMPLE_BATCH, channels, *thinned)
    if tap.form == "tokens":
        given, wanted = ((_EXAMPLE_BATCH, torch.Size(sizes).numel(), channels) for sizes in (grid, thinned))
    with torch.no_grad():
        result: object = meta_copy(tap.module)(torch.empty(given, dtype=PROBE_DTYPE, device="meta"))
    found = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
    if found != wanted:
        raise Refused(f"the tap {tap.where!r} with stride={tap.stride} makes {found} of {given}, not {wanted}")


def check_output(design: nn.Module, operands: tuple[object, ...], output: object) -> None:
    """Refuse what a design's forward returns if it is not attention output: a forward hook of its module.

    Raises:
        Refused: it is not a tensor, or of another shape or dtype.
    """
    x = operands[0]
    assert isinstance(design, Design)
    assert isinstance(x, tuple)
    query, value = x[0], x[2]
    wanted = f"{(*query.shape[:3], value.shape[-1])} of {value.dtype}"
    found = f"{tuple(output.shape)} of {output.dtype}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
    if found != wanted:
        raise Refused(f"`forward` of the design {design.name!r} returns {found}, not {wanted}")
