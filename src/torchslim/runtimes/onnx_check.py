"""Checks an `.onnx` file byte by byte before a runtime parses it: known fields, known operations, bounded sizes.

The format is that of onnx.proto. Contents that our files never have are refused: data in other files, operations of
other libraries, loops, sparse or text tensors, training parts, single fields that come twice. Parts are counted before
any object is made: an empty node of two bytes takes a hundred in memory.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torchslim.core.schema import shorten
from torchslim.errors import ArtifactError

PARTS = 1_000_000
DEPTH = 24
ELEMENTS = 2**28
"""The most elements of a value whose sizes the file states; a new session computes such values at once."""

NUMBER, BYTES = "number", "bytes"
# kinds of the fields of each message, by number; fields with a star may come more than once
FIELDS: dict[str, dict[int, str]] = {
    "model": {
        1: NUMBER,
        2: BYTES,
        3: BYTES,
        4: BYTES,
        5: NUMBER,
        6: BYTES,
        7: "graph",
        8: "opset*",
        14: "entry*",
        25: "function*",
    },
    "graph": {1: "node*", 2: BYTES, 5: "tensor*", 10: BYTES, 11: "value*", 12: "value*", 13: "value*", 16: "entry*"},
    "node": {1: "bytes*", 2: "bytes*", 3: BYTES, 4: BYTES, 5: "attribute*", 6: BYTES, 7: BYTES, 8: BYTES, 9: "entry*"},
    "attribute": {
        1: BYTES,
        2: NUMBER,
        3: NUMBER,
        4: BYTES,
        5: "tensor",
        6: "graph",
        7: "number*",
        8: "number*",
        9: "bytes*",
        10: "tensor*",
        11: "graph*",
        13: BYTES,
        14: "type",
        15: "type*",
        20: NUMBER,
        21: BYTES,
    },
    "tensor": {
        1: "number*",
        2: NUMBER,
        4: "number*",
        5: "number*",
        7: "number*",
        8: BYTES,
        9: BYTES,
        10: "number*",
        11: "number*",
        12: BYTES,
        14: NUMBER,
        16: "entry*",
    },
    "value": {1: BYTES, 2: "type", 3: BYTES, 4: "entry*"},
    "type": {1: "tensor type", 6: BYTES},
    "tensor type": {1: NUMBER, 2: "shape"},
    "shape": {1: "dimension*"},
    "dimension": {1: NUMBER, 2: BYTES, 3: BYTES},
    "opset": {1: BYTES, 2: NUMBER},
    "entry": {1: BYTES, 2: BYTES},
    "function": {
        1: BYTES,
        4: "bytes*",
        5: "bytes*",
        6: "bytes*",
        7: "node*",
        8: BYTES,
        9: "opset*",
        10: BYTES,
        11: "attribute*",
        12: "value*",
        13: BYTES,
        14: "entry*",
    },
}
STANDARD = frozenset({"", "ai.onnx"})
MICROSOFT = "com.microsoft"
# operations that torch's ONNX exporter, its optimizer and our own passes write
OPERATIONS = frozenset(
    re.findall(
        r"\S+",
        """Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
        Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike Ceil Celu
        Clip Col2Im Compress Concat ConcatFromSequence Constant ConstantOfShape Conv ConvInteger
        ConvTranspose Cos Cosh CumSum DFT DepthToSpace DequantizeLinear Det Div Dropout
        DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
        GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample
        GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Identity If InstanceNormalization
        IsInf IsNaN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool
        MatMul MatMulInteger Max MaxPool MaxRoiPool MeanVarianceNormalization Mean Min Mish Mod Mul
        Multinomial Neg NegativeLogLikelihoodLoss NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow
        QLinearConv QLinearMatMul QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike
        RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
        ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
        ReverseSequence RoiAlign RotaryEmbedding Round STFT Scan ScatterElements ScatterND Selu SequenceAt
        SequenceConstruct SequenceEmpty SequenceInsert SequenceLength Shape Shrink Sigmoid Sign Sin Sinh
        Size Slice Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt
        Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Where Xor""",
    )
)
MICROSOFT_OPERATIONS = frozenset(
    re.findall(
        r"\S+",
        """MatMulNBits DequantizeLinear QuantizeLinear DynamicQuantizeLSTM DynamicQuantizeMatMul MatMulIntegerToFloat
        FusedMatMul FusedConv FusedGemm Gelu FastGelu BiasGelu QuickGelu QGemm QLinearAdd QLinearMul
        QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QLinearConcat QLinearAveragePool
        QLinearGlobalAveragePool SkipLayerNormalization MultiHeadAttention RotaryEmbedding""",
    )
)
GROWING = frozenset(
    {"ConstantOfShape", "Expand", "Tile", "Range", "Pad", "OneHot", "Resize", "RandomNormal", "RandomUniform"}
)


@dataclass
class _Seen:
    """Counts and findings of one walk over a file."""

    parts: int = 0
    small: dict[bytes, list[int]] = field(default_factory=dict)  # integers stored in the file, by the name of the value
    growing: list[tuple[str, list[bytes]]] = field(default_factory=list)
    calls: set[tuple[str, str]] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)


def check_onnx(data: bytes) -> None:
    """Check a whole file.

    Raises:
        ArtifactError: the file is damaged, or has something that no model of ours has; the message says what.
    """
    seen = _Seen()
    try:
        _message(memoryview(data), "model", seen, 0)
    except (IndexError, struct.error, ValueError, OverflowError) as error:
        raise ArtifactError(f"the .onnx file is damaged: {error}; copy it again") from error
    for domain, name in sorted(seen.calls):
        allowed = (domain in STANDARD and name in OPERATIONS) or (domain == MICROSOFT and name in MICROSOFT_OPERATIONS)
        if not allowed and (domain, name) not in seen.functions:
            raise ArtifactError(
                f"the .onnx file calls {shorten(name)} of the library {shorten(domain)}, which no model of ours does; "
                "it is not loaded"
            )
    for name, inputs in seen.growing:
        constants = [seen.small.get(input_, []) for input_ in inputs]
        largest = max((math.prod(abs(number) for number in values if number) for values in constants), default=1)
        if largest > ELEMENTS:
            raise ArtifactError(f"the .onnx file has {name} of {largest:,} elements; it is not loaded")


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Yield number, wire type and content of the fields of a message."""
    place, end = 0, len(data)
    while place < end:
        key, place = _varint(data, place)
        wire = key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield key >> 3, wire, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of the unknown kind {wire}")
        if place + length > end:
            raise ValueError("a field ends after its message")
        yield key >> 3, wire, data[place : place + length]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _message(data: memoryview, kind: str, seen: _Seen, depth: int) -> dict[int, list[Any]]:
    """Check a message and the messages inside; return those of its fields that the callers need, by number."""
    if depth > DEPTH:
        raise ValueError(f"nested deeper than {DEPTH} levels")
    fields: dict[int, list[Any]] = {}
    for number, wire, content in _fields(data):
        seen.parts += 1
        if seen.parts > PARTS:
            raise ValueError(f"more than {PARTS:,} parts")
        declared = FIELDS[kind].get(number)
        if declared is None:
            reason = "data in another file" if (kind, number) == ("tensor", 13) else f"the field {number} of a {kind}"
            raise ValueError(f"it has {reason}, which no model of ours has")
        field_kind = declared.rstrip("*")
        if number in fields and field_kind == declared:
            raise ValueError(f"the field {number} of a {kind} comes twice")
        if field_kind != NUMBER and wire != 2:
            raise ValueError(f"the field {number} of a {kind} is no {field_kind}")
        if field_kind in (NUMBER, BYTES):
            value: Any = content
        else:
            value = _message(content, field_kind, seen, depth + 1)
        fields.setdefault(number, []).append(value)
    if kind == "node":
        _node(fields, seen)
    elif kind == "tensor":
        _tensor(fields, len(data), seen)
    elif kind == "function":
        seen.functions.add((_text(fields.get(10)), _text(fields.get(1))))
        nested = {_text(node.get(7)) for node in fields.get(7, [])} - STANDARD - {MICROSOFT}
        if nested:
            raise ValueError("a function calls another one")
    return (
        fields if kind in ("tensor", "node", "attribute") else {key: fields[key] for key in (1, 7, 10) if key in fields}
    )


