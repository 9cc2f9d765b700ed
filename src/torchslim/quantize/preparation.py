"""From a model to integers: prepare (observe, or train on the grid), calibrate, convert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from torchslim.core.arguments import checks_arguments
from torchslim.core.batches import EXAMPLES
from torchslim.core.isolation import copy_model, preserved_globals, quiet, warn
from torchslim.core.layer_patterns import check_patterns, class_names, matches
from torchslim.core.parts import mounted, signature_of
from torchslim.core.step import Inputs, LayerRecord
from torchslim.core.usable import usable
from torchslim.errors import QuantizeError
from torchslim.graph.calling import bind, examples_of
from torchslim.graph.capturable import parts_named
from torchslim.graph.decompose import open_products
from torchslim.graph.export import WRAPPED, Captured, capture, module_of
from torchslim.graph.io_structure import flatten
from torchslim.graph.lifting import Origin
from torchslim.graph.portable_ops import open_bags
from torchslim.quantize.accuracy_options import Helpers
from torchslim.quantize.aten_ops import ANNOTATION, TAKES_GRIDS
from torchslim.quantize.backend_profiles import PROFILES
from torchslim.quantize.batch_norm_folding import fold_batch_norms, hide_batch_norms, show_batch_norms, switch
from torchslim.quantize.checks import Checks
from torchslim.quantize.conversion import integers
from torchslim.quantize.equalize import equalize, smooth
from torchslim.quantize.modules import Called, Prepared, QuantizedModule
from torchslim.quantize.parts import by_part, mounted_of, share_weights, take_back
from torchslim.quantize.samples import batch_axes
from torchslim.quantize.schemes import FLOAT, SCHEMES, Scheme, find_scheme

if TYPE_CHECKING:
    from torchslim.quantize.quantizer import SlimQuantizer

Layers = Mapping[str, str]


@overload
def prepare(
    model: nn.Module,
    example_inputs: Inputs | list[Inputs],
    *,
    runtime: str = "onnxruntime",
    scheme: str = "int8",
    layers: Layers | None = None,
    observer: str = "mse",
    qat: bool = False,
    learned_step: bool = False,
    helpers: Helpers | None = None,
    batches: Iterable[Inputs] = (),
    dynamic_shapes: Any = "auto",
    part: None = None,
) -> Prepared: ...


@overload
def prepare(
    model: nn.Module,
    example_inputs: Inputs | list[Inputs],
    *,
    runtime: str = "onnxruntime",
    scheme: str = "int8",
    layers: Layers | None = None,
    observer: str = "mse",
    qat: bool = False,
    learned_step: bool = False,
    helpers: Helpers | None = None,
    batches: Iterable[Inputs] = (),
    dynamic_shapes: Any = "auto",
    part: str | Sequence[str],
) -> nn.Module: ...


@checks_arguments(QuantizeError)
def prepare(
    model: nn.Module,
    example_inputs: Inputs | list[Inputs],
    *,
    runtime: str = "onnxruntime",
    scheme: str = "int8",
    layers: Layers | None = None,
    observer: str = "mse",
    qat: bool = False,
    learned_step: bool = False,
    helpers: Helpers | None = None,
    batches: Iterable[Inputs] = (),
    dynamic_shapes: Any = "auto",
    part: str | Sequence[str] | None = None,
) -> nn.Module:
    """A copy of `model` that observes what goes through it; with `qat`, it rounds as the converted model will.

    Call it on calibration inputs (or train it as any module, `train()` and `eval()` work), then `convert` it.

    Args:
        model: a float module; it is left as it was.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        runtime: where it will run; elsewhere it is right, perhaps slower.
        scheme: a name of `SCHEMES`, for every layer that `layers` does not name.
        layers: schemes, or "float", by glob over layers or by "type:NAME"; the last pattern that matches counts.
        observer: of static activations, a name of `OBSERVERS`.
        qat: prepare for training.
        learned_step: with `qat`, learn the scales of the weights, too (LSQ, Esser 2020).
        helpers: what is done for accuracy besides.
        batches: model inputs that `helpers.smooth` looks at.
        dynamic_shapes: as in `ts.deploy`.
        part: names or globs of submodules to prepare; the result is the whole model with prepared parts. Their example
            inputs are recorded while the model runs on the example inputs.

    Raises:
        QuantizeError: an unknown name, nothing to quantize, or a model that is quantized already.
        SelectError: a pattern of `layers` that matches nothing.
        ExportError: the model cannot be captured; names the line of its code.
    """
    model = usable(model, QuantizeError)
    helpers, samples = helpers or Helpers(), list(batches)
    if part is not None:
        options = {
            "runtime": runtime,
            "scheme": scheme,
            "observer": observer,
            "qat": qat,
            "learned_step": learned_step,
            "helpers": helpers,
            "dynamic_shapes": dynamic_shapes,
        }
        return _with_prepared_parts(model, part, samples, example_inputs, layers, options)
    _check(model, runtime, helpers, samples)
    choose = chooser(model, scheme, layers or {})
    with parts_named(model, example_inputs):
        captured, trainable = _captured(model, example_inputs, dynamic_shapes)
    axes = batch_axes(captured.program, captured.batch_axis)
    with quiet():  # importing torchao logs about extensions that this machine may lack
        from torchslim.quantize.fake_quantize import specs
        from torchslim.quantize.quantizer import SlimQuantizer
    quantizer = SlimQuantizer(
        choose, PROFILES[runtime], specs(runtime, observer, training=qat, learned_step=learned_step)
    )
    program = _observed(captured, quantizer, helpers, [_leaves(captured, model, batch) for batch in samples], qat)
    if not any(record.action == "quantized" for record in quantizer.records):
        raise QuantizeError(_nothing(scheme, quantizer.records))
    for name, parameter in program.named_parameters() if qat else ():
        parameter.requires_grad_(name.removeprefix(WRAPPED) in trainable)
    prepared = Prepared(
        program,
        signature_of(model),
        captured.inputs,
        captured.outputs,
        captured.classes,
        records=quantizer.records,
        qat=qat,
        helpers=helpers,
        axes=axes,
        example=_leaves(captured, model, examples_of(example_inputs)[0]),
        input_sizes=captured.input_sizes,
        origin=Origin.of(captured, dynamic_shapes),
    )
    _look_at_weights(prepared)
    return prepared


def _with_prepared_parts(
    model: nn.Module,
    part: str | Sequence[str],
    batches: list[Inputs],
    example_inputs: Inputs | list[Inputs],
    layers: Layers | None,
    options: Mapping[str, Any],
) -> nn.Module:
    """A copy of the model with prepared parts; the calls of a part on the batches are its own batches."""

    def make(inner: nn.Module, calls: list[Inputs], names: Layers) -> nn.Module:
        own: nn.Module = prepare(inner, calls[:EXAMPLES], layers=names, batches=calls if batches else (), **options)
        return own

    whole = by_part(model, part, batches or example_inputs, layers, make)
    if options["qat"]:
        share_weights(whole, mounted_of(whole, Prepared))
    return whole


def _captured(
    model: nn.Module, example_inputs: Inputs | list[Inputs], dynamic_shapes: Any
) -> tuple[Captured, set[str]]:
    """The program of a copy of the model, in float32, and the names of its trainable parameters."""
    copied, _ = copy_model(model)
    trainable = {name for name, parameter in copied.named_parameters() if parameter.requires_grad}
    outside = _computed_in_float32(copied)
    return capture(copied, example_inputs, dynamic_shapes, outside=outside), trainable


def _observed(
    captured: Captured, quantizer: SlimQuantizer, helpers: Helpers, samples: Sequence[list[Tensor]], qat: bool
) -> GraphModule:
    """The graph with an observer wherever the quantizer wants one; with `qat`, it has switches for its modes."""
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    with quiet(), preserved_globals():
        program = module_of(captured.program)
        assert isinstance(program, GraphModule)
        program.graph.set_codegen(CodeGen())  # tensors in, tensors out: no structures to take apart
        open_bags(program)
        if quantizer.profile.products or quantizer.profile.gates:
            open_products(program, quantizer.takes_product)
        if not qat:
            fold_batch_norms(program)
        if helpers.equalize:
            equalize(program)
        if helpers.smooth is not None:
            smooth(program, samples, helpers.smooth)
        hide_batch_norms(program)
        program = prepare_pt2e(program, quantizer)
        assert isinstance(program, GraphModule)
        show_batch_norms(program)
        _forget_specs(program)
        if qat:
            switch(program)
            _name_once(program)
        program.recompile()
    return program


def _forget_specs(program: GraphModule) -> None:
    """Keep one mark in place of the quantizer's specs: they refer to nodes, and a pickle cannot hold those."""
    for node in program.graph.nodes:
        annotation = node.meta.pop(ANNOTATION, None)
        if annotation is not None and annotation.input_qspec_map:
            node.meta[TAKES_GRIDS] = True


