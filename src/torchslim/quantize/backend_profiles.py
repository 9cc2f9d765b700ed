"""Placement of Q/DQ pairs with which a runtime's compiler finds its integer kernels: one row per runtime.

The arithmetic is the same everywhere. Runtimes differ in the pairs that they need for fusion and in those that cost
them time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The operations that one runtime computes on integers, and the Q/DQ pairs that it needs for them.

    Args:
        static: kinds of layers with a kernel for static int8; others store weights in int8 and compute in float.
        dynamic: kinds of layers with a kernel for dynamic int8.
        narrow: the most outputs of a linear layer that is faster in float, because rounding its input at each call
            takes longer than the whole product in float.
        outputs: kinds of layers whose output gets its own pair, behind a fused relu or relu6.
        additions: residual additions get pairs on "both" inputs and the output, on the "other" input (not the output
            of the convolution whose kernel adds it at the end), or on "none".
        concats: whether concatenations get pairs on their inputs and output.
        gates: whether sigmoids of convolutions (then table lookups) and their products (then on integers) get pairs.
        products: whether products of two activations, as in attention, get pairs on their inputs.
        why: reason recorded for a layer without a kernel.
    """

    static: frozenset[str]
    dynamic: frozenset[str]
    narrow: int = 0
    outputs: frozenset[str] = frozenset()
    additions: Literal["both", "other", "none"] = "none"
    concats: bool = False
    gates: bool = False
    products: bool = False
    why: str


PROFILES: Mapping[str, Profile] = {
    # falls back to float unless every pair is there; no integer kernel for transposed convolutions
    "onnxruntime": Profile(
        static=CONVOLUTIONS | {"linear"},
        dynamic=frozenset({"linear", "lstm"}),
        narrow=16,  # 1.6 to 3 times as fast, for 64 to 1,024 inputs and 1 to 256 rows; with 128 outputs it depends
        outputs=CONVOLUTIONS | {"linear"},
        additions="both",
        concats=True,
        gates=True,
        products=True,
        why="ONNX Runtime has no integer kernel for it",
    ),
    # computes a layer on integers only between two pairs; no integer kernel for volumes
    "executorch": Profile(
        static=frozenset({"conv1d", "conv2d", "linear", "conv_transpose2d"}),
        dynamic=frozenset({"linear"}),
        outputs=frozenset({"conv1d", "conv2d", "linear", "conv_transpose2d"}),
        additions="both",
        concats=True,
        why="XNNPACK has no integer kernel for it",
    ),
    # fuses activations and additions into the layer: a pair in between would prevent that
    "openvino": Profile(
        static=CONVOLUTIONS | {"linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"},
        dynamic=frozenset({"linear"}),
        additions="other",
        why="OpenVINO has no integer kernel for it",
    ),
    "inductor": Profile(
        static=frozenset({"conv1d", "conv2d", "linear"}),
        dynamic=frozenset({"linear"}),
        additions="other",
        why="inductor has no integer kernel for it",
    ),
    "aoti": Profile(
        static=frozenset({"conv1d", "conv2d", "linear"}),
        dynamic=frozenset({"linear"}),
        additions="other",
        why="inductor has no integer kernel for it",
    ),
    # computes static int8 on dequantized floats: all placements are equally fast
    "eager": Profile(
        static=CONVOLUTIONS | {"linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"},
        dynamic=frozenset({"linear", "lstm", "gru"}),
        additions="other",
        why="PyTorch has no integer kernel for it",
    ),
}
