"""torch.compile and torch.export on a GPU: graphs, seconds to the first image, CUDA graphs, an AOTInductor package."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.gpu.step import Row, Unit, Work, in_ms, short

MODELS = {"pixart-sigma": 2, "sd3.5-medium": 2, "flux-dev": 2, "demo/mm-dit": None}  # and to how many blocks of a kind they are cut
_TINY_MODELS = {"demo/mm-dit": 1}
SIZES, _TINY_SIZES = ((512, 512), (768, 512), (1024, 1024), (1024, 768), (2048, 2048), (1536, 1024)), ((16, 16), (24, 16), (32, 32))


def units(tiny: bool) -> list[Unit]:
    models = _TINY_MODELS if tiny else MODELS
    kinds = {"graphs": _graphs, "CUDA graphs": _cuda_graphs, "export": _export}
    return [Unit(f"{kind}, {name}", partial(run, name, blocks)) for kind, run in kinds.items() for name, blocks in models.items()]


def _graphs(name: str, blocks: int | None, work: Work) -> list[Row]:
    """Compile teacher and student for several sizes: their graphs, and how far compiled results are from eager ones."""
    import torch
    from torch._dynamo.utils import counters

    from edit_compile.api import block_options

    made, rows = _Models(name, blocks, work), []
    for subject, model in made.subjects.items():
        torch.compiler.reset()
        counters.clear()
        expected = {size: _call(model, size, work) for size in made.sizes}
        for path in made.blocks:
            model.get_submodule(path).compile(**block_options(_backend(work)))
        began, first, worst = time.perf_counter(), 0.0, 0.0
        for size, wanted in expected.items():
            worst = max(worst, _error(_call(model, size, work), wanted))
            first = first or time.perf_counter() - began
        graphs = counters["stats"]["unique_graphs"]
        found = {"model": name, "what": subject, "sizes": len(expected), "graphs": graphs, "seconds to the first": short(first)}
        rows.append({**found, "seconds for all": short(time.perf_counter() - began), "worst relative error": short(worst)})
    torch.compiler.reset()
    return rows


def _cuda_graphs(name: str, blocks: int | None, work: Work) -> list[Row]:
    """Replay CUDA graphs, where launches take longer than the work."""
    import torch

    from edit_compile.bench.latency import Timing
    from edit_compile.bench.turns import time_in_turns

    made, rows = _Models(name, blocks, work), []
    size = made.sizes[0]
    for subject, model in made.subjects.items():
        expected, inputs = _call(model, size, work), _inputs(model, size, work)
        for mode, options in {"default": {}, "CUDA graphs": {"mode": "reduce-overhead"}}.items():
            torch.compiler.reset()  # two forms of one function would be one's recompilation
            call = partial(_step, torch.compile(model, dynamic=False, **(_backend(work) or options)), inputs)
            with torch.no_grad():
                found = [_first(call()).clone() for _ in range(3)][-1]  # a graph is recorded in the second call
            (seconds,) = time_in_turns({mode: call}, work.device, runs=2 if work.tiny else 20, warmup=1).values()
            row = {"model": name, "what": subject, "px": f"{size[0]} x {size[1]}", "mode": mode, "ms": in_ms(Timing.of(seconds).median)}
            rows.append({**row, "relative error": short(_error(found, expected))})
    torch.compiler.reset()
    return rows


def _step(compiled: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Call what may replay CUDA graphs: what the last call returned is overwritten."""
    import torch

    torch.compiler.cudagraph_mark_step_begin()
    return compiled(**inputs)


def _export(name: str, blocks: int | None, work: Work) -> list[Row]:
    """Export a student ahead of time, as a whole and as the code of its blocks; each file is compared with the model at several sizes."""
    from edit_compile.deployment.run import export

    made, rows = _Models(name, blocks, work), []
    kinds: dict[str, dict[str, Any]] = {"a package": {}, **({} if work.tiny else {"code of blocks": {"blocks": True}})}
    for what, options in kinds.items():
        path = work.folder / f"{name.replace('/', '-')}.pt2"
        began = time.perf_counter()
        found = export(made.subjects["student"], path, sizes=made.sizes[1:3], overwrite=True, **options)
        row = {"model": name, "what": what, "sizes": len(found.errors), "seconds": short(time.perf_counter() - began)}
        rows.append({**row, "MiB": float(f"{path.stat().st_size / 2**20:.3g}"), "worst relative error": short(found.largest_error)})
        path.unlink()
    return rows


class _Models:
    """A teacher and its student, whose added weights are away from their start, which hides errors.

    Attributes:
        subjects: both, by name.
        blocks: the paths of their repeated blocks.
        sizes: in pixels; the demo model draws smaller images.
    """

    def __init__(self, name: str, blocks: int | None, work: Work) -> None:
        import torch

        from edit_compile.adapters.load_model import load_model
        from edit_compile.adapters.random_model import random_model
        from edit_compile.api import linearize, plan_of, repeated_blocks
        from edit_compile.passes.site_graph import ADDED

        is_demo, options = name.startswith("demo/"), {"blocks": blocks, "device": work.device.type, "dtype": work.dtype}
        source = name if is_demo else f"arch/{name}"
        model: Any = load_model(source).model if blocks is None else random_model(source, **options).model
        model = torch.nn.Module.to(model, work.device, work.dtype)  # of diffusers, `to` warns of modules that are meant to stay in float32
        student = linearize(model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for site in plan_of(student).rewritten:
                for parameter in getattr(student.get_submodule(site.path), ADDED).parameters():
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
        self.subjects = {"teacher": model, "student": student}
        self.blocks = repeated_blocks(student)
        large = _TINY_SIZES if work.tiny else SIZES
        self.sizes = tuple((height // 16, width // 16) for height, width in large) if is_demo and not work.tiny else large


def _backend(work: Work) -> dict[str, str]:
    """Name how a rehearsal compiles: it traces."""
    return {"backend": "eager"} if work.tiny else {}


def _inputs(model: Any, size: tuple[int, int], work: Work) -> dict[str, Any]:
    import torch

    from edit_compile.adapters.inputs import inputs_for_size

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    torch.manual_seed(math.prod(size))
    return {**inputs_for_size(model, *size, device=work.device, dtype=dtype).inputs, "return_dict": False}


def _call(model: Any, size: tuple[int, int], work: Work) -> Any:
    import torch

    with torch.no_grad():
        return _first(model(**_inputs(model, size, work))).clone()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output.sample


def _error(found: Any, expected: Any) -> float:
    """Compute |found - expected| / |expected|."""
    return float(((found.double() - expected.double()).norm() / expected.double().norm()).item())
