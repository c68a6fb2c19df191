"""EDiT: linear compressed attention between image tokens (arXiv 2503.16726)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from edit_compile.designs.base import QKV, Design, Tap, Tokens, Verdict, thinned_grid
from edit_compile.designs.ops.conv_modules import TEMPORAL_TAPS, ConvFusion, SpatialCompressor, Temporal
from edit_compile.designs.ops.feature_maps import FeatureMap, feature_map, feature_map_parts
from edit_compile.designs.ops.kernels.choice import KernelCase
from edit_compile.designs.ops.linear_attention import linear_attention, matching_heads
from edit_compile.designs.ops.parts import Part, Product
from edit_compile.designs.ops.site_checks import GRID_DIMS, first_problem, linear_attention_parts
from edit_compile.frozen import Frozen
from edit_compile.ir.site import Place, Site
from edit_compile.ir.tokens import TokenKind

Projection = Literal["conv-fusion", "compressor", "plain"]
STRIDE = 2  # of the compressor, along rows and columns


class Edit(Design):
    """Q = ReLU(Linear(ConvFusion(X))), K and V compressed, y_i = Q_i (sum K_j^T V_j) / (Q_i sum K_j).

    On the grid (t, h, w) of a video the convolutions are those of an image, frame by frame, and frames meet in the attention;
    `temporal` lets the convolutions see neighbouring frames too. Where the graph does not tell whether the grid has time, an
    image counts as a video of one frame.
    """

    name = "edit"
    triton_kernel: Callable[..., tuple[Tensor, Tensor] | None] | None = None  # that computes linear attention where nothing is trained

    class Options(Frozen):
        """EDiT's options. The defaults are the paper's where it states one; the README names the others.

        Attributes:
            reduction: by how much ConvFusion's 3x3 convolution reduces the channels.
            query: "conv-fusion" (EDiT) or "plain", the model's own projection.
            key, value: "compressor" (EDiT), "conv-fusion" or "plain"; both compressed or neither, so that they stay paired.
            features: what makes queries and keys non-negative: "relu" (EDiT), "elu", which is ELU + 1, or "learned", ReLU of a
                linear map for each head, which starts as the identity.
            identity: start as close to the teacher as possible: ConvFusion adds nothing, the compressor samples.
            temporal: what the convolutions see of a video's other frames: "none"; with a depthwise kernel of three frames that
                starts as the identity, the frame before and the one after ("centred") or the two before ("causal", so that
                no query, key or value depends on a later frame). Without meaning, and without effect, for images.
            separable: ConvFusion's 3x3 convolution is a depthwise one and a 1x1: 18 C + 2 C^2 / reduction FLOPs a token in place of
                18 C^2 / reduction.
            temporal_stride: by how much the compressor thins a video's frames; 2 needs a temporal kernel.
        """

        reduction: PositiveInt = 4
        query: Literal["conv-fusion", "plain"] = "conv-fusion"
        key: Projection = "compressor"
        value: Projection = "compressor"
        features: FeatureMap = "relu"
        identity: bool = True
        temporal: Temporal = "none"
        temporal_stride: Literal[1, 2] = 1
        separable: bool = False

        @model_validator(mode="after")
        def _paired(self) -> Edit.Options:
            if (self.key == "compressor") != (self.value == "compressor"):
                raise ValueError(f"key={self.key!r} and value={self.value!r}: compress both or neither, keys and values are paired")
            if self.temporal_stride != 1 and self.temporal == "none":
                raise ValueError(f"temporal_stride={self.temporal_stride} needs temporal='centred' or 'causal', or frames would be lost")
            if self.temporal_stride != 1 and not self.compresses:
                raise ValueError(f"temporal_stride={self.temporal_stride} and key={self.key!r}: only the compressor thins frames")
            return self

        @property
        def compresses(self) -> bool:
            return self.key == "compressor"

    @classmethod
    def accepts(cls, site: Site, options: Any) -> Verdict:
        problem = first_problem(site, GRID_DIMS)
        if problem is None and not (site.queries.only(TokenKind.IMAGE) and site.keys.only(TokenKind.IMAGE)):
            problem = "it is for attention between image tokens alone"
        return Verdict(problem is None, problem or "attention between image tokens")

    def __init__(self, site: Site, options: Any) -> None:
        super().__init__(site, options)
        self.stride = stride(site, options)
        self.query = _module(options.query, "query", site, options)
        self.key = _module(options.key, "key", site, options)
        self.value = _module(options.value, "value", site, options)
        self.features, self.head_sizes = options.features, (site.heads, site.head_dim, site.value_dim)
        self.query_features = feature_map(options.features, site.heads, site.head_dim)
        self.key_features = feature_map(options.features, site.key_heads, site.head_dim)

    def taps(self) -> tuple[Tap, ...]:
        return tuple(self._taps())

    def _taps(self) -> Iterator[Tap]:
        places: tuple[tuple[Place, Place, nn.Module | None], ...] = (
            ("before_query", "after_query", self.query),
            ("before_key", "after_key", self.key),
            ("before_value", "after_value", self.value),
        )
        for before, after, module in places:
            if isinstance(module, SpatialCompressor):
                yield Tap(after, module, self.stride)
            elif module is not None:
                yield Tap(before, module)

    def forward(self, x: QKV, tokens: Tokens) -> Tensor:
        return self.linear_attention(x.query, x.key, x.value, x.mask)[0]

    def linear_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute linear attention of the features of Q and K, and the logarithm of its normaliser."""
        if self.triton_kernel is not None:
            found = self.triton_kernel(q, matching_heads(q, k), matching_heads(q, v), mask, self.features)
            if found is not None:
                return found
        return linear_attention(self.query_features(q), matching_heads(q, self.key_features(k)), matching_heads(q, v), mask)

    @property
    def kernel_case(self) -> KernelCase | None:
        """What a kernel would compute here; None where feature maps are learned."""
        return (
            None if self.features == "learned" else KernelCase(operator="linear_attention", sizes=self.head_sizes, features=self.features)
        )

    @classmethod
    def parts(cls, site: Site, grid: Sequence[int], others: int, options: Any) -> tuple[Part, ...]:
        n, m = math.prod(grid), compressed_tokens(site, grid, options)
        return linear_attention_parts(site, n, m) + tap_parts(site, grid, options) + features_parts(site, n, m, options)


