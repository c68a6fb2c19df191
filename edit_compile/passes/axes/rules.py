"""What every operator does to axes: one rule for each, or none, which is then said by name.

Operators that torch itself calls pointwise keep all positions. No other operator is taken to: it has a rule here, or where it
puts positions is unknown. Writing operators (`add_`) and copying ones (`permute_copy`) follow the rule of the plain one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from edit_compile.passes.axes import moves, sums
from edit_compile.passes.axes.algebra import Axes, axis_size, hint
from edit_compile.passes.axes.call import Call, Rule, same_positions

__all__ = ["MOVING", "REFUSED", "RULES", "Call", "Rule", "apply_rule", "operator_name", "rule_of", "same_positions"]

_MOVES: dict[Rule, str] = {
    moves.reshaped: """view reshape _unsafe_view flatten unflatten _reshape_alias view_as reshape_as ravel atleast_1d atleast_2d
        atleast_3d""",
    moves.permuted: "permute",
    moves.transposed: "transpose t swapaxes swapdims",
    moves.reversed_dims: "numpy_T",
    moves.matrix_transposed: "mT mH adjoint matrix_H",
    moves.dims_moved: "movedim moveaxis",
    moves.unsqueezed: "unsqueeze",
    moves.squeezed: "squeeze",
    moves.without_dim: "select unbind",
    moves.sliced: "slice",
    moves.narrowed: "narrow",
    moves.split: "chunk split split_with_sizes tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split unsafe_split_with_sizes",
    moves.expanded: "expand expand_as broadcast_to",
    moves.broadcast_list: "broadcast_tensors",
    moves.meshgrid: "meshgrid",
    moves.complex_parts: "view_as_complex view_as_real",
    moves.joined_along: "cat concat concatenate hstack vstack dstack row_stack column_stack",
    moves.stacked: "stack",
    moves.samples_padded: "pad_sequence",
    moves.repeated: "repeat tile",
    moves.interleaved: "repeat_interleave",
    moves.kept: """contiguous clone detach alias to _to_copy type_as pin_memory cpu cuda lift lift_fresh data requires_grad_ conj
        resolve_conj resolve_neg real imag _conj _neg_view dropout feature_dropout alpha_dropout feature_alpha_dropout
        native_dropout bernoulli poisson
        zeros_like ones_like empty_like full_like rand_like randn_like randint_like fill zero normal uniform random exponential
        cauchy geometric log_normal
        masked_fill index_fill tril triu""",
    moves.copied: "copy",
    moves.slice_written: "slice_scatter",
    moves.place_written: "select_scatter",
    moves.created: """zeros ones full empty rand randn randint randperm arange range linspace logspace eye tril_indices triu_indices
        new_zeros new_ones new_empty new_full new_empty_strided empty_strided empty_permuted scalar_tensor tensor as_tensor
        fft_fftfreq fft_rfftfreq hann_window hamming_window blackman_window bartlett_window kaiser_window affine_grid_generator""",
}
_PLACE_BY_PLACE: dict[Rule, str] = {  # pointwise, though torch does not say so of the operator of this name
    same_positions: """absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh bucketize complex polar copysign divide eq ne lt le gt
        ge fix floor_divide gcd lcm greater greater_equal less less_equal not_equal hardswish heaviside isclose isin isreal gelu log_sigmoid
        log_sigmoid_forward mish multiply subtract negative prelu relu6 rrelu rrelu_with_noise special_digamma special_erf special_erfc
        special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln special_i0 special_log1p
        special_logit special_multigammaln special_ndtr special_polygamma special_psi special_round special_sinc special_xlogy threshold
        true_divide __and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__
        __ixor__ __ilshift__ __irshift__ searchsorted dequantize _conj_physical chalf float_power""",
}
_SUMS: dict[Rule, str] = {
    sums.linear: "linear",
    sums.matrix_product: "matmul bmm mm mv dot vdot addmm addmv baddbmm linalg_matmul _addmm_activation",
    sums.summed_product: "addbmm",
    sums.chain: "chain_matmul linalg_multi_dot",
    sums.inner_product: "inner",
    sums.outer_product: "outer ger addr",
    sums.contracted: "tensordot",
    sums.bilinear: "bilinear",
    sums.distances: "cdist _cdist_forward _euclidean_dist",
    sums.attention: """scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
        _scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math
        _scaled_dot_product_fused_attention_overrideable""",
    sums.einsum: "einsum",
    sums.reduced: """mean sum nansum nanmean prod amax amin aminmax max min any all argmax argmin var std var_mean std_mean median nanmedian
        mode kthvalue count_nonzero logsumexp special_logsumexp norm frobenius_norm linalg_vector_norm linalg_norm linalg_matrix_norm
        nuclear_norm trace""",
    moves.expanded: "sum_to_size",
    sums.reduced_pairs: "cosine_similarity pairwise_distance linalg_vecdot",
    sums.loss: """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div soft_margin_loss
        poisson_nll_loss dist""",
    sums.along_dim: """softmax _softmax _safe_softmax special_softmax log_softmax _log_softmax special_log_softmax cumsum cumprod cummax
        cummin logcumsumexp glu diff cross linalg_cross fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2
        fft_irfft2 fft_hfft2 fft_ihfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn""",
    sums.along_all_but: "renorm",
    sums.over_last: "layer_norm rms_norm native_layer_norm _fused_rms_norm",
    sums.over_all_but_batch: "group_norm instance_norm native_group_norm",
    sums.batch_norm: """batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training _batch_norm_no_update _batch_norm_with_update _batch_norm_with_update_functional""",
    sums.convolved: """conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d thnn_conv2d
        slow_conv3d _conv_depthwise2d conv_depthwise3d""",
    sums.resampled: """pixel_shuffle pixel_unshuffle avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
        max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        _adaptive_avg_pool2d _adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_unpool2d max_unpool3d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa""",
    sums.patches: "im2col",
    sums.patches_joined: "col2im",
    sums.sampled: "grid_sampler grid_sampler_2d grid_sampler_3d",
    sums.matrix_function: """inverse pinverse det logdet slogdet matrix_exp matrix_power linalg_inv linalg_inv_ex linalg_pinv linalg_det
        linalg_slogdet linalg_matrix_exp linalg_matrix_power linalg_cholesky linalg_cholesky_ex linalg_qr linalg_svd linalg_svdvals
        linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh linalg_cond svd _linalg_det _linalg_slogdet _linalg_svd _linalg_eigh""",
    sums.solved: "linalg_solve linalg_solve_triangular cholesky_solve triangular_solve",
}
_REORDERS: dict[Rule, str] = {
    moves.padded: """pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d _pad_circular _pad_enum""",
    moves.windows: "unfold",
    moves.on_diagonal: "diag_embed",
    moves.diagonal: "diagonal linalg_diagonal",
    moves.flipped: "flip fliplr flipud msort",
    moves.sorted_along: "sort argsort topk",
    moves.rolled: "roll fft_fftshift fft_ifftshift",
    moves.rotated: "rot90",
    moves.channels_shuffled: "channel_shuffle native_channel_shuffle",
    moves.embedded: "embedding one_hot",
    moves.gathered: "gather take_along_dim",
    moves.selected: "index_select",
    moves.indexed: "index _unsafe_index",
    moves.taken: "take",
    moves.written: """index_put _index_put_impl _unsafe_index_put scatter scatter_add scatter_reduce index_add index_copy index_reduce""",
}


def _by_name(*tables: dict[Rule, str]) -> dict[str, Rule]:
    return {name: rule for table in tables for rule, names in table.items() for name in names.split()}


RULES = _by_name(_MOVES, _PLACE_BY_PLACE, _SUMS, _REORDERS)
MOVING = frozenset(_by_name(_MOVES))  # operators whose result holds an operand's numbers, one by one and in order


REFUSED = frozenset(  # public operators that have been looked at and get no rule: sparse, quantized, recurrent, sizes that are data
    """
    __interpolate __upsample __upsample_bilinear __upsample_nearest argwhere as_strided as_strided_scatter batch_norm_elemt
    batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats bincount binomial block_diag
    cartesian_prod ccol_indices cholesky_inverse choose_qparams_optimized coalesce col_indices combinations conv_tbc
    convolution_overrideable copy_sparse_to_sparse corrcoef cosine_embedding_loss cov cross_entropy_loss crow_indices ctc_loss
    cudnn_affine_grid_generator cudnn_batch_norm cudnn_convolution cudnn_convolution_add_relu cudnn_convolution_relu
    cudnn_convolution_transpose cudnn_grid_sampler cumulative_trapezoid diag diagflat diagonal_scatter dict embedding_bag
    embedding_renorm empty_quantized fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask
    fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask fbgemm_linear_fp16_weight
    fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight fbgemm_linear_int8_weight_fp32_activation
    fbgemm_linear_quantize_weight fbgemm_pack_gemm_matrix_fp16 fbgemm_pack_quantized_matrix fill_diagonal_ flatten_dense_tensors
    fractional_max_pool2d fractional_max_pool3d fused_moving_avg_obs_fake_quant geqrf glu_jvp grad gradient gru gru_cell hash_tensor
    hinge_embedding_loss histc histogram histogramdd hspmm indices int_repr istft items keys kron linalg__powsum
    linalg_householder_product linalg_ldl_factor linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor
    linalg_lu_factor_ex linalg_lu_solve linalg_matrix_rank linalg_matrix_sqrth linalg_polar linalg_solve_ex linalg_tensorinv
    linalg_tensorsolve linalg_vander lstm lstm_cell lu_solve lu_unpack margin_ranking_loss masked_scatter masked_select
    miopen_batch_norm miopen_convolution miopen_convolution_add_relu miopen_convolution_relu miopen_convolution_transpose
    miopen_ctc_loss miopen_depthwise_convolution miopen_rnn mkldnn_adaptive_avg_pool2d mkldnn_convolution mkldnn_linear
    mkldnn_max_pool2d mkldnn_max_pool3d mkldnn_reorder_conv2d_weight mkldnn_reorder_conv3d_weight mkldnn_rnn_layer multi_margin_loss
    multilabel_margin_loss multilabel_margin_loss_forward multinomial nanquantile native_norm nested_to_padded_tensor nll_loss
    nll_loss2d nll_loss2d_forward nll_loss_forward nll_loss_nd nonzero nonzero_numpy nonzero_static norm_except_dim normal_functional
    orgqr ormqr pdist popitem put q_per_channel_scales q_per_channel_zero_points quantile quantize_per_channel
    quantize_per_tensor quantize_per_tensor_dynamic quantized_batch_norm quantized_gru quantized_gru_cell quantized_lstm
    quantized_lstm_cell quantized_max_pool1d quantized_max_pool2d quantized_max_pool3d quantized_rnn_relu_cell quantized_rnn_tanh_cell
    resize resize_as resize_as_sparse rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell row_indices rrelu_with_noise_functional
    segment_reduce set shallow_copy_data_ slice_inverse slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d
    slow_conv_transpose2d slow_conv_transpose3d smm sorted sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor
    sparse_coo_tensor sparse_csc_tensor sparse_csr_tensor sparse_mask sparse_resize sparse_resize_and_clear sparse_sampled_addmm
    sspaddmm stft to_dense to_mkldnn to_padded_tensor to_sparse to_sparse_bsc to_sparse_bsr to_sparse_csc to_sparse_csr trapezoid trapz
    triplet_margin_loss unflatten_dense_tensors unique_consecutive unique_dim unique_dim_consecutive values vander
    """.split()  # noqa: SIM905
)


def operator_name(target: Any) -> str:
    """Return an operator's name as users know it: `aten.roll`, `library.operator`."""
    namespace, name = getattr(target, "namespace", ""), str(getattr(target, "__name__", target))
    packet = getattr(target, "overloadpacket", None)
    name = str(getattr(packet, "__name__", name))
    return f"{namespace}.{name}" if namespace and namespace != "higher_order" else name


