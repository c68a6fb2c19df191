"""Every operator has a rule or is refused by name; and what a rule claims of positions is what torch computes.

A dimension that a rule says is kept in order is checked by perturbation: where one position of it changes in the input, the
output changes at that position alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from edit_compile.passes.axes.algebra import Axis, is_in_order, new_axis, operator_without_rule
from edit_compile.passes.axes.propagate import flow_axes
from edit_compile.passes.axes.rules import REFUSED, RULES, rule_of, same_positions

aten = torch.ops.aten
B, N, C = 2, 3, 4


def t(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))) + 0.5


def whole(high: int, *shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).remainder(high).reshape(shape)


x, square, picture = t(B, N, C), t(B, 4, 4), t(B, 4, 6, 10)
# ruff: noqa: SIM905
SAMPLES: dict[str, Any] = {  # by operator, or operator and overload: the arguments of one call, or of several
    **{name: [(x,)] for name in "mT mH adjoint numpy_T ravel atleast_1d atleast_2d atleast_3d squeeze clone log_sigmoid trace".split()},
    **{name: [(x, -1), (x, 1)] for name in "cumsum cumprod cummax cummin softmax log_softmax logcumsumexp".split()},
    **{name: [(x, [1], True), (x, [0, -1])] for name in "sum.dim_IntList mean.dim amax amin logsumexp".split()},
    **{name: [(x,)] for name in "mean.default sum.default max.default min.default std.default prod.default median.default".split()},
    **{name: [(x, 1), (x, -1, True)] for name in "max.dim min.dim median.dim mode prod.dim_int argmax argmin all.dim".split()},
    **{name: [(x, [2]), (x, [0, 2])] for name in ("flip", "fft_fftshift")},
    "trace": [(t(3, 3),)],
    "view": [(x, [B, N * C]), (x, [B, N, 2, 2]), (x, [B * N, C])],
    "reshape": [(x, [B, C, N]), (x, [N, B, C])],
    "flatten.using_ints": [(x, 1)],
    "unflatten.int": [(x, 2, [2, 2])],
    "view_as": [(x, t(B * N, C))],
    "reshape_as": [(x, t(B, N * C))],
    "permute": [(x, [2, 0, 1])],
    "transpose.int": [(x, 1, -1)],
    "swapaxes": [(x, 0, 2)],
    "swapdims": [(x, -1, 0)],
    "t": [(t(3, 5),), (t(3),)],
    "matrix_H": [(t(3, 5),)],
    "movedim.int": [(x, 0, 2), (x, -1, 0)],
    "movedim.intlist": [(x, [0, 1], [2, 0])],
    "moveaxis.int": [(x, 2, 0)],
    "unsqueeze": [(x, 1), (x, -1)],
    "squeeze.dim": [(t(2, 1, 3), 1), (x, 1)],
    "squeeze.dims": [(t(2, 1, 3, 1), [1, 3])],
    "select.int": [(x, 1, 0), (x, -1, 2)],
    "unbind.int": [(x, 1)],
    "slice.Tensor": [(x, 1, 1, 3), (x, -1, 0, 4, 2)],
    "narrow": [(x, 1, 1, 2), (x, 2, -3, 2)],
    "chunk": [(x, 2, 2)],
    "split.Tensor": [(x, 3, -1)],
    "split_with_sizes": [(x, [1, 3], 2)],
    "tensor_split.sections": [(x, 2, 1)],
    "tensor_split.indices": [(x, [1], 1)],
    "hsplit.int": [(x, 3)],
    "vsplit.int": [(x, 2)],
    "dsplit.int": [(x, 2)],
    "expand": [(t(B, 1, C), [5, B, N, C])],
    "expand_as": [(t(B, 1, C), x)],
    "broadcast_to": [(t(N, 1), [B, N, C])],
    "broadcast_tensors": [([t(N, 1), t(B, 1, C)],)],
    "sum_to_size": [(x, [1, N, 1])],
    "meshgrid": [([t(3), t(4)],)],
    "meshgrid.indexing": [([t(3), t(4)], {"indexing": "xy"})],
    "view_as_complex": [(t(3, 5, 2),)],
    "view_as_real": [(torch.complex(t(3, 5), t(5, 3).T.contiguous()),)],
    "cat": [([x, t(B, 5, C)], 1), ([x, x], -1)],
    "hstack": [([x, t(B, 5, C)],), ([t(3), t(4)],)],
    "vstack": [([x, x],), ([t(3), t(3)],)],
    "dstack": [([x, x],), ([t(3, 2), t(3, 2)],)],
    "column_stack": [([t(3), t(3, 2)],)],
    "stack": [([x, x], -2)],
    "repeat": [(x, [2, 1, 1, 3])],
    "tile": [(x, [2, 1])],
    "repeat_interleave.self_int": [(x, 2, 1), (x, 2)],
    "repeat_interleave.self_Tensor": [(x, torch.tensor([1, 2, 1]), 1)],
    "pad": [(x, [1, 1]), (x, [0, 0, 1, 0])],
    "constant_pad_nd": [(x, [0, 0, 0, 2])],
    "reflection_pad1d": [(x, [1, 1])],
    "tril": [(x,)],
    "diagonal": [(x, 0, 1, 2), (t(3, 3, 2), 1)],
    "diag_embed": [(x,), (x, 0, 0, 2)],
    "unfold": [(x, 2, 2, 1)],
    "fliplr": [(x,)],
    "flipud": [(x,)],
    "msort": [(x,)],
    "sort": [(x,), (x, 1)],
    "argsort": [(x, 1)],
    "topk": [(x, 2), (x, 2, 1)],
    "kthvalue": [(x, 2), (x, 1, 1)],
    "roll": [(x, [1], [1]), (x, [1])],
    "rot90": [(x, 1, [1, 2]), (x, 2)],
    "channel_shuffle": [(picture, 2)],
    "embedding": [(t(7, 5), whole(7, 2, 3))],
    "one_hot": [(whole(4, 2, 3), 4)],
    "gather": [(x, 1, whole(3, B, 2, C)), (x, 2, whole(4, 1, 2, 3))],
    "take_along_dim": [(x, whole(3, B, 2, C), 1), (x, whole(4, 5))],
    "index_select": [(x, 1, torch.tensor([2, 0]))],
    "index.Tensor": [
        (x, [None, torch.tensor([2, 0])]),
        (x, [torch.tensor([1, 0]), None, torch.tensor([2, 0])]),
        (x, [None, whole(3, 5, 1), whole(4, 6)]),
        (x, [None, torch.tensor([True, False, True])]),
    ],
    "take": [(x, whole(24, 2, 3))],
    "index_put": [(x, [None, torch.tensor([2, 0])], t(B, 2, C))],
    "scatter.src": [(x, 1, whole(3, B, 2, C), t(B, 2, C))],
    "index_add": [(x, 1, torch.tensor([2, 0]), t(B, 2, C))],
    "index_copy": [(x, 1, torch.tensor([2, 0]), t(B, 2, C))],
    "slice_scatter": [(x, t(B, 2, C), 1, 1, 3)],
    "select_scatter": [(x, t(B, C), 1, 1)],
    "copy": [(x, t(N, C))],
    "masked_fill.Scalar": [(x, x > 1, 0.0)],
    "linear": [(x, t(5, C))],
    "matmul": [(x, t(B, C, 5)), (t(5, 1, N, C), x.mT), (t(C), x.mT), (x, t(C))],
    "bmm": [(x, x.mT)],
    "mm": [(t(3, 4), t(4, 5))],
    "mv": [(t(3, 4), t(4))],
    "dot": [(t(4), t(4))],
    "vdot": [(t(4), t(4))],
    "addmm": [(t(5), t(3, 4), t(4, 5))],
    "addmv": [(t(3), t(3, 4), t(4))],
    "baddbmm": [(t(B, N, 5), x, t(B, C, 5))],
    "addbmm": [(t(N, 5), x, t(B, C, 5))],
    "chain_matmul": [([t(3, 4), t(4, 5), t(5, 2)],)],
    "linalg_multi_dot": [([t(4), t(4, 5), t(5, 2)],)],
    "inner": [(x, t(5, C))],
    "outer": [(t(3), t(4))],
    "addr": [(t(3, 4), t(3), t(4))],
    "tensordot": [(x, t(C, 5, N), [1, 2], [2, 0])],
    "bilinear": [(x, t(B, N, 5), t(6, C, 5), None)],
    "cdist": [(x, t(B, 5, C))],
    "scaled_dot_product_attention": [(t(B, 2, 3, 4), t(B, 2, 5, 4), t(B, 2, 5, 6))],
    "einsum": [
        ("...d,d->...d", [x, t(C)]),
        ("bnd,bmd->bnm", [x, t(B, 5, C)]),
        ("...n,d->...nd", [t(B, N), t(C)]),
        ("b...d,...d", [x, t(N, C)]),
        ("nd,dm", [t(3, 4), t(4, 5)]),
        ("...ij->...ji", [x]),
    ],
    "std_mean.correction": [(x, [1])],
    "var.correction": [(x, [1], {"correction": 0, "keepdim": True})],
    "norm.ScalarOpt_dim": [(x, 2, [1])],
    "linalg_vector_norm": [(x, 2, [1], True), (x,)],
    "linalg_matrix_norm": [(x, 2)],
    "count_nonzero.dim_IntList": [(x, [1])],
    "aminmax": [(x, {"dim": 1})],
    "cosine_similarity": [(x, t(1, N, C), 2), (x, x)],
    "pairwise_distance": [(x, t(N, C))],
    "linalg_vecdot": [(x, t(N, C))],
    "mse_loss": [(x, t(N, C).expand(B, N, C)), (x, x, 0)],
    "glu": [(x,)],
    "diff": [(x,), (x, 1, 1)],
    "linalg_cross": [(t(2, 3), t(2, 3))],
    "fft_fft": [(x,), (x, 5, 1)],
    "fft_rfft": [(x, None, 1)],
    "fft_fftn": [(x, None, [1, 2]), (x,)],
    "fft_fft2": [(x,)],
    "renorm": [(x, 2, 1, 0.1)],
    "layer_norm": [(x, [C]), (x, [N, C])],
    "rms_norm": [(x, [C])],
    "native_layer_norm": [(x, [C], None, None, 1e-5)],
    "group_norm": [(picture, 2)],
    "native_group_norm": [(picture, None, None, 2, 4, 60, 2, 1e-5)],
    "batch_norm": [(picture, None, None, t(4), t(4), False, 0.1, 1e-5, False), (picture, None, None, None, None, True, 0.1, 1e-5, False)],
    "conv1d": [(x, t(5, N, 3), None, [1], [1]), (t(N, C), t(5, N, 1))],
    "conv2d": [(picture, t(5, 4, 1, 1)), (picture, t(5, 4, 3, 3), None, [2, 2]), (picture, t(5, 4, 1, 1), None, [2, 2])],
    "conv2d.padding": [(picture, t(5, 4, 3, 3), None, [1, 1], "same")],
    "convolution": [(picture, t(5, 4, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)],
    "conv_transpose2d.input": [(picture, t(4, 5, 2, 2), None, [2, 2])],
    "pixel_shuffle": [(picture, 2)],
    "pixel_unshuffle": [(picture, 2)],
    "avg_pool2d": [(picture, [2, 2])],
    "max_pool2d_with_indices": [(picture, [2, 2])],
    "adaptive_avg_pool2d": [(picture, [3, 10])],
    "upsample_nearest2d.vec": [(picture, None, [2.0, 1.0])],
    "im2col": [(picture, [2, 2], [1, 1], [0, 0], [2, 2])],
    "col2im": [(t(B, 16, 15), [6, 10], [2, 2], [1, 1], [0, 0], [2, 2])],
    "grid_sampler": [(picture, t(B, 3, 5, 2) - 1, 0, 0, False)],
    "linalg_inv": [(square,)],
    "linalg_det": [(square,)],
    "linalg_qr": [(square,)],
    "linalg_solve": [(square + 9 * torch.eye(4, dtype=torch.float64), t(B, 4, 3))],
    "linalg_cholesky": [(square @ square.mT + torch.eye(4, dtype=torch.float64),)],
    "where.self": [(x > 1, x, t(N, 1))],
    "clamp": [(x, 0.6)],
    "prelu": [(x, t(N))],
    "bucketize.Tensor": [(x, t(5).sort().values)],
}
CALLS = [pytest.param(name, i, id=f"{name}-{i}") for name, calls in SAMPLES.items() for i in range(len(calls))]


def overload(name: str) -> Any:
    packet, _, which = name.partition(".")
    found = getattr(aten, packet)
    return getattr(found, which or ("default" if "default" in found.overloads() else found.overloads()[0]))


def graph_of(name: str, call: tuple[Any, ...]) -> tuple[fx.Node, list[Tensor]]:
    """One call as a graph of which every tensor is an input."""
    graph, inputs = fx.Graph(), []

    def entered(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        node = graph.placeholder(f"x{len(inputs)}_")
        node.meta["val"] = leaf
        inputs.append(leaf)
        return node

    kwargs = call[-1] if isinstance(call[-1], dict) else {}
    args = call[: len(call) - bool(kwargs)]
    args, kwargs = torch.utils._pytree.tree_map(entered, (args, kwargs))
    node = graph.call_function(overload(name), args, kwargs)
    node.meta["val"] = outcome(node, inputs)
    return node, inputs


def outcome(node: fx.Node, inputs: list[Tensor]) -> Any:
    values = dict(zip((n for n in node.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.get)
    return node.target(*args, **kwargs)


def seeds(node: fx.Node) -> tuple[Axis, ...]:
    return tuple(new_axis(size, f"{node.name}{d}") for d, size in enumerate(node.meta["val"].shape))


def claims(axes: Any, name: str, size: int) -> list[int]:
    """The output dimensions that are said to be an input's dimension, position by position."""
    whole_axes = [(d, axis[0]) for d, axis in enumerate(axes) if len(axis) == 1 and is_in_order(axis)]
    return [d for d, s in whole_axes if name in s.sources and s.size == size > 1 and not s.composed_of and s.part_of is None]


