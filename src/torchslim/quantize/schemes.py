"""Which numbers: a row for each quantization scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchslim.errors import QuantizeError
from torchslim.machine import saturates


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Bits of weights and activations, and which layers it is made for."""

    weight_bits: int
    activation_bits: int
    about: str


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(
        weight_bits=8,
        activation_bits=8,
        about="static: weights int8 symmetric per channel, activations uint8 affine per tensor (Jacob 2018)",
    ),
}

INTEGER_RUNTIMES = frozenset({"onnxruntime", "inductor"})  # eager computes on dequantized floats


def find_scheme(name: str) -> Scheme:
    """A scheme by its name."""
    if name not in SCHEMES:
        raise QuantizeError(f"scheme {name!r} is not known; one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def weight_range(runtime: str) -> tuple[int, int]:
    """The integers that weights may take on a runtime, on this machine's instruction set.

    Without VNNI, x86 adds two u8 x s8 products in 16 bits, which saturates; 7-bit weights cannot overflow there:
    2 * 255 * 64 < 2**15.
    """
    return (-64, 63) if runtime in INTEGER_RUNTIMES and saturates() else (-127, 127)