def _text(values: list[Any] | None) -> str:
    return "" if not values else bytes(values[-1][:200]).decode()


def _node(node: dict[int, list[Any]], seen: _Seen) -> None:
    name = _text(node.get(4))
    seen.calls.add((_text(node.get(7)), name))
    if name in GROWING:
        seen.growing.append((name, [bytes(input_[:1000]) for input_ in node.get(1, [])]))
    for attribute in node.get(5, []):
        values = attribute.get(5) if name == "Constant" else None
        numbers = values[0].get(0) if values else None
        if numbers:
            for output in node.get(2, []):
                seen.small[bytes(output[:1000])] = numbers
        if name in ("RandomNormal", "RandomUniform") and _text(attribute.get(1)) == "shape":
            seen.small[b"shape of a random value"] = _numbers(attribute.get(8, []))
            seen.growing.append((name, [b"shape of a random value"]))


def _numbers(fields: list[Any]) -> list[int]:
    """Integers of a repeated field, packed or one by one."""
    numbers: list[int] = []
    for content in fields:
        if isinstance(content, int):
            numbers.append(content)
            continue
        place = 0
        while place < len(content):
            value, place = _varint(content, place)
            numbers.append(value)
        if len(numbers) > 4096:
            break
    return [number - 2**64 if number >= 2**63 else number for number in numbers]


def _tensor(tensor: dict[int, list[Any]], length: int, seen: _Seen) -> None:
    """Check that a tensor holds as many values as its sizes say; remember small tensors of 64-bit integers."""
    sizes = _numbers(tensor.get(1, []))
    count = math.prod(sizes)
    if len(sizes) > 64 or min(sizes, default=0) < 0 or count > 2 * length:
        raise ValueError(f"a tensor of the sizes {sizes[:8]} has {length:,} bytes")
    if tensor.get(14, [0])[-1] != 0:
        raise ValueError("it has data in another file, which no model of ours has")
    if tensor.get(2, [0])[-1] == 7 and count <= 64:
        raw = bytes(tensor[9][0]) if 9 in tensor else b""
        numbers = (
            list(struct.unpack(f"<{len(raw) // 8}q", raw[: len(raw) // 8 * 8])) if raw else _numbers(tensor.get(7, []))
        )
        if 8 in tensor:
            seen.small[bytes(tensor[8][0][:1000])] = numbers
        tensor[0] = numbers  # for the `Constant` node that holds the tensor
