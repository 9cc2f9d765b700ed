"""Operators that a saved program may call: those that exporting emits, from torch's own tables, if they are pure.

An operator of ATen is allowed if torch tags it as core, decomposes it, or defines it by other operators, or if the ONNX
exporter translates it. It must also take tensors and numbers, return tensors or numbers, and touch nothing else: no
file, no storage, no global state, no random seed. Text arguments must have a value that is listed for their name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

Target = Any

SYMBOLIC = frozenset(
    re.findall(
        r"\S+",
        """_operator.eq _operator.ne _operator.le _operator.ge _operator.lt _operator.gt _operator.neg _operator.pos
    _operator.mul _operator.add _operator.sub _operator.floordiv _operator.mod _operator.pow _operator.truediv
    _operator.and_ _operator.or_ _operator.lshift _operator.rshift _operator.getitem _operator.abs math.trunc math.ceil
    math.floor math.sqrt torch.sym_not torch.sym_int torch.sym_float torch.sym_ite torch.sym_max torch.sym_min
    torch.sym_sum torch.sym_sqrt torch._sym_sqrt""",
    )
)
"""Operators of arithmetic on sizes."""

HIGHER_ORDER = frozenset({"cond", "scan", "map_impl", "wrap_with_set_grad_enabled", "wrap_with_autocast"})
"""Operators that call a part of the program; loops of unknown length are left out."""

# exporting keeps these and the ONNX exporter translates most of them, but no table of torch has them
ALSO = frozenset(
    re.findall(
        r"\S+",
        """addbmm aminmax baddbmm batch_norm bincount blackman_window broadcast_to conj contiguous cummax cummin dropout
    dropout_ embedding_renorm expand_as fractional_max_pool2d fractional_max_pool3d geqrf hamming_window histc item
    kaiser_window kthvalue lift_fresh_copy linalg_eig linalg_lu linalg_qr linalg_solve_triangular
    linalg_householder_product logcumsumexp masked_scatter masked_scatter_ masked_select median mode multinomial
    nanmedian new_empty_strided nonzero_static normal_functional ormqr put randint randint_like rand_like randn_like
    reshape_as resolve_conj resolve_neg rms_norm scatter_reduce searchsorted sort sym_constrain_range
    sym_constrain_range_for_size sym_size take to triangular_solve tril_indices unfold unique_consecutive unique_dim
    unflatten view_as view_as_complex view_as_real cartesian_prod""",
    )
)

PRIVATE = frozenset(
    re.findall(
        r"\S+",
        """__and__ __iand__ __or__ __ior__ __xor__ __ixor__ __lshift__ __ilshift__ __rshift__ __irshift__
    _adaptive_avg_pool2d _adaptive_avg_pool3d _addmm_activation _assert_async _assert_scalar _assert_tensor_metadata
    _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short _cdist_forward _conj
    _convolution _convolution_mode _embedding_bag _euclidean_dist _fused_rms_norm _grouped_mm _linalg_det _linalg_eigh
    _linalg_svd _local_scalar_dense _log_softmax _native_batch_norm_legit _native_batch_norm_legit_no_training
    _native_multi_head_attention _pad_circular _pad_enum _pdist_forward _prelu_kernel _safe_softmax
    _scaled_dot_product_attention_math _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _transformer_encoder_layer_fwd _unique _unique2
    _unsafe_index _unsafe_index_put _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm
    _weight_norm_interface""",
    )
)
"""Private operators of ATen that exporting emits; others may not check their arguments."""

IMPURE = re.compile(
    r"from_file|save|warn|set_.*|set|.*(resize|storage(?!_offset)|sparse|cudnn|cufft|miopen|mkldnn|nnpack|vulkan|xla|cuda|"
    r"fbgemm|quantized|nested|pin_memory|pinned|seed|autocast|backward|grad).*|data|output_nr|is_leaf|get_device|"
    r"record_.*|infinitely_.*|choose_qparams_optimized|to_dense|coalesce|smm|sspaddmm|segment_reduce|"
    r"fused_moving_avg.*|flatten_dense_tensors|unflatten_dense_tensors|is_distributed|is_inference"
)
"""Refused operators: those of files, storage, seeds, other devices, training and packed formats."""

NUMBERS = frozenset(
    {
        "int",
        "float",
        "bool",
        "number",
        "SymInt",
        "SymFloat",
        "SymBool",
        "Device",
        "str",
        "complex",
        "ScalarType",
        "Layout",
        "MemoryFormat",
        "Scalar",
    }
)
TEXTS: dict[str, tuple[str, ...]] = {
    "approximate": ("none", "tanh"),
    "rounding_mode": ("trunc", "floor"),
    "padding": ("same", "valid"),
    "reduce": ("sum", "prod", "mean", "amax", "amin", "add", "multiply", "max", "min"),
    "indexing": ("ij", "xy"),
    "interpolation": ("linear", "nearest", "lower", "higher", "midpoint"),
    "norm": ("forward", "backward", "ortho"),
    "mode": ("constant", "reflect", "replicate", "circular", "reduced", "complete", "r"),
    "pad_mode": ("constant", "reflect", "replicate", "circular"),
    "padding_side": ("left", "right"),
    "side": ("left", "right"),
    "UPLO": ("L", "U"),
    "ord": ("fro", "nuc"),
    "p": ("fro", "nuc"),
    "driver": ("gels", "gelsy", "gelsd", "gelss", "gesvd", "gesvdj", "gesvda"),
    "device_type": ("cpu",),
}
"""Allowed values of text arguments, by argument name. Texts of assertions are replaced, and `equation` is checked."""
EQUATION = re.compile(r"[A-Za-z.,>\- ]{1,500}")
MESSAGES = ("msg", "assert_msg")
QUANTIZED = re.compile(
    r"(de)?quantize_per_(tensor|channel|token|channel_group)|choose_qparams(_symmetric|_per_token|_per_token_asymmetric)?|"
    r"convert_element_type|fake_quant_per_channel"
)


@functools.cache
def resolve(target: str) -> Target | None:
    """The operator that a program names, or None where programs may not call it."""
    if target in SYMBOLIC:
        return target
    parts = target.split(".")
    if parts[:2] != ["torch", "ops"] or len(parts) not in (4, 5) or not all(part.isidentifier() for part in parts):
        return None
    namespace, name, overload = parts[2], parts[3], parts[4] if len(parts) == 5 else ""
    if namespace == "higher_order":
        return target if name in HIGHER_ORDER and not overload else None
    matchers: dict[str, Callable[[str], Any]] = {"aten": _emitted, "quantized_decomposed": QUANTIZED.fullmatch}
    if namespace not in matchers or not overload or not matchers[namespace](name):
        return None
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None or overload not in packet.overloads():
        return None
    operator = getattr(packet, overload)
    return operator if torch._C._dispatch_has_kernel(operator.name()) and _pure(operator._schema) else None


def text_allowed(argument: str, text: str) -> bool:
    """Whether an argument of this name may have this text."""
    if argument == "equation":
        return bool(EQUATION.fullmatch(text))
    return text in TEXTS.get(argument, ())


def _emitted(name: str) -> bool:
    """Whether exporting emits this operator of ATen, by torch's own tables and the lists of this module."""
    if IMPURE.fullmatch(name):
        return False
    if name.startswith("_"):
        return name in PRIVATE
    if name in ALSO or name in _decomposed():
        return True
    base = name.removesuffix("_")
    if base != name and not base.endswith("_") and base:  # in place
        return _emitted(base)
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(_in_tables(getattr(packet, overload)) for overload in packet.overloads())


