"""Mixed precision: torch.autocast("npu"), with the operators that torch's ATen/autocast_mode.h lists for any device.

A weight is cast at every use, not once in a region.
"""

import functools

import torch

_HALF = """
_convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm
chain_matmul linalg_multi_dot scaled_dot_product_attention
"""
_FLOAT32 = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim
cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss
smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
_upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d
upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
_upsample_bicubic2d_aa
"""
_FLOAT32_RESULT = """
prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
linalg_matrix_norm.str_ord sum sum.dim_IntList
"""
_FLOAT32_RESULT_ELSEWHERE = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
_WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"
_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def operator(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def register() -> list[torch.library.Library]:
    others, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, wrap in ((_HALF, _half), (_FLOAT32, _float32), (_FLOAT32_RESULT, _float32_result), (_WIDEST, _widest)):
        for name in names.split():
            library.impl(name, functools.partial(_outside, wrap, operator(name)), "AutocastPrivateUse1")
    for name, other in _FLOAT32_RESULT_ELSEWHERE.items():
        wrap = functools.partial(_outside, _float32_result_of, operator(name), operator(other))
        library.impl(name, wrap, "AutocastPrivateUse1")
    return [others, library]


def _outside(function, *args, **kwargs):
    """Without autocast in what is called."""
    with torch._C._ExcludeDispatchKeyGuard(_KEY):
        return function(*args, **kwargs)


def _half(op, *args, **kwargs):
    return _with(torch.get_autocast_dtype("npu"), op, args, kwargs)


def _float32(op, *args, **kwargs):
    return _with(torch.float32, op, args, kwargs)


def _widest(op, *args, **kwargs):
    found = [value.dtype for value in (*args, *kwargs.values()) if _floating(value)]
    return _with(torch.float32 if torch.float32 in found else torch.get_autocast_dtype("npu"), op, args, kwargs)


def _float32_result(op, *args, **kwargs):
    position = [argument.name for argument in op._schema.arguments].index("dtype")
    given = kwargs.get("dtype") or (args[position] if len(args) > position else None)
    if _floating(args[0]) and given is None:
        args, kwargs = args[:position], {**kwargs, "dtype": torch.float32}
    return op(*args, **kwargs)


def _float32_result_of(op, other, *args, **kwargs):
    if not _floating(args[0]):
        return op(*args, **kwargs)
    if op is operator("norm.ScalarOpt_dim") and len(args) < 4:
        kwargs.setdefault("keepdim", False)
    return other(*args, **kwargs, dtype=torch.float32)


def _with(dtype: torch.dtype, op, args, kwargs):
    args = [_cast(value, dtype) for value in args]
    return op(*args, **{name: _cast(value, dtype) for name, value in kwargs.items()})


def _cast(value, dtype: torch.dtype):
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(part, dtype) for part in value)
    return value.to(dtype) if _floating(value) else value


def _floating(value) -> bool:
    """Whether autocast has a say in its precision."""
    is_tensor = isinstance(value, torch.Tensor) and value.device.type == "npu"
    return is_tensor and value.is_floating_point() and value.dtype != torch.float64
