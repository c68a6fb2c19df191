"""Running passes in order, and putting one of your own among them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import fx

from edit_compile.errors import ConfigError, EditCompileError, RewriteError
from edit_compile.ir.plan import PassRecord
from edit_compile.passes.analysis import ANALYSIS, AnalysisPass
from edit_compile.passes.capture import what_failed
from edit_compile.passes.site_graph import SitePass
from edit_compile.passes.site_passes import SITE_PASSES
from edit_compile.progress import working

log = logging.getLogger(__name__)
State = TypeVar("State")


@dataclass(frozen=True)
class Passes:
    """The two lists of passes: over the whole model's graph, and over the graph of each distinct site.

    A pass is a function of what is known so far (`Analysis`, `SiteGraph`), changes it, and returns a count for the record.
    """

    analysis: tuple[AnalysisPass, ...] = ANALYSIS
    site: tuple[SitePass, ...] = SITE_PASSES

    def insert(self, added: Callable[[Any], int], *, before: str) -> Passes:
        """Return the lists with a pass of yours before the one of that name.

        Raises:
            ConfigError: there is no such pass, one of that name is there already, or it is not a function.
        """
        if not isinstance(getattr(added, "__name__", None), str):
            raise ConfigError(f"a pass is a function with a name, which the plan records, not {added!r}")
        names = [run.__name__ for run in (*self.analysis, *self.site)]
        if added.__name__ in names or before not in names:
            problem = f"a pass named {added.__name__!r} is there already" if added.__name__ in names else f"no pass {before!r}"
            raise ConfigError(f"{problem}; there are: {', '.join(names)}")

        def with_it(passes: Iterable[Any]) -> tuple[Any, ...]:
            return tuple(step for run in passes for step in ((added, run) if run.__name__ == before else (run,)))

        return replace(self, analysis=with_it(self.analysis), site=with_it(self.site))


def run_passes(
    passes: Iterable[Callable[[State], int]], state: State, graph_name: str, graph: Callable[[State], fx.Graph]
) -> list[PassRecord]:
    """Run passes in order; what each did is returned, and logged with its time at level DEBUG.

    Args:
        graph_name: "model" or a site's path.
        graph: finds the graph as it is now.

    Raises:
        RewriteError: a pass fails, leaves a graph that is not valid or returns something else than a count; names it.
    """
    records = []
    for run in passes:
        start = time.perf_counter()
        with working(f"planning: {run.__name__.replace('_', ' ')}") if graph_name == "model" else nullcontext():
            count = _run(run, state, graph_name, graph)
        nodes = len(graph(state).nodes)
        records.append(PassRecord(name=run.__name__, graph=graph_name, count=count, nodes=nodes))
        log.debug("%s on %s: %d, %d nodes, %.0f ms", run.__name__, graph_name, count, nodes, 1000 * (time.perf_counter() - start))
    return records


def _run(run: Callable[[State], int], state: State, graph_name: str, graph: Callable[[State], fx.Graph]) -> int:
    try:
        count = run(state)
        if run not in (*ANALYSIS, *SITE_PASSES):
            graph(state).lint()
    except EditCompileError:
        raise
    except Exception as error:
        raise RewriteError(f"the pass {run.__name__!r} fails on {graph_name}: {what_failed(error)}") from error
    if not isinstance(count, int):
        raise RewriteError(f"the pass {run.__name__!r} returns {count!r} on {graph_name}; a pass returns a count for the record")
    return count
