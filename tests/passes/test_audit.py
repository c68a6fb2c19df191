"""audit: what a plan promises, checked on the converted model's own graph."""

from __future__ import annotations

import operator

import pytest
import torch

from edit_compile.passes.audit import audit
from hand_built import Built, aten, attend

B, H, W, T, C = 2, 5, 7, 11, 8
N = H * W


def tokens_of(built, name="x"):
    return built(aten.transpose.int, built(aten.flatten.using_ints, built.input(name, B, C, H, W), 2), 1, 2)


def audited(make, *paths):
    """The audit of a model that does `make` at module `a` to its image tokens."""
    built = Built()
    y = built.linear(make(built, built.linear(tokens_of(built), "embed", C)), "out", C)
    built.output(built(aten.view.default, built(aten.transpose.int, y, 1, 2), [B, C, H, W]))
    return audit(built.capture(), dict.fromkeys(paths or ("a",), lambda rows, columns: False))


def at(built):
    """Operations inside module `a.core`."""
    return lambda target, *args, **kwargs: built(target, *args, at="a.core", **kwargs)


def linear(built, x):
    g = at(built)
    return g(aten.matmul.default, x, g(aten.matmul.default, g(aten.transpose.int, x, 1, 2), x))


def softmax(built, x):
    return attend(built, x, "a")


def softmax_by_hand(built, x):
    g = at(built)
    scores = g(aten.matmul.default, x, g(aten.transpose.int, x, 1, 2))
    return g(aten.matmul.default, g(aten.softmax.int, scores, -1), x)


def product(built, x):
    """Quadratic without a softmax."""
    g = at(built)
    return g(aten.bmm.default, g(aten.relu.default, g(aten.bmm.default, x, g(aten.transpose.int, x, 1, 2))), x)


def added_product(built, x):
    g = at(built)
    nothing = g(aten.zeros.default, [B, N, N], device=torch.device("meta"))
    scores = g(aten.baddbmm.default, nothing, x, g(aten.transpose.int, x, 1, 2), beta=0)
    return g(aten.bmm.default, g(aten.tanh.default, scores), x)


def matrix_transpose(built, x):
    g = at(built)
    return g(aten.matmul.default, g(aten.softmax.int, g(aten.matmul.default, x, g(aten.mT.default, x)), -1), x)


def distances(built, x):
    """Weights of an operation that the algebra of axes has no rule for."""
    g = at(built)
    return g(aten.matmul.default, g(aten.exp.default, g(aten.neg.default, g(aten.cdist.default, x, x))), x)


def einsum(built, x):
    g = at(built)
    return g(aten.einsum.default, "bij,bjc->bic", [g(aten.einsum.default, "b i c, b j c -> b i j", [x, x]), x])


def linear_einsum(built, x):
    g = at(built)
    return g(aten.einsum.default, "bnc,bcd->bnd", [x, g(aten.einsum.default, "bnc,bnd->bcd", [x, x])])


def einsum_with_ellipsis(built, x):
    g = at(built)
    return g(aten.einsum.default, "...ij,...jc->...ic", [g(aten.einsum.default, "...ic,...jc", [x, x]), x])


def linear_einsum_with_ellipsis(built, x):
    g = at(built)
    return g(aten.einsum.default, "...nc,...cd->...nd", [x, g(aten.einsum.default, "...nc,...nd->...cd", [x, x])])


def kernel(built, x):
    """A kernel of softmax attention called by its own name."""
    g = at(built)
    q = g(aten.unsqueeze.default, x, 1)
    return g(aten.squeeze.dim, g(operator.getitem, g(aten._scaled_dot_product_attention_math.default, q, q, q), 0), 1)


def text_keys(built, x):
    """Image and text queries of text keys, text queries of image keys: linear in image tokens."""
    y = attend(built, x, "a", keys=built.input("t", B, T, C))
    text = attend(built, built.input("u", B, 3, C), "a", keys=y)
    return built(aten.add.Tensor, y, built(aten.mean.dim, text, [1], True, at="a"), at="a")


@pytest.mark.parametrize("make", [linear, linear_einsum, linear_einsum_with_ellipsis, text_keys])
def test_what_is_linear_in_image_tokens_is_fine(make):
    found = audited(make)
    assert found.findings == ()
    assert found.sites == 1
    assert found.products == 2


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (softmax, "softmax attention"),
        (softmax_by_hand, "softmax attention"),
        (product, "bmm"),
        (added_product, "baddbmm"),
        (matrix_transpose, "softmax attention"),
        (distances, "matmul"),
        (einsum, "einsum"),
        (einsum_with_ellipsis, "einsum"),
        (kernel, "softmax attention"),
    ],
)
def test_image_tokens_by_image_tokens_are_found(make, what):
    first, *_ = audited(make).findings
    assert first.startswith(f"a: {what} (")
    assert first.endswith("multiplies 35 image tokens by 35")


def test_compressed_keys_are_image_tokens_still():
    """Softmax over a quarter of them costs N * N / 4: it grows with the square all the same."""

    def make(built, x):
        picture = built(aten.view.default, built(aten.transpose.int, x, 1, 2), [B, C, H, W])
        short = built(aten.flatten.using_ints, built(aten.avg_pool2d.default, picture, [2, 2], [2, 2], [1, 1]), 2)
        return attend(built, x, "a", keys=built(aten.transpose.int, short, 1, 2))

    assert audited(make).findings[0].endswith("multiplies 35 image tokens by 12")


def test_a_path_without_attention_is_reported_and_others_are_not_looked_at():
    found = audited(softmax, "b", "c")
    assert found.findings == ("b: no attention was found at it", "c: no attention was found at it")
    assert (found.sites, found.products) == (2, 0)


def test_nothing_rewritten_is_nothing_to_find():
    built = Built()
    built.output(built.input("x", B, C, H, W))
    assert audit(built.capture(), {}).findings == ()
