"""CUDA graphs: blocks compiled with `mode="reduce-overhead"`."""

from __future__ import annotations

import copy

import pytest
import torch

import edit_compile as ec
from edit_compile.adapters.denoise import denoise, random_batch

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("name", ["demo/mm-dit", "demo/dit"])
def test_blocks_run_as_cuda_graphs_at_several_resolutions(name):
    student = ec.linearize(ec.load_model(name).model).cuda()
    compiled = ec.compile(copy.deepcopy(student), mode="reduce-overhead")
    for height, width in ((32, 32), (32, 32), (24, 40), (32, 32)):
        torch.manual_seed(0)
        x, conditions = random_batch(student, height, width, 2, device="cuda")
        times = torch.tensor([200.0, 700.0], device="cuda")
        with torch.no_grad():
            expected = denoise(student, x, times, conditions)
            for _ in range(3):  # warm-up, recording, replay
                torch.compiler.cudagraph_mark_step_begin()
                found = denoise(compiled, x, times, conditions).clone()
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
