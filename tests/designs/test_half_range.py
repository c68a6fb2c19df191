"""Attention arithmetic stays in the range of half precision."""

import torch

from edit_compile.designs.ops.feature_maps import elu_plus_one
from edit_compile.designs.ops.linear_attention import softmax_with_normaliser


def test_values_that_fit_float16_stay_finite_however_many_keys_share_a_query():
    scores, values = torch.zeros(1, 1, 3, 512), torch.full((1, 1, 512, 4), 150.0, dtype=torch.float16)
    y, log_normaliser = softmax_with_normaliser(scores, values)
    torch.testing.assert_close(y, torch.full((1, 1, 3, 4), 150.0, dtype=torch.float16), atol=0.2, rtol=0)
    torch.testing.assert_close(log_normaliser, torch.full((1, 1, 3, 1), 512.0).log())


def test_elu_plus_one_keeps_its_relative_precision_far_below_zero():
    x = torch.tensor([-20.0, -8.0, -6.0, -0.5, 0.0, 0.5, 3.0], requires_grad=True)
    wanted = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    torch.testing.assert_close(elu_plus_one(x.bfloat16()).float(), wanted, atol=0, rtol=2**-7)
    torch.testing.assert_close(elu_plus_one(x.double()), (torch.nn.functional.elu(x.double()) + 1), atol=1e-12, rtol=1e-7)
    (gradient,) = torch.autograd.grad(elu_plus_one(x).sum(), x)
    torch.testing.assert_close(gradient, torch.where(x > 0, 1.0, x.exp()).detach())
