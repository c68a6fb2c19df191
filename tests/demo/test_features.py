"""The Frechet distance against closed forms, and features that put damages of images into the right order."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from edit_compile.demo import features
from edit_compile.demo.features import frechet_distance

spec = importlib.util.spec_from_file_location("train_demo_features", Path(__file__).parents[2] / "scripts" / "train_demo_features.py")
training = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training)


def normal(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_of_a_set_from_itself_moved_and_scaled():
    """Means differ by d and the covariance is scaled by s^2: |d|^2 + (s - 1)^2 tr S."""
    a, moved = normal(50, 7, 0) @ normal(7, 7, 1), normal(1, 7, 2)
    centred = a - a.mean(0)
    for scale in (1.0, 0.5, 3.0):
        expected = (moved.square().sum() + (scale - 1) ** 2 * centred.mT.cov().trace()).item()
        assert frechet_distance(a, a.mean(0) + moved + scale * centred) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_distance_of_independent_coordinates():
    """For diagonal covariances it is the sum of (s - t)^2 over standard deviations. Fewer samples than features do, too."""
    width = 4
    signs = torch.cat([torch.eye(width), -torch.eye(width)]).double()  # uncorrelated: covariance 2 / 7 in each coordinate
    s, t = torch.tensor([[1.0, 2.0, 0.5, 0.0], [2.0, 2.0, 1.5, 3.0]], dtype=torch.float64)
    expected = ((s - t).square().sum() * 2 / 7).item()
    assert frechet_distance(signs * s, signs * t) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(normal(3, 40, 0), normal(5, 40, 1)) > 0


def test_distance_is_symmetric_whatever_the_covariances():
    a, b = normal(30, 6, 0) @ normal(6, 6, 1), normal(40, 6, 2) @ normal(6, 6, 3)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(a[:1], b)


@pytest.mark.parametrize("draw", [training.of_groups, training.of_shapes], ids=["64 px", "32 px"])
def test_damages_are_in_order(draw):
    found = list(training.damage_table(lambda seed: draw(seed, 100)).values())
    for less, more in itertools.pairwise(found):
        assert less < 0.6 * more, found
    assert found[0] < 0.1 * found[1], found


def test_the_classifier_is_small_and_right():
    model = features.classifier()
    assert sum(p.numel() for p in model.parameters()) <= 150_000
    assert features.WEIGHTS.stat().st_size <= 600 * 1024
    images, told = training.labelled([scene for scene, _ in zip(training.groups.scenes(7), range(100), strict=False)])
    assert min(training.shares_right(model, images, told).values()) > 0.95
    assert features.features(images).shape == (100, training.CONFIG["width"])
    assert features.features(torch.rand(2, 3, 48, 80)).dtype == torch.float64
