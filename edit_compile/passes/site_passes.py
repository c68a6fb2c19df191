"""The passes over each distinct site's own graph, in order.

    canonicalize_site    attention written by hand becomes one node
    locate_core          the attention or feed-forward network, and where taps can be inserted
    build_design         the design judges the facts and makes its module
    normalize_site       what capture froze is freed, the module's own submodules are called
    insert_taps          the design's modules at their places
    replace_core         the design in the place of softmax attention
    narrow_projections   of a fused projection that the query's branch repeats, the query's channels alone
    generate_method      the graph as a method with the original's signature
    audit_site           captured again: is anything quadratic left that the design does not answer for?

A pass that changes the graph for inference goes before `generate_method`: `Passes().insert(mine, before="generate_method")`.
"""

from __future__ import annotations

from edit_compile.passes.audit import audit_site
from edit_compile.passes.build_design import build_design
from edit_compile.passes.codegen import generate_forward
from edit_compile.passes.narrow_projections import narrow_projections
from edit_compile.passes.rewrite import canonicalize_site, insert_taps, locate_core, normalize_site, replace_core
from edit_compile.passes.site_graph import SiteGraph, SitePass


def generate_method(site: SiteGraph) -> int:
    """Generate the forward that sites of this structure share; counts its nodes."""
    site.forward = generate_forward(site.graph, site.captured, site.module, site.arguments)
    return len(site.graph.nodes)


SITE_PASSES: tuple[SitePass, ...] = (
    canonicalize_site,
    locate_core,
    build_design,
    normalize_site,
    insert_taps,
    replace_core,
    narrow_projections,
    generate_method,
    audit_site,
)