def _in_tables(operator: Any) -> bool:
    if not torch._C._dispatch_has_kernel(operator.name()):  # an operator of TorchScript only
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
    return bool(composite) or torch.Tag.core in operator.tags or torch.Tag.pointwise in operator.tags


@functools.cache
def _decomposed() -> frozenset[str]:
    from torch._decomp import decomposition_table

    return frozenset(
        str(operator).split(".")[1] for operator in decomposition_table if str(operator).startswith("aten.")
    )


def _pure(schema: Any) -> bool:
    """Whether an operator takes and returns tensors and numbers only, and writes at most to what it is called on."""
    for argument in schema.arguments:
        if argument.name == "generator":
            continue  # a program cannot hold a generator
        if not _plain(str(argument.type)) or (argument.is_out and argument.alias_info is not None):
            return False
    has_tensors = any("Tensor" in str(value.type) for value in (*schema.arguments, *schema.returns))
    checks_sizes = schema.name.startswith("aten::sym_constrain_range") or schema.name == "aten::_assert_scalar"
    return (has_tensors or checks_sizes) and all(_plain(str(return_.type)) for return_ in schema.returns)


def _plain(kind: str) -> bool:
    inner = kind
    while (match := re.fullmatch(r"(?:Optional|List)\[(.*)\]", inner)) is not None:
        inner = match[1]
    return inner == "Tensor" or inner in NUMBERS or inner == "NoneType"
