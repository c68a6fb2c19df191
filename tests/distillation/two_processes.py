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
from edit_compile.adapters.noise_schedule import Process
from edit_compile.distillation import distill
from edit_compile.distillation import run as runner

OPTIONS = {
    "stage": [
        {"resolution": [12, 16], "steps": 8, "batch": 4, "lr": 1e-3, "warm_up": 2},
        {"resolution": [16, 20], "steps": 4, "batch": 8, "micro_batch": 2, "lr": 1e-3, "warm_up": 0, "losses": {"task": 0.5}},
    ],
    "warm_start": {"steps": 8, "batch": 4, "lr": 2e-3, "warm_up": 2},
    "held_out": {"samples": 12, "batch": 4, "buckets": 2},
    "save_every": 5,
}


def run(folder, source=None, **options):
    student = toy_distill.student()
    if int(os.environ.get("RANK", 0)):
        toy.shaken(student.blocks[0].attn.edit)  # as if conversion had drawn what it adds from another seed
    return distill(
        toy_distill.recipe(**OPTIONS),
        folder,
        student=student,
        source=source or toy_distill.Pictures(),
        denoise=toy_distill.denoise,
        process=Process("rectified-flow"),
        **options,
    )


class Fails(toy_distill.Pictures):
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
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
