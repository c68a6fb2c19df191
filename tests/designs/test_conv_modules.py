import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edit_compile.designs.ops.conv_modules import ConvFusion, SpatialCompressor, group_count
from edit_compile.designs.ops.token_spans import on_images


def grid(h: int, w: int) -> torch.Tensor:
    return torch.empty(()).expand(h, w)


@given(st.integers(1, 7), st.integers(1, 7))
def test_untrained_they_are_the_identity_and_its_samples(h: int, w: int):
    x = torch.randn(2, h * w, 8, generator=torch.Generator().manual_seed(h * 8 + w))
    assert torch.equal(on_images(ConvFusion(8, 4), x, grid(h, w)), x)
    sampled = x.unflatten(1, (h, w))[:, ::2, ::2].flatten(1, 2)
    torch.testing.assert_close(on_images(SpatialCompressor(8), x, grid(h, w)), sampled, atol=0, rtol=0)


def test_a_single_token_whose_channels_are_groups_of_their_own_is_no_error():
    fusion = ConvFusion(8, 4, identity=False)
    torch.testing.assert_close(fusion.norm(torch.randn(1, 2, 1, 1)), fusion.norm.bias.view(1, 2, 1, 1), atol=1e-4, rtol=0)
    assert fusion(torch.randn(1, 8, 1, 1)).isfinite().all()


def test_conv_fusion_sees_rows_and_columns_of_the_grid():
    torch.manual_seed(0)
    fusion = ConvFusion(4, 1, identity=False).eval()
    fusion.norm = torch.nn.Identity()
    x = torch.zeros(1, 5 * 7, 4)
    x[0, 2 * 7 + 3] = 1  # row 2, column 3
    changed = (on_images(fusion, x, grid(5, 7)) - on_images(fusion, torch.zeros_like(x), grid(5, 7))).abs().sum(-1).unflatten(1, (5, 7))[
        0
    ] > 1e-7
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(changed, expected)


@pytest.fixture
def two_threads():
    """With one, torch chooses no backend by an image's size."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_graph_holds_for_small_images_and_large_ones(two_threads):
    """A convolution of one image in float32 has another backend from 20,480 numbers on."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    fusion = ConvFusion(96, 4, identity=False).requires_grad_(False)
    compiled = torch.compile(fusion, dynamic=True, fullgraph=True, backend="eager")
    for side in (16, 40, 24):
        x = torch.randn(1, 96, side, side)
        torch.testing.assert_close(compiled(x), x + fusion.restore(fusion.activation(fusion.norm(fusion.reduce(x)))), atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("module", [ConvFusion(8, 2), SpatialCompressor(8)])
def test_a_grid_that_does_not_fit_is_refused(module: torch.nn.Module):
    with pytest.raises(ValueError, match=r"12 image tokens do not fill a grid of 3 x 5"):
        on_images(module, torch.zeros(1, 12, 8), grid(3, 5))


@pytest.mark.parametrize("reduction", [0, 3, -2])
def test_a_reduction_that_does_not_divide_is_refused(reduction: int):
    with pytest.raises(ValueError, match=f"reduction={reduction} does not divide"):
        ConvFusion(8, reduction)


@given(st.integers(1, 300))
def test_groups_divide_the_channels(channels: int):
    assert channels % group_count(channels) == 0
    assert 1 <= group_count(channels) <= 32
