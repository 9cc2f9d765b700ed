"""Static quantization: export, observe on calibration batches, convert."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from torchslim.errors import QuantizeError
from torchslim.export import Captured, bind, capture, positional, signature_of
from torchslim.isolation import copy_model, quiet
from torchslim.quantize.schemes import find_scheme, weight_range
from torchslim.steps import Context, Form, Inputs, LayerRecord, Outcome
from torchslim.structure import build, describe
from torchslim.task import call, device_of, predictor, take_first, tensors, to_device

LOUD_DB = 15.0  # below this the quantized output is worth a warning


class QuantizedModule(nn.Module):
    """A converted graph, called like the model it was made from. Its numbers are fixed: it cannot be trained."""

    def __init__(self, program: nn.Module, captured: Captured, signature: inspect.Signature) -> None:
        super().__init__()
        self.program = program
        self.outputs, self.classes = captured.outputs, dict(captured.classes)
        self.forward_signature = signature
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.forward_signature.bind(*args, **kwargs)
        args, kwargs = positional(self, dict(bound.arguments))
        leaves: list[Tensor] = []
        describe(self.program(*args, **kwargs), leaves, {})
        return build(self.outputs, leaves, self.classes)

    def train(self, mode: bool = True) -> QuantizedModule:
        """Only `train(False)` is possible."""
        if mode:
            raise QuantizeError("a quantized model cannot be trained; train before the quantization")
        return self


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Turn weights and activations into integers.

    Args:
        scheme: a name of `SCHEMES`.
        mode: "ptq": post-training, calibrated on the task's calibration batches.
    """

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.QUANTIZED

    scheme: str = field(default="int8", kw_only=False)
    mode: Literal["ptq"] = "ptq"

    def __post_init__(self) -> None:
        find_scheme(self.scheme)
        if self.mode != "ptq":
            raise QuantizeError(f"mode must be 'ptq', got {self.mode!r}")

    def check(self, ctx: Context) -> None:
        """There is something to calibrate on."""
        task = ctx.task
        split = next(name for name in ("calibration", "train", "val") if getattr(task, name) is not None)
        take_first(getattr(task, split), split)

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        batches = ctx.task.calibration_batches()
        quantized, records = _quantize(model, batches, self.scheme, ctx.target.runtime)
        decibels = sqnr(call(predictor(model), batches[0]), call(predictor(quantized), batches[0]))
        warnings = [
            f"not quantized: {record.layer}: {record.reason}"
            for record in records
            if record.action == "refused"
        ]
        if decibels < LOUD_DB:
            warnings.append(
                f"the quantized output is only {decibels:.1f} dB from the float one; expect a loss"
            )
        return Outcome(model=quantized, masks=ctx.masks, layers=records, warnings=warnings)


def static(
    model: nn.Module, batches: Iterable[Inputs], *, scheme: str = "int8", runtime: str = "onnxruntime"
) -> nn.Module:
    """A quantized copy of `model`, calibrated on `batches`, called like the model.

    Args:
        model: a float module; it is left as it was.
        batches: model inputs, each a tuple of positional or a dict of keyword arguments; 100 to 500 samples do.
        scheme: a name of `SCHEMES`.
        runtime: where it will run; elsewhere it is right, perhaps slower.

    Raises:
        QuantizeError: no batches, values that are not finite, or nothing to quantize.
        ExportError: the model cannot be captured; names the line of its code.
    """
    copied, _ = copy_model(model)
    return _quantize(copied, list(batches), scheme, runtime)[0]


def sqnr(reference: Any, value: Any) -> float:
    """Signal to quantization noise in dB over all floating-point outputs: 10 log10(|a|^2 / |a - b|^2)."""
    signal = noise = 0.0
    for a, b in zip(_floats(reference), _floats(value), strict=True):
        signal += float(a.double().square().sum())
        noise += float((a.double() - b.double()).square().sum())
    if noise == 0:
        return float("inf")
    return 10 * float(torch.log10(torch.tensor(signal / noise))) if signal else float("-inf")


def _floats(value: Any) -> list[Tensor]:
    leaves: list[Tensor] = []
    describe(value, leaves, {})
    return [leaf.detach().cpu() for leaf in leaves if leaf.is_floating_point()]


def _quantize(
    model: nn.Module, batches: list[Any], scheme: str, runtime: str
) -> tuple[QuantizedModule, list[LayerRecord]]:
    if isinstance(model, QuantizedModule):
        raise QuantizeError("the model is quantized already; quantize the float model instead")
    if not batches:
        raise QuantizeError("no calibration batches were given; 100 to 500 samples of real data will do")
    with quiet():  # importing torchao logs about extensions that this machine may lack
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from torchslim.quantize.quantizer import SlimQuantizer, observed_layers, strip_unused
    captured = capture(model, batches[0])
    quantizer = SlimQuantizer(find_scheme(scheme), weight_range(runtime))
    with quiet():
        prepared = prepare_pt2e(captured.program.module(), quantizer)
    if not any(record.action == "quantized" for record in quantizer.records):
        raise QuantizeError(
            f"scheme {scheme!r} finds nothing to quantize in this model: it has no conv2d or linear layer whose weight "
            "is stored"
        )
    _calibrate(prepared, observed_layers(prepared), model, batches)
    with quiet(), torch.no_grad():
        converted = convert_pt2e(prepared)
    strip_unused(converted)
    return QuantizedModule(converted, captured, signature_of(model)), quantizer.records


def _calibrate(prepared: nn.Module, layers: Mapping[str, str], model: nn.Module, batches: list[Any]) -> None:
    """Show the observers every batch; a value that is not finite is an error that names its layer and batch."""
    where = {"batch": 0}
    observers = [(name, getattr(prepared, name)) for name in layers if hasattr(prepared, name)]

    def guard(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and not torch.isfinite(args[0]).all():
                raise QuantizeError(
                    f"calibration batch {where['batch']} gives values that are not finite at {layers[name]}; look for "
                    "NaN in the data or overflow in the model"
                )

        return hook

    handles = [observer.register_forward_pre_hook(guard(name)) for name, observer in observers]
    try:
        with torch.no_grad():
            for number, inputs in enumerate(batches, 1):
                where["batch"] = number
                for index, leaf in enumerate(tensors(inputs)):
                    if leaf.is_floating_point() and not torch.isfinite(leaf).all():
                        raise QuantizeError(
                            f"calibration batch {number} has values that are not finite in input {index}; look for "
                            "NaN in the data"
                        )
                args, kwargs = positional(model, to_device(bind(model, inputs), device_of(model)))
                prepared(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