def temporal(site: Site, options: Any) -> Temporal:
    """Return the temporal kernel that a site's convolutions get: none on the grid of an image."""
    kind: Temporal = options.temporal
    return kind if site.grid_dims != 2 else "none"


def stride(site: Site, options: Any) -> tuple[int, ...]:
    """Return by how much keys and values are thinned, along the last dimensions of the grid; () for not at all."""
    if not options.compresses:
        return ()
    if site.grid_dims == 2 or (site.grid_dims is None and options.temporal_stride == 1):
        return STRIDE, STRIDE
    return options.temporal_stride, STRIDE, STRIDE


def compressed_tokens(site: Site, grid: Sequence[int], options: Any) -> int:
    """Count the keys that stand for the image tokens of a grid."""
    return math.prod(thinned_grid(grid, stride(site, options)))


def _module(kind: Projection, name: str, site: Site, options: Any) -> nn.Module | None:
    frames, identity = temporal(site, options), options.identity
    if kind == "conv-fusion":
        channels = site.channels[f"before_{name}"]
        return ConvFusion(channels, options.reduction, temporal=frames, identity=identity, separable=options.separable)
    if kind == "plain":
        return None
    step = options.temporal_stride if frames != "none" else 1
    return SpatialCompressor(site.channels[f"after_{name}"], stride=STRIDE, temporal=frames, temporal_stride=step, identity=identity)


def features_parts(site: Site, queries: int, keys: int, options: Any) -> tuple[Part, ...]:
    """List the products of the feature maps."""
    sides = ((site.heads, queries), (site.key_heads, keys))
    return tuple(part for heads, tokens in sides for part in feature_map_parts(options.features, heads, site.head_dim, tokens))


def tap_parts(site: Site, grid: Sequence[int], options: Any) -> tuple[Part, ...]:
    """List the convolutions on the way of query, key and value."""
    return tuple(part for name in ("query", "key", "value") for part in _tap_parts(getattr(options, name), name, site, grid, options))


def _tap_parts(kind: Projection, name: str, site: Site, grid: Sequence[int], options: Any) -> Iterator[Part]:
    """Yield ConvFusion's 3x3 and 1x1, 20 C^2 N / reduction FLOPs or, separable, 18 C N + 4 C^2 N / reduction; or the compressor's, 18 C M,
    M with all frames; and a temporal kernel."""
    has_time = temporal(site, options) != "none"
    if kind == "conv-fusion":
        n, c = math.prod(grid), site.channels[f"before_{name}"]
        hidden = c // int(options.reduction)
        yield from (Product(n, c, 9), Product(n, hidden, c)) if options.separable else (Product(n, hidden, 9 * c),)
        yield Product(n, c, hidden)
        if has_time:
            yield Product(n, hidden, TEMPORAL_TAPS)
    elif kind == "compressor":
        c = site.channels[f"after_{name}"]
        yield Product(math.prod(thinned_grid(grid, (STRIDE, STRIDE))), c, 9)
        if has_time:
            yield Product(compressed_tokens(site, grid, options), c, TEMPORAL_TAPS)
