"""Functions that quantize and verify a model outside of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from torchslim.core.arguments import checks_arguments
from torchslim.core.batches import EXAMPLES
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
from torchslim.quantize.parts import by_part
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
    dynamic_shapes: Any = "auto",
    checks: Checks | None = Checks(),  # noqa: B008 - frozen
    part: str | Sequence[str] | None = None,
) -> nn.Module:
    """A quantized copy of `model`, calibrated on `batches`, called like the model.

    Args:
        model: a float module, never modified.
        batches: model inputs, each a tuple of positional or a dict of keyword arguments; 100 to 500 samples are enough.
        scheme: a name of `SCHEMES`.
        layers: schemes, or "float", by glob over layers or "type:NAME".
        runtime: where the result will run; elsewhere its outputs are right, but it may be slower.
        observer: observer of the activations, a name of `OBSERVERS`.
        helpers: options for accuracy.
        dynamic_shapes: as for `ts.deploy`; "auto" frees every size that differs between the first batches.
        checks: thresholds for the result, here and deployed: layers that lose an output or a channel of it go back to
            float, with a warning. None: no checks.
        part: names or globs of submodules to quantize, calibrated on the inputs that the whole model gives them; the
            result is the whole model with these parts in integers, and `ts.deploy` deploys the parts.

    Raises:
        QuantizeError: no batches, values that are not finite, nothing to quantize, or checks that cannot be met.
        ExportError: the model cannot be captured; the message names the line of its code.
    """
    batch_list = list(batches)
    if not batch_list:
        raise QuantizeError("no calibration batches were given; 100 to 500 samples of real data will do")
    if part is not None:

        def make(inner: nn.Module, calls: list[Inputs], names: Layers) -> nn.Module:
            return static(
                inner,
                calls,
                scheme=scheme,
                layers=names,
                runtime=runtime,
                observer=observer,
                helpers=helpers,
                dynamic_shapes=dynamic_shapes,
                checks=checks,
            )

        return by_part(model, part, batch_list, layers, make)
    examples = [batch for batch in batch_list[:EXAMPLES] if isinstance(batch, (tuple, Mapping))]
    prepared = prepare(
        model,
        examples if dynamic_shapes == "auto" and len(examples) == len(batch_list[:EXAMPLES]) else batch_list[0],
        runtime=runtime,
        scheme=scheme,
        layers=layers,
        observer=observer,
        helpers=helpers,
        batches=batch_list,
        dynamic_shapes=dynamic_shapes,
    )
    prepared.calibrate(batch_list)
    quantized = converted(prepared, checks)
    _warn(quantized)
    return quantized


@checks_arguments(QuantizeError)
def dynamic(
    model: nn.Module,
    example_inputs: Inputs | list[Inputs],
    *,
    layers: Layers | None = None,
    runtime: str = "onnxruntime",
    dynamic_shapes: Any = "auto",
    checks: Checks | None = Checks(),  # noqa: B008 - frozen
    part: str | Sequence[str] | None = None,
) -> nn.Module:
    """A copy of `model` whose linear, LSTM and GRU layers compute on integers with the range of each call.

    Args:
        model: a float module, never modified.
        example_inputs: a tuple of positional or a dict of keyword arguments, or a list of these.
        layers: schemes, or "float", by glob over layers or "type:NAME".
        runtime: where the result will run.
        dynamic_shapes: as for `ts.deploy`.
        checks: as for `static`, on the example inputs.
        part: as for `static`.
    """
    if part is not None:

        def make(inner: nn.Module, calls: list[Inputs], names: Layers) -> nn.Module:
            return dynamic(inner, calls, layers=names, runtime=runtime, dynamic_shapes=dynamic_shapes, checks=checks)

        return by_part(model, part, example_inputs, layers, make)
    prepared = prepare(
        model, example_inputs, runtime=runtime, scheme="int8-dynamic", layers=layers, dynamic_shapes=dynamic_shapes
    )
    quantized = converted(prepared, checks)
    _warn(quantized)
    return quantized


@checks_arguments(QuantizeError)
def weights(
    model: nn.Module,
    example_inputs: Inputs | list[Inputs],
    *,
    bits: int = 8,
    layers: Layers | None = None,
    runtime: str = "onnxruntime",
    helpers: Helpers | None = None,
    batches: Iterable[Inputs] = (),
    dynamic_shapes: Any = "auto",
    checks: Checks | None = Checks(),  # noqa: B008 - frozen
    part: str | Sequence[str] | None = None,
) -> nn.Module:
    """A copy of `model` that stores its weights as integers and computes in float.

    Args:
        model: a float module, never modified.
        example_inputs: a tuple of positional or a dict of keyword arguments, or a list of these.
        bits: 8 (a scale for each channel) or 4 (a scale for each group of 32).
        layers: schemes, or "float", by glob over layers or "type:NAME".
        runtime: where the result will run.
        helpers: options for accuracy, such as `Helpers(rounding="gptq")`.
        batches: model inputs for the helpers and the checks; without any, the checks use the example inputs.
        dynamic_shapes: as for `ts.deploy`.
        checks: as for `static`.
        part: as for `static`; the parts' calls on `batches`, or else on the example inputs, are their batches.
    """
    scheme = f"int{bits}-weights"
    if scheme not in SCHEMES:
        raise QuantizeError(f"bits must be 8 or 4, got {bits}")
    batch_list = list(batches)
    if part is not None:

        def make(inner: nn.Module, calls: list[Inputs], names: Layers) -> nn.Module:
            return weights(
                inner,
                calls[:EXAMPLES],
                bits=bits,
                layers=names,
                runtime=runtime,
                helpers=helpers,
                batches=calls if batch_list else (),
                dynamic_shapes=dynamic_shapes,
                checks=checks,
            )

        return by_part(model, part, batch_list or example_inputs, layers, make)
    helpers = helpers or Helpers()
    if helpers.needs_data and not batch_list:
        raise QuantizeError("the options for accuracy need data: give batches of model inputs")
    prepared = prepare(
        model,
        example_inputs,
        runtime=runtime,
        scheme=scheme,
        layers=layers,
        helpers=helpers,
        batches=batch_list,
        dynamic_shapes=dynamic_shapes,
    )
    if helpers.needs_data:
        prepared.calibrate(batch_list)
    prepared.show(batch_list)
    quantized = converted(prepared, checks)
    _warn(quantized)
    return quantized


def converted(prepared: Prepared, checks: Checks | None, known: Mapping[str, str] | None = None) -> QuantizedModule:
    """As `convert`, without its warnings, which are the model's `notes`.

    Units of `known` are left in float in any case; it gives the reasons.
    """
    with quiet():
        from torchslim.quantize.rollback import rolled_back, verified
        from torchslim.quantize.units import units_of
    if (checks := Checks.of(checks)) is not None:
        return verified(prepared, checks, known)
    model = integers(prepared, known or {})
    if known:
        assert isinstance(prepared.program, GraphModule)
        model.records = rolled_back(prepared.records, units_of(prepared.program), known)
    return model


def sqnr(reference: Any, value: Any) -> float:
    """Signal to quantization noise in dB over all floating-point outputs: 10 log10(|a|^2 / |a - b|^2).

    Infinities in the same places of both do not count; others, and NaN, give -inf.

    Args:
        reference: outputs of the float model: a tensor, or tensors in tuples, lists, dicts or dataclasses.
        value: outputs of the quantized model, of the same shapes.

    Raises:
        QuantizeError: no floating-point tensors, or different numbers or shapes of them.
    """
    if isinstance(reference, Mapping) and isinstance(value, Mapping):
        if set(reference) != set(value):
            raise QuantizeError(
                f"reference and value must have the same keys, got {shown(list(reference))} and {shown(list(value))}"
            )
        value = {name: value[name] for name in reference}
    expected, actual = _floats(reference, "reference"), _floats(value, "value")
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise QuantizeError(
            f"reference and value must have the same shapes, got {shown(shapes[0])} and {shown(shapes[1])}; give the "
            "outputs of both models on the same inputs"
        )
    return decibels(expected, actual)


def decibels(reference: Iterable[Tensor], value: Iterable[Tensor]) -> float:
    """As `sqnr`, from tensors of any type, of which only floating-point ones count."""
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
    """The floating-point tensors of outputs; complex tensors as real and imaginary parts."""
    try:
        leaves = tensors_of(value)
    except ExportError as error:
        raise QuantizeError(f"{name} must hold tensors, {got(value)}; give what the model returned") from error
    tensors = [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in leaves]
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not tensors:
        raise QuantizeError(
            f"{name} must hold a tensor of floating point, {got(value)}; give what the model returned, before argmax "
            "or rounding"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise QuantizeError(f"{name} is on the meta device and has no values; give tensors with values")
    if not any(tensor.numel() for tensor in tensors):
        raise QuantizeError(f"{name} is empty, {got(value)}; give the outputs of at least one sample")
    return tensors


def _warn(model: QuantizedModule) -> None:
    """Warn about everything that went back to float."""
    for note in model.notes:
        warn(note)