def _name_once(program: GraphModule) -> None:
    """Call every observer by one name: trainers save a state dict, in which no two names may share a tensor."""
    names: dict[int, str] = {}
    calls = [node for node in program.graph.nodes if node.op == "call_module"]
    called = [str(node.target) for node in calls]
    for node, name in zip(calls, called, strict=True):
        node.target = names.setdefault(id(program.get_submodule(name)), name)
    for name in set(called) - set(names.values()):
        program.delete_submodule(name)


def _check(model: nn.Module, runtime: str, helpers: Helpers, batches: Sequence[Inputs]) -> None:
    """Raise for what is wrong before any work."""
    if any(isinstance(module, Called) for module in model.modules()):
        raise QuantizeError("the model is quantized already; quantize the float model instead")
    if runtime not in PROFILES:
        raise QuantizeError(f"runtime {runtime!r} has no quantization profile; one of {', '.join(PROFILES)}")
    if helpers.smooth is not None and not batches:
        raise QuantizeError("smoothing looks at activations: give it batches of model inputs")


def _computed_in_float32(model: nn.Module) -> torch.dtype | None:
    """Make a model of another precision one of float32, which integer kernels begin from; the type that it had."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if dtypes <= {torch.float32}:
        return None
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise QuantizeError(f"the model's weights are of several types ({names}); quantize model.float()")
    model.float()
    return dtypes.pop()


@overload
def convert(prepared: Prepared, *, checks: Checks | None = Checks()) -> QuantizedModule: ...  # noqa: B008 - frozen


@overload
def convert(prepared: nn.Module, *, checks: Checks | None = Checks()) -> nn.Module: ...  # noqa: B008 - frozen


@checks_arguments(QuantizeError)
def convert(prepared: nn.Module, *, checks: Checks | None = Checks()) -> nn.Module:  # noqa: B008 - frozen
    """Integers for what a prepared model has observed. Its numbers are then fixed.

    The result is compared with float on a few of the samples that the model was calibrated on (of those that it was
    prepared with, where no data were needed). What loses an output or a channel goes back to float, with a warning.

    Args:
        prepared: what `prepare` returned, calibrated or trained.
        checks: what must hold; None: nothing is checked, here or when the result is deployed.

    Raises:
        QuantizeError: it is not a prepared model, has seen no data, or cannot be quantized so that the checks hold.
    """
    while isinstance(inner := getattr(prepared, "module", None), nn.Module) and not isinstance(prepared, Prepared):
        prepared = inner  # DistributedDataParallel and Fabric wrap it
    if isinstance(prepared, nn.Module) and (parts := mounted_of(prepared, Prepared)):
        converted = {path: convert(part, checks=checks) for path, part in parts.items()}
        copied, _ = copy_model(prepared)
        if any(part.qat for part in parts.values()):
            take_back(copied, mounted_of(copied, Prepared))
        return mounted(copied, converted)
    if not isinstance(prepared, Prepared):
        raise QuantizeError(
            f"convert takes what ts.quantize.prepare returned, got {type(prepared).__name__}; prepare the model first"
        )
    if (checks := Checks.of(checks)) is None:
        return integers(prepared)
    from torchslim.quantize.rollback import verified

    model = verified(prepared, checks)
    for note in model.notes:
        warn(note)
    return model


def chooser(model: nn.Module, scheme: str, layers: Layers) -> Callable[[str, str], Scheme | None]:
    """The scheme of each layer, by its path and its weight's.

    Raises:
        QuantizeError: an unknown scheme.
        SelectError: a pattern that matches no layer.
    """
    default = find_scheme(scheme)
    check_patterns(model, list(layers), None)
    chosen = [(pattern, None if name == FLOAT else find_scheme(name)) for pattern, name in layers.items()]
    types = class_names(model)

    def choose(layer: str, weight: str) -> Scheme | None:
        selected: Scheme | None = default
        for pattern, named in chosen:
            if any(path and matches(pattern, path, types) for path in (layer, weight)):
                selected = named
        return selected

    return choose


def _leaves(captured: Captured, model: nn.Module, inputs: Any) -> list[Tensor]:
    return [leaf.cpu() for leaf in flatten(captured.inputs, bind(model, inputs), "a calibration batch")]


def _look_at_weights(prepared: Prepared) -> None:
    """Set the scales of weights, which no data decide; an optimizer then sees learned steps, too."""
    from torchslim.quantize.lowering import observe_weights

    with torch.no_grad(), preserved_globals():
        observe_weights(prepared.program)


def _nothing(scheme: str, records: list[LayerRecord]) -> str:
    refused = "; ".join(f"{record.layer}: {record.reason}" for record in records[:5])
    return (
        f"scheme {scheme!r} finds nothing to quantize in this model ({refused or 'no layer has weights'}); leave the "
        f"quantization out, or choose another scheme of {', '.join(SCHEMES)}"
    )
