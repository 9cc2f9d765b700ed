"""Checks `.xml` and `.bin` before OpenVINO parses them: plain XML, known operations, data inside.

The check refuses document types and entities (a kilobyte of them expands to gigabytes), extensions, options that we do
not set, and constants that lie outside of the `.bin` or are larger than their stored bytes.
"""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

from torchslim.core.schema import MIB, shorten
from torchslim.errors import ArtifactError

SIZE = 64 * MIB
PARTS = 1_000_000
DEPTH = 60
ELEMENTS = 2**28
VERSIONS = re.compile(r"opset\d{1,2}|type_relaxed_opset")
REFUSED = frozenset({"Loop", "ReadValue", "Assign", "Custom", "FrameworkNode"})
GROWING = frozenset({"Broadcast", "Tile", "Range", "Pad", "OneHot", "Interpolate", "RandomUniform", "Eye"})
OPTIONS = frozenset({"DYNAMIC_QUANTIZATION_GROUP_SIZE"})
BITS = {
    "f64": 64,
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "i64": 64,
    "u64": 64,
    "i32": 32,
    "u32": 32,
    "i16": 16,
    "u16": 16,
    "i8": 8,
    "u8": 8,
    "boolean": 8,
    "i4": 4,
    "u4": 4,
    "nf4": 4,
    "u2": 2,
    "u1": 1,
    "f8e4m3": 8,
    "f8e5m2": 8,
}


def check_ir(xml: bytes, weights: bytes) -> None:
    """Check a model's files.

    Raises:
        ArtifactError: the files are damaged, or have something that no model of ours has; the message says what.
    """
    try:
        text = xml.decode()
        if len(xml) > SIZE or xml.count(b"<") > PARTS:
            raise ValueError("it is larger than any model of ours")
        if (
            "<!" in text
            or "\0" in text
            or re.search(r"<\?xml(?![^>]*encoding)[^>]*\?>.*<\?|<\?(?!xml\b)", text, re.DOTALL)
        ):
            raise ValueError("it has a document type or instructions")
        root = _parsed(text)
        _options(root)
        for layers, edges in ((net.find("layers"), net.find("edges")) for net in _nets(root)):
            _layers(layers, edges, weights)
    except (ValueError, KeyError, ElementTree.ParseError, OverflowError) as error:
        raise ArtifactError(
            f"the OpenVINO model is not loaded: {shorten(str(error), 200)[1:-1]}; save it again"
        ) from error


def _parsed(text: str) -> ElementTree.Element:
    parser: Any = ElementTree.XMLPullParser(["start", "end"])
    depth = 0
    for place in range(0, len(text), 2**16):
        parser.feed(text[place : place + 2**16])
        for event, _ in parser.read_events():
            depth += 1 if event == "start" else -1
            if depth > DEPTH:
                raise ValueError(f"it is nested deeper than {DEPTH} levels")
    parser.close()
    return ElementTree.fromstring(text)


def _nets(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [root, *root.iter("body"), *root.iter("then_body"), *root.iter("else_body")]


def _options(root: ElementTree.Element) -> None:
    for options in root.iter("runtime_options"):
        unknown = [option.tag for option in options if option.tag not in OPTIONS]
        if unknown:
            raise ValueError(f"it sets the option {unknown[0]}")


def _layers(layers: Any, edges: Any, weights: bytes) -> None:
    small: dict[str, list[int]] = {}
    growing: dict[str, str] = {}
    for layer in [] if layers is None else layers:
        kind, version = layer.get("type", ""), layer.get("version", "")
        if kind in REFUSED or not VERSIONS.fullmatch(version):
            raise ValueError(f"it has the operation {kind} of {version}")
        if kind == "Const":
            small[layer.get("id", "")] = _constant(layer.find("data"), weights)
        elif kind in GROWING:
            growing[layer.get("id", "")] = kind
    for edge in [] if edges is None else edges:
        if edge.get("to-layer") in growing:
            count = math.prod(abs(number) for number in small.get(edge.get("from-layer", ""), []) if number)
            if count > ELEMENTS:
                raise ValueError(f"it has {growing[edge.get('to-layer')]} of {count:,} elements")


def _constant(data: Any, weights: bytes) -> list[int]:
    """Check place and size of a constant; return its numbers if they are few 64-bit integers, else an empty list."""
    if data is None:
        raise ValueError("a constant has no data")
    offset, size = int(data.get("offset", "x")), int(data.get("size", "x"))
    shape = [int(part) for part in data.get("shape", "").split(",") if part.strip()]
    width = BITS[data.get("element_type", "")]
    if min([offset, size, *shape]) < 0 or offset + size > len(weights) or len(shape) > 64:
        raise ValueError("a constant lies outside of the .bin file")
    if math.prod(shape) * width > size * 8 + 64:
        raise ValueError(f"a constant of the shape {shape[:8]} has {size:,} bytes")
    if width == 64 and data.get("element_type") in ("i64", "u64") and size <= 512:
        stored = weights[offset : offset + size]
        return [int.from_bytes(stored[place : place + 8], "little", signed=True) for place in range(0, size, 8)]
    return []