@pytest.mark.parametrize(("name", "index"), CALLS)
def test_a_change_at_one_position_shows_at_that_position_alone(name: str, index: int) -> None:
    node, inputs = graph_of(name, SAMPLES[name][index])
    axes = flow_axes(node.graph, seeds)[node]
    outputs = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
    found = axes if isinstance(axes, list) else [axes]
    assert not any(operator_without_rule(each) for each in found), "the rule does not fit this call"
    for number, tensor in enumerate(inputs):
        for dim, size in enumerate(tensor.shape if tensor.is_floating_point() else ()):
            places = [claims(each, f"x{number}_{dim}", size) for each in found]
            for position in range(size) if any(places) else ():
                changed = tensor.clone()
                changed.select(dim, position).add_(0.37).mul_(1.1)
                after = outcome(node, [*inputs[:number], changed, *inputs[number + 1 :]])
                for out, other, dims in zip(outputs, after if isinstance(after, list | tuple) else [after], places, strict=True):
                    for d in dims:
                        same = (out == other) | (out.isnan() & other.isnan())
                        elsewhere = [p for p in range(size) if p != position]
                        assert same.index_select(d, torch.tensor(elsewhere)).all(), (number, dim, d)


KEPT = {  # at least these, or the rule would be true of everything: output dimensions in order, by call
    ("narrow", 0): 2,
    ("adjoint", 0): 3,
    ("einsum", 0): 3,
    ("einsum", 1): 3,
    ("matmul", 0): 3,
    ("index.Tensor", 1): 1,
    ("conv2d", 0): 3,
    ("layer_norm", 0): 2,
    ("linear", 0): 2,
    ("repeat", 0): 1,
    ("movedim.intlist", 0): 3,
    ("cdist", 0): 3,
    ("tensordot", 0): 2,
}


