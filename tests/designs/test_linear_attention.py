"""Linear attention against the formula, written as loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from edit_compile import torch_internals
from edit_compile.designs.ops.linear_attention import attention_with_normaliser, linear_attention


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    y = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                weights = [sum(q[b, h, i, c] * k[b, h, j, c] for c in range(q.shape[3])) for j in range(k.shape[2])]
                y[b, h, i] = sum(w * v[b, h, j] for j, w in enumerate(weights)) / sum(weights)
    return y


def features(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).relu() + 0.05


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_it_is_the_formula(b: int, h: int, n: int, m: int, d: int, seed: int):
    q, k = features(b, h, n, d, seed=seed), features(b, h, m, d, seed=seed + 1)
    v = torch.randn(b, h, m, d, generator=torch.Generator().manual_seed(seed + 2))
    y, normaliser = linear_attention(q, k, v)
    torch.testing.assert_close(y.double(), reference(q, k, v), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normaliser[..., 0], (q[:, :, :, None] * k[:, :, None]).sum((-1, -2)).log(), atol=1e-5, rtol=1e-5)


def test_a_query_orthogonal_to_every_key_gives_zero():
    y, normaliser = linear_attention(torch.zeros(1, 1, 3, 4), features(1, 1, 5, 4, seed=0), torch.ones(1, 1, 5, 4))
    assert torch.equal(y, torch.zeros(1, 1, 3, 4))
    assert (normaliser < -1e38).all()


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 99))
def test_softmax_and_its_normaliser(n: int, p: int, d: int, masked: bool, trained: bool, seed: int):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, size, d, generator=g) * 3 for size in (n, p, p))
    mask = (torch.rand(2, 1, 1, p, generator=g) > 0.4) | (torch.arange(p) == 0) if masked else None
    y, normaliser = attention_with_normaliser(q.requires_grad_(trained), k, v, mask, 0.7)
    assert y.requires_grad == normaliser.requires_grad == trained
    scores = 0.7 * q.double() @ k.double().mT
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(y.double(), scores.softmax(-1) @ v.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normaliser.double(), scores.logsumexp(-1, keepdim=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_softmax_over_keys_that_are_all_masked_has_no_weight(trained: bool):
    q, k, v = (torch.randn(1, 1, size, 4, requires_grad=trained) for size in (2, 3, 3))
    y, normaliser = attention_with_normaliser(q, k, v, torch.zeros(1, 1, 1, 3, dtype=torch.bool), 0.5)
    assert torch.equal(y, torch.zeros_like(y))
    assert (normaliser < -1e30).all()


def test_attention_over_no_keys_has_no_weight():
    q, none = torch.rand(2, 3, 5, 4, requires_grad=True), torch.rand(2, 3, 0, 4)
    y, log_normaliser = attention_with_normaliser(q, none, none, None, 1.0)
    assert y.shape == q.shape
    assert not y.any()
    assert torch.equal(torch.sigmoid(0 - log_normaliser), torch.ones(2, 3, 5, 1))


class Sizes(TorchDispatchMode):
    """Notes the operations that run, and the size of their largest result in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operations = 0, set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        found = [x.numel() for x in (results if isinstance(results, tuple) else (results,)) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *found])
        self.operations.add(func.name())
        return results


MASKS = (None, torch.arange(30)[None, None, None] < 20, torch.linspace(-3, 2, 30)[None, None, None])


@pytest.mark.parametrize("mask", MASKS)
def test_without_gradients_no_scores_are_in_memory(mask: torch.Tensor | None):
    q, k, v = (torch.randn(1, 2, size, 4) for size in (50, 30, 30))
    with torch.no_grad(), Sizes() as without:
        found = attention_with_normaliser(q, k, v, mask, 0.5)
    with Sizes() as trained:
        wanted = attention_with_normaliser(q.clone().requires_grad_(), k, v, mask, 0.5)
    assert without.largest <= q.numel() < 2 * 50 * 30 == trained.largest
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0, check_layout=False)


def test_where_torch_is_told_to_use_no_fused_kernel_scores_are_products_that_counters_see():
    q, k, v = (torch.randn(1, 2, size, 8) for size in (5, 7, 7))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attention_with_normaliser(q, k, v, None, 0.5)
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * (8 + 8)


def test_one_graph_without_scores_serves_all_sizes_and_an_exported_one_has_no_kernel_in_it():
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return attention_with_normaliser(q, k, v, None, 0.5)

    torch.compiler.reset()
    graphs, attention = [], Attention()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for size in (50, 31, 77):
        q, k, v = (torch.randn(1, 2, size, 8) for size in (size, 7, 7))
        torch.testing.assert_close(compiled(q, k, v), attention_with_normaliser(q.requires_grad_(), k, v, None, 0.5), atol=1e-5, rtol=0)
    assert len(graphs) == 1
    assert "flash_attention" in graphs[0].code
    assert "matmul" not in graphs[0].code
    program = torch.export.export(attention, (q, k, v), dynamic_shapes=({2: torch.export.Dim.AUTO}, None, None))
    assert "flash_attention" not in program.graph_module.code
    torch.testing.assert_close(program.module()(q, k, v), attention(q, k, v))


@pytest.mark.parametrize("mask", [None, torch.arange(30)[None, None, None] < 20])
@pytest.mark.parametrize(("dtype", "kernel"), [(torch.float32, "efficient"), (torch.bfloat16, "flash"), (torch.float64, "")])
def test_kernels_for_cuda_take_what_they_are_given(dtype: torch.dtype, kernel: str, mask, monkeypatch: pytest.MonkeyPatch):
    """By their shapes alone, which need no GPU."""
    monkeypatch.setattr(torch_internals, "_fused_kernels", lambda device, index: ("flash", "efficient"))
    kernel = "efficient" if kernel and mask is not None else kernel  # the other one has no masks
    with FakeTensorMode(allow_non_fake_inputs=True), Sizes() as seen:
        q, k, v = (torch.empty(2, 3, size, 64, dtype=dtype, device="cuda") for size in (50, 30, 30))
        y, normaliser = attention_with_normaliser(q, k, v, None if mask is None else mask.to("cuda"), 0.5)
    assert y.shape == q.shape
    assert y.dtype == dtype
    assert normaliser.shape == (2, 3, 50, 1)
    assert (f"aten::_scaled_dot_product_{kernel}_attention" in seen.operations) == bool(kernel)


def test_queries_keys_and_values_that_are_transposed_in_memory():
    """As of an image with its channels first: fused kernels take the numbers of a row to be one after the other."""
    transposed = [torch.randn(1, 2, 4, size).transpose(-1, -2) for size in (50, 30, 30)]
    found = attention_with_normaliser(*transposed, None, 0.5)
    torch.testing.assert_close(found, attention_with_normaliser(*(x.contiguous() for x in transposed), None, 0.5))
