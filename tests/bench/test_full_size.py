"""Full-size architectures on the meta device: full width, a few blocks of every kind.

`benchmarks/full_size.py` runs all of them whole, against a limit of time and memory.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import edit_compile as ec
from edit_compile.adapters import load_model as models

ARCHITECTURES = Path(models.__file__).parent / "arch"


def shortened(name, folder, **changes):
    config = json.loads((ARCHITECTURES / f"{name}.json").read_text()) | changes
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return ec.load_model(str(path)).model


def actions(plan):
    return dict(Counter(site.action for site in plan.sites))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("sd3.5-medium", {"num_layers": 3, "dual_attention_layers": [0]}, {"mm-edit": 3, "edit": 1}),
        ("flux-dev", {"num_layers": 2, "num_single_layers": 2}, {"mm-edit": 4}),
        ("pixart-sigma", {"num_layers": 2}, {"edit": 2, "keep": 2}),
        ("dit-xl-2", {"num_layers": 2}, {"edit": 2}),
    ],
)
def test_full_width(tmp_path, name, changes, expected):
    student = ec.linearize(shortened(name, tmp_path, **changes))
    plan = ec.plan_of(student)
    assert actions(plan) == expected
    assert all("cross-attention" in site.reason for site in plan.sites if not site.rewritten)
    assert all(parameter.is_meta for parameter in student.parameters())
    report = ec.cost(student)
    assert [cost.image for cost in report.costs] == [4096, 16384, 65536]
    channels = {"sd3.5-medium": 1536, "flux-dev": 3072, "pixart-sigma": 1152, "dit-xl-2": 1152}[name]
    assert report.break_even_tokens == pytest.approx(5 * channels / 4, rel=0.15)  # 5 C / reduction: arXiv 2503.16726


def test_sd35_large_ends_at_its_positions(tmp_path):
    report = ec.cost(shortened("sd3.5-large", tmp_path, num_layers=1))
    assert [cost.height for cost in report.costs] == [1024, 2048]
    assert "end at 3072 px" in report.errors["4096 x 4096"]
