"""Static quantization: export, observe on calibration batches, convert."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from torchslim.errors import QuantizeError
from torchslim.export import Captured, bind, bind_call, capture, signature_of, tensors_of
from torchslim.isolation import copy_model, preserved_globals, quiet
from torchslim.quantize.schemes import find_scheme, weight_range
from torchslim.steps import Context, Form, Inputs, LayerRecord, Outcome
from torchslim.structure import Structure, build, flatten, leaf_names
from torchslim.task import call, predictor, take_first

LOUD_DB = 15.0  # below this the quantized output is worth a warning


class QuantizedModule(nn.Module):
    """A converted graph, called like the model it was made from. Its numbers are fixed: it cannot be trained."""

    def __init__(
        self,
        program: nn.Module,
        signature: inspect.Signature,
        inputs: Structure,
        outputs: Structure,
        classes: Mapping[str, type],
    ) -> None:
        super().__init__()
        self.program = program
        self.inputs, self.outputs, self.classes = inputs, outputs, dict(classes)
        self.forward_signature = signature
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = bind_call(self.forward_signature, args, kwargs)
        return build(self.outputs, self.program(*flatten(self.inputs, named, "inputs")), self.classes)

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
        split = ctx.task.calibration_split
        take_first(getattr(ctx.task, split), split)

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        batches = ctx.task.calibration_batches()
        quantized, records = _quantize(model, batches, self.scheme, ctx.target.runtime)
        decibels = sqnr(call(predictor(model), batches[0]), call(predictor(quantized), batches[0]))
        warnings = [
            f"not quantized: {record.layer}: {record.reason}" for record in records if record.action == "refused"
        ]
        if decibels < LOUD_DB:
            warnings.append(f"the quantized output is only {decibels:.1f} dB from the float one; expect a loss")
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
    return 10 * math.log10(signal / noise) if signal else float("-inf")


def _floats(value: Any) -> list[Tensor]:
    return [leaf.detach().cpu() for leaf in tensors_of(value) if leaf.is_floating_point()]


def _quantize(
    model: nn.Module, batches: list[Any], scheme: str, runtime: str
) -> tuple[QuantizedModule, list[LayerRecord]]:
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise QuantizeError("the model is quantized already; quantize the float model instead")
    if not batches:
        raise QuantizeError("no calibration batches were given; 100 to 500 samples of real data will do")
    with quiet():  # importing torchao logs about extensions that this machine may lack
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from torchslim.quantize.quantizer import SlimQuantizer, fit_biases, strip_unused
    captured = capture(model, batches[0])
    quantizer = SlimQuantizer(find_scheme(scheme), weight_range(runtime))
    with quiet(), preserved_globals():  # folding batch norms draws random numbers
        prepared = prepare_pt2e(captured.program.module(), quantizer)
    if not any(record.action == "quantized" for record in quantizer.records):
        refused = "; ".join(f"{record.layer}: {record.reason}" for record in quantizer.records[:5])
        raise QuantizeError(
            f"scheme {scheme!r} finds nothing to quantize in this model: it has no conv2d or linear layer whose weight "
            f"is stored ({refused or 'no layer has weights'}); leave the quantization out"
        )
    with quiet(), preserved_globals(), torch.no_grad():
        _calibrate(prepared, captured, model, batches)
        fit_biases(prepared)
        converted = convert_pt2e(prepared)
    strip_unused(converted)
    return QuantizedModule(
        converted, signature_of(model), captured.inputs, captured.outputs, captured.classes
    ), quantizer.records


def _calibrate(prepared: GraphModule, captured: Captured, model: nn.Module, batches: list[Any]) -> None:
    """Show the observers every batch; a value that is not finite is an error that names its layer and batch."""
    from torchslim.quantize.quantizer import observed_layers

    names = leaf_names(captured.inputs)
    number = 0

    def check(value: Tensor, where: str) -> None:
        if not _finite(value):
            raise QuantizeError(
                f"calibration batch {number} has values that are not finite {where}; look for NaN in the data or "
                "overflow in the model"
            )

    def guard(where: str) -> Any:
        return lambda module, args: check(args[0], f"at {where}")

    handles = [
        prepared.get_submodule(name).register_forward_pre_hook(guard(where))
        for name, where in observed_layers(prepared).items()
    ]
    try:
        for number, inputs in enumerate(batches, 1):
            leaves = flatten(captured.inputs, bind(model, inputs), f"calibration batch {number}")
            for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
                check(leaf, f"in input {index} ({name!r})")
            try:
                prepared(*(leaf.cpu() for leaf in leaves))
            except QuantizeError:
                raise
            except Exception as error:
                shapes = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in zip(names, leaves, strict=True))
                raise QuantizeError(
                    f"calibration batch {number} ({shapes}) does not fit the graph that batch 1 gave: "
                    f"{next(iter(str(error).splitlines()), '')}; give batches of the same sizes"
                ) from error
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    low, high = torch.aminmax(value.detach())  # one pass, no copy; NaN shows in both
    return bool(torch.isfinite(low) & torch.isfinite(high))
