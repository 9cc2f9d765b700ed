"""Quantization schemes: bits of weights and activations, a row for each scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from torchslim.core.hardware import saturates
from torchslim.errors import QuantizeError

OBSERVERS = ("min-max", "moving-average", "percentile", "mse", "entropy")  # their code is loaded when one is used
FLOAT = "float"  # name of the scheme of layers that stay in float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Bits of the weights, and how activations become integers.

    Args:
        weight_bits: 8 (a scale per channel) or 4 (a scale per group).
        activations: "static": 8 bits, ranges calibrated; "dynamic": 8 bits, the range of each call; "float".
        group_size: how many weights share a scale; None: those of a channel.
    """

    weight_bits: int
    activations: Literal["static", "dynamic", "float"]
    about: str
    group_size: int | None = None

    @property
    def activation_bits(self) -> int | None:
        """Bits of activations; None where they stay float."""
        return None if self.activations == "float" else 8


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(
        weight_bits=8,
        activations="static",
        about="static: weights int8 symmetric per channel, activations uint8 affine per tensor (Jacob 2018)",
    ),
    "int8-dynamic": Scheme(
        weight_bits=8,
        activations="dynamic",
        about="weights int8 per channel, activations 8 bits with ranges of a call: by sample or token for linear, "
        "of the whole batch for LSTM and GRU",
    ),
    "int8-weights": Scheme(
        weight_bits=8,
        activations="float",
        about="weights int8 per channel, computing in float: a quarter of the bytes",
    ),
    "int4-weights": Scheme(
        weight_bits=4,
        activations="float",
        group_size=32,
        about="weights int4, a scale for 32 of them, computing in float: an eighth of the bytes",
    ),
}

# eager computes on dequantized floats
INTEGER_RUNTIMES = frozenset({"onnxruntime", "openvino", "inductor", "aoti", "executorch"})
SATURATING = INTEGER_RUNTIMES - {"executorch"}  # XNNPACK adds products in 32 bits


def find_scheme(name: str) -> Scheme:
    """The scheme with this name."""
    if name not in SCHEMES:
        near = get_close_matches(name, SCHEMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise QuantizeError(f"scheme {name!r} is not known; {hint}one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def weight_range(runtime: str, scheme: Scheme | None = None) -> tuple[int, int]:
    """Smallest and largest integer that weights may take on a runtime, with this machine's instruction set.

    Without VNNI, x86 adds two u8 x s8 products in 16 bits, which saturates; 7-bit weights cannot overflow there:
    2 * 255 * 63 < 2**15.
    """
    if scheme is not None and scheme.weight_bits == 4:
        return (-7, 7)
    on_integers = scheme is None or scheme.activations != "float"
    return (-63, 63) if on_integers and runtime in SATURATING and saturates() else (-127, 127)