@pytest.mark.parametrize(("name", "index"), KEPT)
def test_what_is_kept_is_known_to_be(name: str, index: int) -> None:
    node, _ = graph_of(name, SAMPLES[name][index])
    axes = flow_axes(node.graph, seeds)[node]
    assert isinstance(axes, tuple)
    assert sum(is_in_order(axis) and any(s.all_sources for s in axis) for axis in axes) >= KEPT[name, index]


# ------------------------------------------------------------------ all operators


def of_tensors(packet: Any) -> list[Any]:
    """The overloads that make tensors of tensors, and do not write into one that is given for the result."""
    overloads = [getattr(packet, each) for each in packet.overloads() if not each.endswith("out")]
    return [
        each
        for each in overloads
        if any("Tensor" in str(r.type) for r in each._schema.returns) and any("Tensor" in str(a.type) for a in each._schema.arguments)
    ]


def public_operators() -> dict[str, list[Any]]:
    names = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")}
    public = [n for n in sorted(names) if "backward" not in n and "." not in n and (not n.startswith("_") or n.startswith("__"))]
    packets = ((n, getattr(aten, n, None)) for n in public)
    return {n: found for n, packet in packets if hasattr(packet, "overloads") and (found := of_tensors(packet))}


def plain(name: str) -> str:
    return name.removesuffix("_copy") if name.endswith("_copy") else name[:-1] if name.endswith("_") and not name.endswith("__") else name


def test_every_public_operator_is_pointwise_has_a_rule_or_is_refused_by_name() -> None:
    operators = public_operators()
    assert len(operators) > 500
    without = {name for name, overloads in operators.items() if any(rule_of(each) is None for each in overloads)}
    assert {name for name in without if name not in REFUSED and plain(name) not in REFUSED} == set()
    assert not {name for name in REFUSED if name in RULES}


VIEW_LIKE = [
    name
    for name, overloads in public_operators().items()
    if name != "positive" and any(r.alias_info and not r.alias_info.is_write for each in overloads for r in each._schema.returns)
]


@pytest.mark.parametrize("name", VIEW_LIKE)
def test_every_operator_that_returns_a_view_has_a_rule_of_its_own_or_none(name: str) -> None:
    """None of them may be taken for a pointwise one."""
    assert all(rule_of(each) is not same_positions for each in public_operators()[name])
