"""diffusers' `set_attention_backend` on students: what stays softmax follows it, converted sites have no such attention."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from diffusers.models import attention_dispatch

import edit_compile as ec
from families import FAMILIES


@pytest.fixture(scope="module")
def case():
    """Wan: self-attention between image tokens, which is converted, and cross-attention, which stays."""
    model, inputs = FAMILIES["wan"]()
    return ec.linearize(model, example_inputs=inputs), inputs


@torch.no_grad()
def backends_used(student, inputs):
    """Runs a forward; returns its output, and what diffusers' dispatch was asked for."""
    asked = []
    original = attention_dispatch.dispatch_attention_fn

    def noted(*args, backend=None, **kwargs):
        asked.append(backend)
        return original(*args, backend=backend, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.models") and getattr(module, "dispatch_attention_fn", None) is original:
                patch.setattr(module, "dispatch_attention_fn", noted)
        return student(**inputs)[0], tuple(asked)


def test_what_stays_softmax_follows_the_backend_and_sites_do_not_ask_for_one(case):
    student, inputs = copy.deepcopy(case[0]), case[1]
    kept = [site for site in ec.plan_of(student).sites if site.action == "keep"]
    assert kept
    with attention_dispatch.attention_backend("native"):  # puts back what is chosen for all models
        expected, before = backends_used(student, inputs)
        student.set_attention_backend("_native_math")
        found, after = backends_used(student, inputs)
    assert len(before) == len(after) == len(kept)
    assert {str(getattr(each, "value", each)) for each in after} == {"_native_math"}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
