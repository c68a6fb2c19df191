"""What each of two processes under FSDP2 keeps in memory while it loads its shards, trains and saves, and the seconds of a step and a save.

    python benchmarks/sharded_training.py -o benchmarks/results/DATE-sharded-training.md
    python benchmarks/sharded_training.py --width 128 --layers 2 --steps 4          (a rehearsal)

A transformer with random weights is written to disk and distilled from there as a recipe's model, in float32, on CPUs (gloo) or, where
there are as many GPUs, on those. Host memory is what a process has of its own (RssAnon of /proc/self/status, Linux), sampled every few
milliseconds; mapped files, whose pages the system drops when it needs them, do not count. While loading, what the compiler keeps is in it:
150 MB, of a model of any size. Models in other precisions than the recipe's and converted folders are loaded too, and trained for two
steps; `whole` is how a single process loads: each of them all of it. While saving, memory is given as a multiple of the shard of the state
that is saved: 1 is the shard itself, which is in memory anyway. `gathered` is how the same state was saved before: gathered by the first
process, which writes it all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PROCESSES, SAMPLED = 2, 0.003  # seconds
UNCOUNTED = 2  # steps at the beginning
WHOLE = "-whole"
MODELS = ("float32", "bfloat16", "converted", *(f"{name}{WHOLE}" for name in ("float32", "bfloat16", "converted")))


class Memory:
    """The peak of this process's own memory in bytes, from `reset` on."""

    def __init__(self) -> None:
        self.peak = self.reset()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, own_memory())
            time.sleep(SAMPLED)

    def reset(self) -> int:
        """Begin again; returns what it is now."""
        self.peak = now = own_memory()
        return now


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def write_models(folder: Path, width: int, layers: int) -> int:
    """Write a transformer with random weights as diffusers does, in two precisions, and converted; returns its bytes in float32."""
    from diffusers import SD3Transformer2DModel

    import edit_compile as ec

    sizes: dict[str, int] = {"sample_size": 32, "pos_embed_max_size": 32, "in_channels": 16, "out_channels": 16}
    texts = {"joint_attention_dim": 256, "caption_projection_dim": width, "pooled_projection_dim": 128}
    heads = {"num_layers": layers, "attention_head_dim": 64, "num_attention_heads": width // 64}
    model = SD3Transformer2DModel(**sizes, **texts, **heads)
    model.save_pretrained(folder / "float32")
    ec.save(ec.linearize(model), folder / "converted", base=str(folder / "bfloat16"))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.to(torch.bfloat16).save_pretrained(folder / "bfloat16")
    return size


def recipe_of(model: Path, steps: int) -> dict[str, Any]:
    stage = {"resolution": [128, 128], "steps": steps, "global_batch_size": PROCESSES, "lr": 1e-4, "warmup_steps": 0}
    return {
        "model": str(model),
        "data": {"kind": "random"},
        "train": "blocks",
        "precision": "fp32",
        "prediction": "rectified-flow",
        "layerwise": None,
        "stages": [stage],
        "validation": {"samples": PROCESSES, "batch_size": 1, "timestep_bins": 1},
        "samples": {"count": 1, "steps": 1},
        "compile": False,
        "gradient_checkpointing": False,
        "save_every": steps // 2,
        "log_every": 1,
        "trackers": [],
    }


def work(folder: Path, model: str, steps: int) -> dict[str, Any]:
    """Do one process's part; returns its figures.

    Args:
        model: the name of its folder; `-whole` after it: loaded as by a single process.
    """
    from edit_compile.distillation import Recipe, distill
    from edit_compile.distillation import run as runner
    from edit_compile.distillation.train import trainer

    memory, figures = Memory(), dict[str, Any](saves=[], gathered=[], steps=[])
    own_make, own_shard, own_saving, own_student = runner.make_accelerator, runner.shard, trainer.Saving, runner.make_student
    started = memory.reset()

    def make(recipe: Recipe, place: Path) -> Any:
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        accelerator = own_make(recipe, place)
        if not torch.cuda.is_available():  # accelerate takes note of FSDP on accelerators only
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
        return accelerator

    def shard(*args: Any) -> None:
        own_shard(*args)
        figures.update(loading=memory.peak - started, loaded=own_memory() - started)

    def whole(*args: Any, **options: Any) -> Any:
        return own_student(*args, **options | {"for_shards": False})

    def measure(kind: str, act: Callable[[], Any]) -> None:
        torch.distributed.barrier()
        before, since = memory.reset(), time.perf_counter()
        act()
        seconds = time.perf_counter() - since
        figures[kind].append({"seconds": seconds, "times": 1 + (memory.peak - before) / figures["shard"]})

    class MeasuredSaving(own_saving):
        def __init__(self, place: Path, metadata: Any, tensors: dict[str, torch.Tensor], *args: Any, **options: Any) -> None:
            figures["shard"] = sum(local(t).numel() * t.element_size() for t in tensors.values())
            measure("gathered", lambda: save_gathered(folder / "gathered", tensors))
            super().__init__(place, metadata, tensors, *args, **options)

        def finish(self) -> None:
            measure("saves", super().finish)

    runner.make_accelerator, runner.shard, trainer.Saving = make, shard, MeasuredSaving
    runner.make_student = whole if model.endswith(WHOLE) else own_student
    recipe = recipe_of(folder / model.removesuffix(WHOLE), steps)
    try:
        distill(Recipe.model_validate(recipe), folder / f"run-{model}", report=figures["steps"].append)
    finally:
        runner.make_accelerator, runner.shard, trainer.Saving, runner.make_student = own_make, own_shard, own_saving, own_student
    torch.distributed.destroy_process_group()
    figures["steps"] = [row["seconds_per_step"] for row in figures["steps"]]  # that only the first process is told
    return figures


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def save_gathered(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Gather all tensors, and write them in the first process."""
    first, found = torch.distributed.get_rank() == 0, {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if first:
            found[name] = full.cpu().contiguous()
    if first:
        save_file(found, path)
        path.unlink()
    torch.distributed.barrier()


@contextmanager
def processes(folder: Path, model: str, steps: int) -> Iterator[list[subprocess.Popen[str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if gpus() else {"ACCELERATE_USE_CPU": "true"}
    started = []
    for rank in range(PROCESSES):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, "--steps", str(steps), "--part", str(folder), model]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def gpus() -> bool:
    return torch.cuda.device_count() >= PROCESSES


def run(folder: Path, model: str, steps: int) -> list[dict[str, Any]]:
    """Run all processes; returns their figures."""
    with processes(folder, model, steps) as started:
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{model}: a process failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def report(size: int, by_model: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown of all processes' figures."""
    figures = by_model["float32"]
    rows = [
        ("its shard of the state, MB", [f"{one['shard'] / 1e6:.0f}" for one in figures]),
        *((f"peak of own memory while loading, MB: {m}", [f"{one['loading'] / 1e6:.0f}" for one in each]) for m, each in by_model.items()),
        *((f"own memory once loaded, MB: {m}", [f"{one['loaded'] / 1e6:.0f}" for one in each]) for m, each in by_model.items()),
        ("peak while saving, times the shard", [f"{max(save['times'] for save in one['saves']):.2f}" for one in figures]),
        ("the same, gathered by the first process", [f"{max(save['times'] for save in one['gathered']):.2f}" for one in figures]),
        ("seconds of a step, median", [f"{statistics.median(one['steps'][UNCOUNTED:]):.2f}" if one["steps"] else "" for one in figures]),
        ("seconds of a save, median", [f"{statistics.median(save['seconds'] for save in one['saves']):.2f}" for one in figures]),
        ("the same, gathered", [f"{statistics.median(save['seconds'] for save in one['gathered']):.2f}" for one in figures]),
    ]
    heads = "| | " + " | ".join(f"process {rank}" for rank in range(len(figures))) + " |"
    table = [heads, "|---|" + "---:|" * len(figures), *(f"| {name} | {' | '.join(values)} |" for name, values in rows)]
    where = torch.cuda.get_device_name() if gpus() else f"{os.cpu_count()} CPUs ({platform.processor() or platform.machine()}), gloo"
    title = f"A transformer of {size / 1e6:.0f} MB, `train: blocks`, {PROCESSES} processes under FSDP2; {where}; torch {torch.__version__}."
    return "\n".join([title, "", *table, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, help="a Markdown file; default: print")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # of one of the processes
    arguments = parser.parse_args()
    if arguments.part is not None:
        folder, model = arguments.part
        print(json.dumps(work(Path(folder), model, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as name:
        size = write_models(Path(name), arguments.width, arguments.layers)
        steps = dict.fromkeys(MODELS, 2) | {"float32": arguments.steps}
        found = {model: run(Path(name), model, steps[model]) for model in MODELS}
    text = report(size, found)
    if arguments.output is not None:
        arguments.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