@cache
def rule_of(target: Any) -> Rule | None:
    """Return an operator's rule; None if it has none, as operators of other libraries and those that call graphs have."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace != "aten":
        return same_positions if torch.Tag.pointwise in target.tags else None
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return same_positions
    packet = getattr(target, "overloadpacket", target)
    if isinstance(packet, torch._ops.HigherOrderOperator):
        return None
    for name in _plain_names(str(getattr(packet, "__name__", packet))):
        if name in RULES:
            return RULES[name]
        if _is_pointwise(name):
            return same_positions
    return None


def apply_rule(rule: Rule, call: Call) -> Axes | None:
    """Return what a rule gives; None unless it is an axis of the right size for every dimension."""
    try:
        found = rule(call)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError):  # arguments in a form that the rule does not foresee
        return None
    fits = len(found) == len(call.shape) and all(axis_size(axis) == hint(size) for axis, size in zip(found, call.shape, strict=True))
    return found if fits else None


def _plain_names(name: str) -> Iterator[str]:
    """Yield an operator's name, then that of the operator that neither writes into its operand nor copies."""
    yield name
    if name.endswith("_") and not name.endswith("__"):
        yield name[:-1]
    if name.endswith("_copy"):
        yield name.removesuffix("_copy")


def _is_pointwise(name: str) -> bool:
    """Say whether torch calls the operator of this name pointwise."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, each) for each in packet.overloads()] if packet is not None else []
    return any(torch.Tag.pointwise in each.tags for each in overloads)
