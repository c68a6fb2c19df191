"""Whole diffusers pipelines, assembled from tiny random components, with a converted transformer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import edit_compile as ec
from pipelines import PIPELINES

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_is_recorded_converted_and_run(name):
    pipe = PIPELINES[name]()
    options = CALL | ({"use_resolution_binning": False} if name.startswith("pixart") else {})
    inputs = ec.record(pipe, **(options | {"prompt": ["a red circle", "a cat"], "height": 32, "width": 48}))
    assert not pipe.transformer._forward_pre_hooks
    student = ec.linearize(pipe, example_inputs=inputs)
    assert type(student) is type(pipe)
    assert student.vae is pipe.vae
    assert isinstance(student.transformer, type(pipe.transformer))
    student.set_progress_bar_config(disable=True)
    for height, width in ((32, 48), (48, 48)):
        size = {"height": height, "width": width}
        before = pipe(**options, **size, generator=torch.Generator().manual_seed(0)).images
        after = student(**options, **size, generator=torch.Generator().manual_seed(0)).images
        with ec.teacher(student.transformer):
            same = student(**options, **size, generator=torch.Generator().manual_seed(0)).images
        assert after.shape == (1, height, width, 3)
        assert np.array_equal(before, same)
        assert not np.array_equal(before, after)
        assert np.isfinite(after).all()
