"""What each of two processes does in the tests of distributed training: `python two_processes.py FOLDER WHAT`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

import edit_compile as ec
import toy
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation import distill
from edit_compile.distillation import run as runner
from edit_compile.distillation.data.iterable_style import IterableSource
from edit_compile.distillation.data.seeding import noise_for
from edit_compile.distillation.data.sources.dataset import DatasetData, HubStream
from edit_compile.distillation.processes import taking_time
from edit_compile.distillation.recipe.schema import OptimizerConfig
from edit_compile.distillation.train import peers
from edit_compile.distillation.train.checkpoints import CheckpointMetadata, Saving, load_newest
from edit_compile.distillation.train.distributed import gather_full
from edit_compile.distillation.train.optimizer import MovingAverage, make_optimizers
from edit_compile.distillation.train.peers import watching_peers
from edit_compile.distillation.train.spike_guard import SpikeGuard
from edit_compile.distillation.train.train_state import TrainState
from edit_compile.student.site import converted_sites

OPTIONS = {
    "stages": [
        {"resolution": [12, 16], "steps": 8, "global_batch_size": 4, "lr": 1e-3, "warmup_steps": 2},
        {
            "resolution": [16, 20],
            "steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "lr": 1e-3,
            "warmup_steps": 0,
            "losses": {"task": 0.5},
        },
    ],
    "layerwise": {"steps": 8, "global_batch_size": 4, "lr": 2e-3, "warmup_steps": 2},
    "validation": {"samples": 12, "batch_size": 4, "timestep_bins": 2},
    "save_every": 5,
}
TRAINED = {
    "lora": {"train": "lora", "lora": {"rank": 2, "targets": ["blocks.*.ff.*", "out"]}},
    "blocks": {"train": "blocks"},
    "all": {"train": "all"},
}


def run(folder, source=None, trained=(), **options):
    student = toy_distill.student()
    if int(os.environ.get("RANK", 0)):
        toy.shaken(student.blocks[0].attn.edit)  # as if conversion had drawn what it adds from another seed
    return distill(
        toy_distill.recipe(**OPTIONS | dict(trained)),
        folder,
        student=student,
        source=source or toy_distill.ToySource(),
        denoise=toy_distill.denoise,
        schedule=NoiseSchedule("rectified-flow"),
        **options,
    )


class Fails(toy_distill.ToySource):
    """Has nothing from some position on."""

    concurrent = False

    def batch(self, request):
        if request.split == "train" and request.position >= 50:
            raise ec.DistillError("no more data")
        return super().batch(request)


def state_of(model):
    """The state of a model under an optimizer and a moving average; under FSDP with several processes."""
    if torch.distributed.is_initialized():
        fully_shard(model)
    trained = dict(model.named_parameters())
    return TrainState(trained, make_optimizers(model, trained, OptimizerConfig()), MovingAverage(trained, 0.5))


def save_state(state, folder, total, *, in_background=False):
    metadata = CheckpointMetadata(
        recipe={}, phase=0, step=total, total=total, averages=1, guard=SpikeGuard(), numbers=state.numbers(), before={}, seconds=0.0
    )
    return Saving(folder, metadata, state.tensors(), keep_last=2, in_background=in_background)


def restored(folder):
    """The state of the newest checkpoint, in a model that has never been one of it."""
    state = state_of(uneven_model(seed=1))
    found = load_newest(folder)
    state.load(found[1], found[0].numbers)
    return state


def uneven_model(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 1, bias=False))


def full_state(state):
    return {name: gather_full(value).clone() for name, value in state.tensors().items()}


def save_and_restore(folder):
    """Save after a step of two processes, if nothing is saved yet; otherwise restore what one process saved, and say what it is."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    if (folder / "checkpoints").exists():
        found, name = full_state(restored(folder / "checkpoints")), "after.safetensors"
    else:
        state = state_of(model := uneven_model(seed=0))
        model(torch.ones(3, 6)).square().sum().backward()
        state.step(1e-2)
        found, name = full_state(state), "before.safetensors"
        saving = save_state(state, folder / "checkpoints", 1, in_background=True)
        state.step(1e-2)
        saving.finish()
        broken = {"x": torch.zeros(1, dtype=torch.complex64)} if rank == 0 else {}
        with pytest.raises(ec.DistillError, match=r"x is of torch.complex64.* the last good checkpoint is .*00000001"):
            Saving(folder / "checkpoints", load_newest(folder / "checkpoints")[0].model_copy(update={"total": 2}), broken, 2).finish()
    if rank == 0:
        save_file(found, folder / name)
    torch.distributed.destroy_process_group()


