"""Mutated artifacts of the OpenVINO runtime: the elements and attributes of its `.xml`, and the numbers in its `.bin`."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from xml.etree import ElementTree

from hypothesis import strategies as st

from tests.mutations.artifacts import Files, attempt, good, hashed, shown
from tests.mutations.base import Kind, garbled

Element = ElementTree.Element
NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, -2, 255, 2**15, 2**20, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63),
    2**63, 2**64, 10**30,
)  # fmt: skip
TYPES = (
    "f32", "f16", "bf16", "f64", "i64", "i32", "i16", "i8", "u8", "u64", "i4", "u4", "u1", "u2", "nf4", "f8e4m3", "boolean",
    "string", "dynamic", "undefined", "f33", "FP32", "I64", "I4", "BOOL",
)  # fmt: skip
OPERATIONS = (
    "Parameter", "Result", "Const", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul", "Reshape",
    "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split", "VariadicSplit", "Gather", "GatherND", "GatherElements",
    "ScatterUpdate", "ScatterNDUpdate", "ScatterElementsUpdate", "StridedSlice", "Slice", "Broadcast", "Tile", "Pad",
    "Range", "OneHot", "NonZero", "TopK", "ReduceMean", "ReduceSum", "ReduceMax", "Softmax", "LogSoftmax", "Interpolate",
    "MaxPool", "AvgPool", "BatchNormInference", "MVN", "LRN", "NormalizeL2", "FakeQuantize", "Convert", "ConvertLike",
    "ShapeOf", "Add", "Subtract", "Multiply", "Divide", "Power", "Mod", "FloorMod", "ReLU", "PRelu", "Gelu", "Swish", "HardSigmoid",
    "Einsum", "GRUSequence", "LSTMSequence", "RNNSequence", "LSTMCell", "TensorIterator", "Loop", "If", "ReadValue",
    "Assign", "NonMaxSuppression", "MulticlassNms", "ROIPooling", "ROIAlign", "PSROIPooling", "DeformableConvolution",
    "DetectionOutput", "Proposal", "PriorBox", "RegionYolo", "ReorgYolo", "CTCGreedyDecoder", "CTCLoss", "EmbeddingBagOffsetsSum",
    "EmbeddingSegmentsSum", "ExtractImagePatches", "DepthToSpace", "SpaceToDepth", "SpaceToBatch", "BatchToSpace", "ShuffleChannels",
    "ReverseSequence", "Bucketize", "CumSum", "DFT", "IDFT", "RDFT", "IRDFT", "STFT", "ISTFT", "Eye", "GridSample", "Unique",
    "RandomUniform", "Multinomial", "BitwiseLeftShift", "BitwiseNot", "ScaledDotProductAttention", "PagedAttentionExtension",
    "StringTensorPack", "RMS", "Inverse", "Col2Im", "SearchSorted", "SegmentMax", "Identity", "Custom", "NoSuchOperation",
)  # fmt: skip
WORDS = (
    "", " ", "nan", "inf", "1e999", "true", "false", "x", "explicit", "same_upper", "valid", "numpy", "none", "pdpd", "opset1",
    "opset6", "opset8", "opset11", "opset13", "opset15", "opset16", "opset99", "extension", "type_relaxed_opset",
    "1,1", "1, 1, 1", "-1", "0,0", "?", "1..3", "-1,?,2..5", "1000000,1000000", "9223372036854775807,9223372036854775807",
    "3,3,8,8,", "[1,2]", "../../etc/passwd", "\u00e9", "a" * 5_000, "1," * 3_000 + "1",
)  # fmt: skip


def words() -> st.SearchStrategy[str]:
    return st.one_of(
        st.sampled_from(NUMBERS).map(str), st.sampled_from(TYPES), st.sampled_from(OPERATIONS), st.sampled_from(WORDS),
        st.integers(-3, 40).map(str),
    )  # fmt: skip


def _attribute(draw: st.DrawFn, root: Element) -> None:
    """An attribute gets another value: any, that of the same name elsewhere, or none."""
    every = [each for each in root.iter() if each.attrib]
    element = draw(st.sampled_from(every))
    name = draw(st.sampled_from(sorted(element.attrib)))
    what = draw(st.sampled_from(("put", "put", "copy", "leave out", "add", "near")))
    if what == "leave out":
        del element.attrib[name]
    elif what == "add":
        other = draw(st.sampled_from(every))
        element.attrib.update(other.attrib)
    elif what == "copy":
        alike = sorted({each.attrib[name] for each in every if name in each.attrib})
        element.set(name, draw(st.sampled_from(alike)))
    elif what == "near" and element.attrib[name].isdigit():
        element.set(name, str(int(element.attrib[name]) + draw(st.integers(-9, 9))))
    else:
        element.set(name, draw(words()))


def _operation(draw: st.DrawFn, root: Element) -> None:
    """A layer gets another operation, of another set perhaps, with its attributes."""
    layer = draw(st.sampled_from(list(root.iter("layer"))))
    layer.set("type", draw(st.sampled_from(OPERATIONS)))
    if draw(st.booleans()):
        layer.set("version", f"opset{draw(st.integers(1, 17))}")


def _edge(draw: st.DrawFn, root: Element) -> None:
    """An edge begins or ends elsewhere: cycles, missing and repeated inputs."""
    edge = draw(st.sampled_from(list(root.iter("edge"))))
    name = draw(st.sampled_from(("from-layer", "to-layer", "from-port", "to-port")))
    if name in edge.attrib:
        edge.set(name, str(draw(st.integers(0, 4 if "port" in name else 36))))


def _size(draw: st.DrawFn, root: Element) -> None:
    """A dimension of a port or of a constant."""
    dims = list(root.iter("dim"))
    shaped = [each for each in root.iter("data") if "shape" in each.attrib]
    value = str(draw(st.one_of(st.sampled_from(NUMBERS), st.integers(-2, 9))))
    if dims and (not shaped or draw(st.booleans())):
        draw(st.sampled_from(dims)).text = value
    elif shaped:
        data = draw(st.sampled_from(shaped))
        sizes = data.attrib["shape"].split(",")
        sizes[draw(st.integers(0, len(sizes) - 1))] = value
        data.set("shape", ",".join(sizes))


def _parts(draw: st.DrawFn, root: Element) -> None:
    """An element is left out, repeated, renamed, or put elsewhere."""
    parents = [each for each in root.iter() if len(each)]
    parent = draw(st.sampled_from(parents))
    child = draw(st.sampled_from(list(parent)))
    what = draw(st.sampled_from(("leave out", "repeat", "rename", "move", "text")))
    if what == "leave out":
        parent.remove(child)
    elif what == "repeat":
        parent.extend(copy.deepcopy(child) for _ in range(draw(st.integers(1, 5))))
    elif what == "rename":
        child.tag = draw(st.sampled_from(("layer", "layers", "edges", "edge", "data", "input", "output", "port", "dim", "body",
                                          "rt_info", "runtime_options", "port_map", "x")))  # fmt: skip
    elif what == "move":
        draw(st.sampled_from(parents)).append(copy.deepcopy(child))
    else:
        child.text = draw(words())


CHANGES: tuple[Callable[[st.DrawFn, Element], None], ...] = (
    _attribute, _attribute, _attribute, _operation, _edge, _size, _parts,
)  # fmt: skip


def _numbers(draw: st.DrawFn, root: Element, weights: bytearray) -> None:
    """A constant gets other numbers, often those that say a shape, an axis or a place."""
    stored = [each for each in root.iter("data") if each.get("offset", "").isdigit() and each.get("size", "").isdigit()]
    stored = [each for each in stored if int(each.attrib["offset"]) + 8 <= len(weights)]
    if not stored:
        return
    whole = [each for each in stored if each.get("element_type") == "i64"]
    data = draw(st.sampled_from(whole if whole and draw(st.integers(0, 3)) else stored))
    place = int(data.attrib["offset"]) + 8 * draw(st.integers(0, max(int(data.attrib["size"]) // 8 - 1, 0)))
    value = draw(st.one_of(st.sampled_from(NUMBERS), st.integers(-5, 12))) % 2**64
    if place + 8 <= len(weights):
        struct.pack_into("<Q", weights, place, value)


@st.composite
def models(draw: st.DrawFn) -> Files:
    """One to three changes of the `.xml`, of the numbers in the `.bin`, or of the bytes of either."""
    files = good(draw(st.sampled_from(("openvino", "openvino int8"))))
    what = draw(st.sampled_from(("xml",) * 6 + ("numbers", "numbers", "both", "cut", "text")))
    if what == "text":
        text = draw(garbled(st.just(files["model.xml"].decode())))
        return hashed(files | {"model.xml": text.encode("utf-8", "surrogatepass")})
    root, weights = ElementTree.fromstring(files["model.xml"]), bytearray(files["model.bin"])
    for _ in range(draw(st.integers(1, 3))):
        if what in ("numbers", "both"):
            _numbers(draw, root, weights)
        if what in ("xml", "both"):
            draw(st.sampled_from(CHANGES))(draw, root)
    if what == "cut":
        del weights[draw(st.integers(0, len(weights))) :]
    return hashed(files | {"model.xml": ElementTree.tostring(root), "model.bin": bytes(weights)})


KINDS_OF_OPENVINO = (
    Kind(name="artifact openvino", group="artifacts", examples=models(), attempt=attempt, shown=shown),
)
