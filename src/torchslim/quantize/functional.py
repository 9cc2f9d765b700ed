"""Quantization outside of a run: a model in, a quantized and verified model out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.arguments import checks_arguments
from torchslim.core.checks import got, shown
from torchslim.core.infinities import difference, energy
from torchslim.core.isolation import quiet, warn
from torchslim.core.step import Inputs
from torchslim.errors import ExportError, QuantizeError
from torchslim.graph.calling import tensors_of
from torchslim.quantize.accuracy_options import Helpers
from torchslim.quantize.checks import Checks
from torchslim.quantize.conversion import integers
from torchslim.quantize.modules import Prepared, QuantizedModule
from torchslim.quantize.preparation import Layers, prepare
from torchslim.quantize.schemes import SCHEMES


@checks_arguments(QuantizeError)
def static(
    model: nn.Module,
    batches: Iterable[Inputs],
    *,
    scheme: str = "int8",
    layers: Layers | None = None,
    runtime: str = "onnxruntime",
    observer: str = "mse",
    helpers: Helpers | None = None,
    checks: Checks | None = Checks(),  # noqa: B008 - frozen
) -> nn.Module:
    """A quantized copy of `model`, calibrated on `batches`, called like the model.

    Args:
        model: a float module; it is left as it was.
        batches: model inputs, each a tuple of positional or a dict of keyword arguments; 100 to 500 samples do.
        scheme: a name of `SCHEMES`.
        layers: schemes, or "float", by glob over layers or "type:NAME".
        runtime: where it will run; elsewhere it is right, perhaps slower.
        observer: of the activations, a name of `OBSERVERS`.
        helpers: what is done for accuracy besides.
        checks: what must hold of the result, here and deployed: layers that lose an output or a channel of it go back
            to float, with a warning. None: nothing is checked.

    Raises:
        QuantizeError: no batches, values that are not finite, nothing to quantize, or checks that cannot hold.
        ExportError: the model cannot be captured; names the line of its code.
    """
    given = list(batches)
    if not given:
        raise QuantizeError("no calibration batches were given; 100 to 500 samples of real data will do")
    prepared = prepare(
        model,
        given[0],
        runtime=runtime,
        scheme=scheme,
        layers=layers,
        observer=observer,
        helpers=helpers,
        batches=given,
    )
    prepared.calibrate(given)
    made = converted(prepared, checks)
    _warn(made)
    return made


@checks_arguments(QuantizeError)
def dynamic(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    layers: Layers | None = None,
    runtime: str = "onnxruntime",
    checks: Checks | None = Checks(),  # noqa: B008 - frozen
) -> nn.Module:
    """A copy of `model` whose linear, LSTM and GRU layers compute on integers with the range of each call.

    Args:
        model: a float module; it is left as it was.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        layers: schemes, or "float", by glob over layers or "type:NAME".
        runtime: where it will run.
        checks: as of `static`; looked at on the example inputs.
    """
    made = converted(prepare(model, example_inputs, runtime=runtime, scheme="int8-dynamic", layers=layers), checks)
    _warn(made)
    return made


@checks_arguments(QuantizeError)
def weights(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    bits: int = 8,
    layers: Layers | None = None,
    runtime: str = "onnxruntime",
    helpers: Helpers | None = None,
    batches: Iterable[Inputs] = (),
    checks: Checks | None = Checks(),  # noqa: B008 - frozen
) -> nn.Module:
    """A copy of `model` that stores its weights as integers and computes in float.

    Args:
        model: a float module; it is left as it was.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        bits: 8, a scale for each channel, or 4, a scale for each group of 32.
        layers: schemes, or "float", by glob over layers or "type:NAME".
        runtime: where it will run.
        helpers: what is done for accuracy besides, such as `Helpers(rounding="gptq")`.
        batches: model inputs that the helpers look at, and that the result is checked on; by default the example.
        checks: as of `static`.
    """
    scheme = f"int{bits}-weights"
    if scheme not in SCHEMES:
        raise QuantizeError(f"bits must be 8 or 4, got {bits}")
    given = list(batches)
    helpers = helpers or Helpers()
    if helpers.needs_data and not given:
        raise QuantizeError("the helpers for accuracy look at data: give batches of model inputs")
    prepared = prepare(
        model, example_inputs, runtime=runtime, scheme=scheme, layers=layers, helpers=helpers, batches=given
    )
    if helpers.needs_data:
        prepared.calibrate(given)
    prepared.show(given)
    made = converted(prepared, checks)
    _warn(made)
    return made


def converted(prepared: Prepared, checks: Checks | None) -> QuantizedModule:
    """As `convert`, without its warnings: they are the model's notes."""
    if (checks := Checks.of(checks)) is None:
        return integers(prepared)
    with quiet():
        from torchslim.quantize.rollback import verified
    return verified(prepared, checks)


def sqnr(reference: Any, value: Any) -> float:
    """Signal to quantization noise in dB over all floating-point outputs: 10 log10(|a|^2 / |a - b|^2).

    Infinities that both have in the same places count nothing; others, and NaN, make it -inf.

    Args:
        reference: outputs of the float model: a tensor, or tensors in tuples, lists, dicts or dataclasses.
        value: outputs of the quantized model, of the same shapes.

    Raises:
        QuantizeError: no floating-point tensors, or others in number or shape.
    """
    if isinstance(reference, Mapping) and isinstance(value, Mapping):
        if set(reference) != set(value):
            raise QuantizeError(
                f"reference and value must have the same keys, got {shown(list(reference))} and {shown(list(value))}"
            )
        value = {name: value[name] for name in reference}
    expected, found = _floats(reference, "reference"), _floats(value, "value")
    shapes = [[tuple(each.shape) for each in several] for several in (expected, found)]
    if shapes[0] != shapes[1]:
        raise QuantizeError(
            f"reference and value must have the same shapes, got {shown(shapes[0])} and {shown(shapes[1])}; give the "
            "outputs of both models on the same inputs"
        )
    return decibels(expected, found)


def decibels(reference: Iterable[Tensor], value: Iterable[Tensor]) -> float:
    """As `sqnr`, of tensors of any type: those of floating point count."""
    signal = noise = 0.0
    for a, b in zip(reference, value, strict=True):
        if not a.is_floating_point():
            continue
        a, b = a.detach().cpu(), b.detach().cpu()
        signal += energy(a)
        noise += float(difference(a, b).square().sum())
    if noise == 0:
        return float("inf")
    if not math.isfinite(noise):
        return float("-inf")
    return 10 * math.log10(signal / noise) if signal else float("-inf")


def _floats(value: Any, name: str) -> list[Tensor]:
    """The floating-point tensors of outputs; a complex one as its real and imaginary parts."""
    try:
        leaves = tensors_of(value)
    except ExportError as error:
        raise QuantizeError(f"{name} must hold tensors, {got(value)}; give what the model returned") from error
    found = [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in leaves]
    found = [each for each in found if each.is_floating_point()]
    if not found:
        raise QuantizeError(
            f"{name} must hold a tensor of floating point, {got(value)}; give what the model returned, before argmax "
            "or rounding"
        )
    if any(each.is_meta for each in found):
        raise QuantizeError(f"{name} is on the meta device and has no values; give tensors with values")
    if not any(each.numel() for each in found):
        raise QuantizeError(f"{name} is empty, {got(value)}; give the outputs of at least one sample")
    return found


def _warn(model: QuantizedModule) -> None:
    """Tell who called what went back to float."""
    for note in model.notes:
        warn(note)