def compute(seconds=9.0):
    """Do what takes three times as long as a process may stand still."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(10_000))


def upload():
    with taking_time():
        time.sleep(9)


class Recording(toy_distill.ToySource):
    """A stream of image files, whose images are the toy's latents. Writes down what it decodes, and what each batch has."""

    granularity = 4
    length = None

    def __init__(self, folder, fails_at=None):
        super().__init__()
        self.fails_at, self.decoded, self.trained, self.skipped = fails_at, [], {}, {}
        data = DatasetData(kind="dataset", path="imagefolder", data_dir=str(folder), streaming=True)
        self.stream = IterableSource(HubStream(data, 0, 4), self, None, 0, 0.0)

    def check(self, *size_or_caption):
        if len(size_or_caption) == 1:
            self.decoded.append(size_or_caption[0])

    def encode_captions(self, captions):
        numbers = torch.tensor([int(caption.removeprefix("image ")) for caption in captions])
        return {"text": noise_for(numbers.tolist(), (toy_distill.TEXT, 6), 2, "train")}

    def encode_images(self, images):
        return images

    def other_conditions(self, shape, size):
        return {}

    def batch(self, request):
        if request.split == "train" and self.fails_at is not None and request.position >= self.fails_at:
            raise ec.DistillError("no more data")
        found = self.stream.batch(request)
        if request.split == "train":
            self.trained |= dict(zip(request.positions, found.captions, strict=True))
        return found


def run_stream(folder):
    """Train on a stream until it fails, and go on; each process writes down what it read."""
    options = {"stages": [OPTIONS["stages"][0]], "layerwise": None, "validation": {"samples": 4, "batch_size": 4, "timestep_bins": 2}}
    sources = []
    for number, fails_at in enumerate((24, None)):
        sources.append(Recording(folder / "images", fails_at))
        with pytest.raises(ec.DistillError, match="no more data") if fails_at is not None else nullcontext():
            run(folder / "run", sources[-1], options, resume=number > 0)
    rank = int(os.environ.get("RANK", 0))
    read = [{"decoded": source.decoded, "trained": source.trained} for source in sources]
    (folder / f"{rank}.json").write_text(json.dumps(read))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


CHILD = "import time; until = time.monotonic() + 9\nwhile time.monotonic() < until: pass"
LONG = {  # what a process may do for as long as it likes while the other waits for it
    "computes": compute,
    "has a child that computes": lambda: subprocess.run([sys.executable, "-c", CHILD], check=True),
    "has a thread that computes": lambda: ThreadPoolExecutor(1).submit(compute).result(),
    "uploads": upload,
}


def meet(folder):
    """Meet in a collective operation again and again, until the other process does not come."""
    peers.BEAT, peers.SILENCE, peers.SILENCE_AFTER_ERROR, peers.STILL = 0.3, 6.0, 3.0, 3.0
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    with watching_peers(lambda: "the last good checkpoint is 00000007"):
        (folder / f"{rank}.ready").touch()
        while True:
            torch.distributed.all_reduce(torch.ones(1))
            if rank == 1 and (folder / "fail").exists():
                raise ec.DistillError("no more data")
            if rank == 1 and (folder / "hang").exists():
                threading.Event().wait()
            for name, act in LONG.items():
                if rank == 1 and (folder / name).exists():
                    act()
                    (folder / name).rename(folder / f"{name}.done")
            time.sleep(0.05)


def main(folder):
    run(folder / "ddp")

    make, shard = runner.make_accelerator, runner.shard

    def as_with_gpus(recipe, folder):  # accelerate takes note of FSDP on accelerators only
        accelerator = make(recipe, folder)
        accelerator.state.distributed_type = DistributedType.FSDP
        reshards = folder.name != "kept_whole"
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=reshards)
        return accelerator

    def sharded(model, *rest):
        shard(model, *rest)
        teachers = (site.edit_teacher for site in converted_sites(model).values())
        assert all(hasattr(p, "full_tensor") for part in (model, *teachers) for p in part.parameters())

    runner.make_accelerator, runner.shard = as_with_gpus, sharded
    run(folder / "fsdp")
    run(folder / "kept_whole")
    with pytest.raises(ec.DistillError, match="no more data"):
        run(folder / "resumed", Fails())
    torch.distributed.barrier()
    run(folder / "resumed", resume=True)
    for kind, trained in TRAINED.items():
        run(folder / f"fsdp_{kind}", trained=trained)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    {"runs": main, "state": save_and_restore, "meet": meet, "stream": run_stream}[sys.argv[2]](Path(sys.argv[1]))
