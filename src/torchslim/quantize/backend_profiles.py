"""Where Q/DQ pairs go so that a runtime's compiler finds its integer kernels: a row for each runtime.

The sums are the same everywhere; what differs is which pairs a runtime needs before it fuses, and which cost it time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one runtime computes on integers, and how it wants to be told.

    Args:
        static: kinds of layers with a kernel for static int8; others keep their weights in int8 and compute in float.
        dynamic: kinds of layers with a kernel for dynamic int8.
        outputs: kinds whose output gets a pair of its own, behind a fused relu or relu6.
        additions: residual additions get pairs on "both" inputs and the output, on the "other" input (the one that is
            no convolution's, which the kernel adds at the end), or on "none".
        concats: concatenations get pairs on their inputs and output.
        gates: sigmoids of convolutions, and what they multiply, get pairs: a table, and a product on integers.
        products: products of two activations, those of attention, get pairs on their inputs.
        why: the reason that is recorded for a layer without a kernel.
    """

    static: frozenset[str]
    dynamic: frozenset[str]
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
        outputs=CONVOLUTIONS | {"linear"},
        additions="both",
        concats=True,
        gates=True,
        products=True,
        why="ONNX Runtime has no integer kernel for it",
    ),
    # fuses activations and additions into the layer: a pair in between would cut it in two
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
    # computes static int8 on dequantized floats: any placement is as fast
    "eager": Profile(
        static=CONVOLUTIONS | {"linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"},
        dynamic=frozenset({"linear", "lstm", "gru"}),
        additions="other",
        why="PyTorch has no integer kernel for it",
    ),
}
