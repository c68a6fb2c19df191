"""What each of two processes does in the tests of distributed training: `python two_processes.py FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import edit_compile as ec
import toy
import toy_distill
from edit_compile.adapters.noise_schedule import NoiseSchedule
from edit_compile.distillation import distill
from edit_compile.distillation import run as runner

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
TRAINED = {"lora": {"train": "lora", "lora": {"rank": 2, "targets": ["blocks.*.ff.*", "out"]}}, "blocks": {"train": "blocks"}}


def run(folder, source=None, trained=(), **options):
    student = toy_distill.student()
    if int(os.environ.get("RANK", 0)):
        toy.shaken(student.blocks[0].attn.edit)  # as if conversion had drawn what it adds from another seed
    return distill(
        toy_distill.recipe(**OPTIONS, **dict(trained)),
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


def main(folder):
    run(folder / "ddp")

    make, shard = runner.make_accelerator, runner.shard

    def as_with_gpus(recipe, folder):  # accelerate takes note of FSDP on accelerators only
        accelerator = make(recipe, folder)
        accelerator.state.distributed_type = DistributedType.FSDP
        reshards = folder.name != "kept_whole"
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=reshards)
        return accelerator

    def sharded(student, accelerator):
        shard(student, accelerator)
        assert all(hasattr(p, "full_tensor") for p in student.parameters())

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
    main(Path(sys.argv[1]))
