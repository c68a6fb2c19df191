"""Full-size architectures on the meta device: full width, a few blocks of every kind.

`benchmarks/full_size.py` runs all of them whole, against a limit of time and memory.
"""

from __future__ import annotations

import json
import math
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
        pytest.param("flux-dev", {"num_layers": 2, "num_single_layers": 2}, {"mm-edit": 4}, marks=pytest.mark.slow),
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


def wan_by_hand(layers, frames, rows, columns, reduction=None):
    """FLOPs of a forward of Wan 2.1 14B, term by term, with its own attention or, given a reduction, with EDiT's (arXiv 2503.16726)."""
    c, hidden, text, head, patch = 5120, 13824, 512, 128, 16 * 2 * 2
    n, compressed = frames * rows * columns, frames * math.ceil(rows / 2) * math.ceil(columns / 2)
    own = 4 * 2.0 * n * c * c  # projections of queries, keys, values and output
    if reduction is None:
        own += 2 * 2.0 * n * n * c  # scores, and weighted values
    else:
        own += 2.0 * n * c * (c / reduction) * (9 + 1)  # a 3 x 3 convolution to c / reduction channels, and a 1 x 1 back
        own += 2 * 2.0 * compressed * 9 * c  # a depthwise 3 x 3 of keys, and of values
        own += 2.0 * c * (compressed * head + n * head + n)  # keys times values, queries times these, and the normaliser
    cross = 2.0 * c * c * (2 * n + 2 * text) + 2 * 2.0 * n * text * c
    feed_forward = 2 * 2.0 * n * c * hidden
    ends = 2 * 2.0 * n * patch * c + 2.0 * text * c * (4096 + c) + 2.0 * c * (256 + c + 6 * c)  # patches in and out, text, time
    return layers * (own + cross + feed_forward) + ends


def qwen_by_hand(layers, rows, columns, text, reduction=None):
    """FLOPs of a forward of Qwen-Image, term by term, with its own joint attention or, given a reduction, with MM-EDiT's."""
    c, head, patch = 3072, 128, 64
    n, compressed = rows * columns, math.ceil(rows / 2) * math.ceil(columns / 2)
    everything = n + text
    block = 4 * 2.0 * everything * c * c  # projections
    block += 2 * 2.0 * everything * c * 4 * c  # feed-forward networks, four times as wide
    block += 2 * 2.0 * c * 6 * c  # modulation of image and text
    if reduction is None:
        block += 2 * 2.0 * everything**2 * c
    else:
        block += 2.0 * n * c * (c / reduction) * (9 + 1) + 2 * 2.0 * compressed * 9 * c
        block += 2.0 * c * (compressed * head + n * head + n)  # linear attention between image tokens
        block += 2 * 2.0 * c * text * (n + compressed + text)  # softmax: image rows over text keys, text rows over compressed ones and text
    ends = 2.0 * n * patch * c + 2.0 * text * 3584 * c + 2.0 * n * c * patch + 2.0 * c * (256 + c) + 2.0 * c * 2 * c
    return layers * block + ends


@pytest.mark.slow
def test_wan_is_counted_as_by_hand(tmp_path):
    """81 frames of 720 x 1280 pixels are 21 x 45 x 80 tokens."""
    (found,) = ec.cost(shortened("wan2.1-t2v-14b", tmp_path, num_layers=1), [(81, 720, 1280)]).costs
    assert found.image == 75_600
    assert found.before == pytest.approx(wan_by_hand(1, 21, 45, 80), rel=1e-12)
    assert found.after == pytest.approx(wan_by_hand(1, 21, 45, 80, 4), rel=1e-12)


@pytest.mark.slow
def test_qwen_image_is_counted_as_by_hand(tmp_path):
    (found,) = ec.cost(shortened("qwen-image", tmp_path, num_layers=1), [(1024, 1328)]).costs
    assert (found.image, found.text) == (64 * 83, 1024)
    assert found.before == pytest.approx(qwen_by_hand(1, 64, 83, 1024), rel=1e-12)
    assert found.after == pytest.approx(qwen_by_hand(1, 64, 83, 1024, 4), rel=1e-12)
