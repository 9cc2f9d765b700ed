"""Rules for Fourier transforms, and for complex numbers as pairs of real ones."""

from __future__ import annotations

from collections.abc import Sequence

from torchslim.prune.dependency.propagation import Layers
from torchslim.prune.dependency.rules.registry import Call, rule


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def transform(call: Call) -> Sequence[Layers]:
    """The transformed dimensions are mixed and stay; other dimensions pass."""
    layers, shape = call.operand(call.args[0])
    dims = [dim % len(shape) for dim in call.args[1]]
    return (call.tagger.along(layers, dims, "a Fourier transform runs along it"),)


@rule("view_as_complex")
def as_complex(call: Call) -> Sequence[Layers]:
    """Pairs along the last dimension become complex numbers."""
    layers, shape = call.operand(call.args[0])
    layers = call.tagger.along(layers, (len(shape) - 1,), "real and imaginary parts go together")
    return (tuple(core.squeeze(-1) for core in layers),)


@rule("view_as_real")
def as_real(call: Call) -> Sequence[Layers]:
    """Complex numbers become pairs along a new last dimension."""
    return (tuple(core.unsqueeze(-1) for core in call.layers_of(call.args[0])),)
