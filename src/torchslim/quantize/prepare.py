"""From a model to integers: prepare (observe, or train on the grid), calibrate, convert."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from torchslim.core.arguments import checks_arguments
from torchslim.core.isolation import copy_model, preserved_globals, quiet, warn
from torchslim.core.layer_patterns import check_patterns, class_names, matches
from torchslim.core.step import Inputs, LayerRecord
from torchslim.core.task import device_of
from torchslim.core.usable import usable
from torchslim.errors import QuantizeError
from torchslim.graph.export import WRAPPED, Captured, bind, bind_call, capture, signature_of
from torchslim.graph.integer_patterns import strip_unused
from torchslim.graph.io_structure import Structure, build, flatten
from torchslim.quantize.accuracy_options import Helpers
from torchslim.quantize.backend_profiles import PROFILES
from torchslim.quantize.checks import Checks
from torchslim.quantize.samples import Samples, batch_axes
from torchslim.quantize.schemes import FLOAT, SCHEMES, Scheme, find_scheme

if TYPE_CHECKING:
    from torchslim.quantize.rollback import Evidence

Layers = Mapping[str, str]


class _Called(nn.Module):
    """A graph of flat tensors, called like the model that it was made from."""

    def __init__(
        self,
        program: GraphModule,
        signature: inspect.Signature,
        inputs: Structure,
        outputs: Structure,
        classes: Mapping[str, type],
    ) -> None:
        super().__init__()
        self.program: GraphModule = program
        self.inputs, self.outputs, self.classes = inputs, outputs, dict(classes)
        self.forward_signature = signature
        self.training = False


class QuantizedModule(_Called):
    """A converted graph, called like the model it was made from. Its numbers are fixed: it cannot be trained.

    Attributes:
        records: what was done to each layer, and which layers went back to float and why.
        notes: a line for all that went back to float.
        evidence: what the graph was checked on, and what it was made from; None where it was not checked.
    """

    records: list[LayerRecord]
    notes: list[str]
    evidence: Evidence | None

    def __init__(self, *args: Any, records: Sequence[LayerRecord] = (), evidence: Evidence | None = None) -> None:
        super().__init__(*args)
        self.records, self.notes, self.evidence = list(records), [], evidence

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = bind_call(self.forward_signature, args, kwargs)
        return build(self.outputs, self.program(*flatten(self.inputs, named, "inputs")), self.classes)

    def train(self, mode: bool = True) -> QuantizedModule:
        """Only `train(False)` is possible."""
        if mode:
            raise QuantizeError("a quantized model cannot be trained; train before the quantization")
        return self


class Prepared(_Called):
    """A model between float and integers, called like the model: call it to calibrate, or train it, then `convert` it.

    With `qat`, weights and activations are rounded to their grids; in training mode, dropouts and batch norms are
    active and the ranges follow the data until `freeze_norms` and `freeze_ranges`.
    """

    records: list[LayerRecord]
    qat: bool

    def __init__(
        self,
        *args: Any,
        records: list[LayerRecord],
        qat: bool,
        helpers: Helpers,
        axes: tuple[Sequence[int | None], Sequence[int | None], int],
        example: Sequence[Tensor],
    ) -> None:
        super().__init__(*args)
        self.records, self.qat, self.helpers = records, qat, helpers
        self.output_axes = tuple(axes[1])
        self.samples, self.example = Samples(axes[0], axes[2]), [leaf.detach().cpu() for leaf in example]
        self.reference: list[list[Tensor]] | None = None  # in float, from before weights were rounded by a helper
        self.training = qat
        self._observing: bool | None = None
        self.norms_frozen = self.ranges_frozen = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = bind_call(self.forward_signature, args, kwargs)
        leaves = flatten(self.inputs, named, "inputs")
        self.samples.add(leaves)
        switches: tuple[bool, ...] = ()
        if self.qat:
            self.observe(self.training and not self.ranges_frozen)
            switches = (self.training, self.training and not self.norms_frozen)
        return build(self.outputs, self.program(*leaves, *switches), self.classes)

    def train(self, mode: bool = True) -> Prepared:
        """Switch dropouts, batch norms and the observing of ranges."""
        if mode and not self.qat:
            raise QuantizeError("the model was prepared for calibration; prepare it with qat=True to train it")
        self.training = mode
        return self

    def freeze_norms(self) -> None:
        """From now on batch norms use their running statistics, as the converted model will."""
        self.norms_frozen = True

    def freeze_ranges(self) -> None:
        """From now on the grids stay as they are, so that the weights can settle on them."""
        self.ranges_frozen = True

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Observe model inputs without rounding anything.

        Raises:
            QuantizeError: none were given, one does not fit, or a value in it or inside the model is not finite.
        """
        from torchslim.quantize.calibration import show_batches
        from torchslim.quantize.fake_quantize import rounding_modules

        rounding = [module for module in rounding_modules(self) if bool(module.fake_quant_enabled[0])]
        for module in rounding:
            module.disable_fake_quant()
        self.observe(True)
        given = list(batches)
        try:
            show_batches(self, given)
        finally:
            for module in rounding:
                module.enable_fake_quant()
            self._observing = None
        self.show(given)
        if not self.qat and self.helpers.afterwards:
            from torchslim.quantize.accuracy_passes import after_observing
            from torchslim.quantize.samples import float_outputs

            self.reference = float_outputs(self.program, self.samples.runs(Checks().samples))
            after_observing(self.program, [self.leaves(each) for each in given], self.helpers)

    def show(self, batches: Iterable[Any]) -> None:
        """Keep samples of model inputs that the result is checked on, unless there are some from a calibration."""
        for each in batches:
            self.samples.add(self.leaves(each))
        self.samples.closed = bool(self.samples.batches)

    def leaves(self, inputs: Any) -> list[Tensor]:
        """Model inputs as the flat tensors that the program takes, where its weights are."""
        device = device_of(self.program)
        return [leaf.to(device) for leaf in flatten(self.inputs, bind(self, inputs), "inputs")]

    def observe(self, wanted: bool) -> None:
        """Should modules that round look at what goes through them?"""
        from torchslim.quantize.fake_quantize import rounding_modules

        if wanted is not self._observing:
            for module in rounding_modules(self):
                module.enable_observer(wanted)
            self._observing = wanted


@checks_arguments(QuantizeError)
def prepare(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    runtime: str = "onnxruntime",
    scheme: str = "int8",
    layers: Layers | None = None,
    observer: str = "mse",
    qat: bool = False,
    learned_step: bool = False,
    helpers: Helpers | None = None,
    batches: Iterable[Inputs] = (),
    dynamic_shapes: Any = "batch",
) -> Prepared:
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

    Raises:
        QuantizeError: an unknown name, nothing to quantize, or a model that is quantized already.
        SelectError: a pattern of `layers` that matches nothing.
        ExportError: the model cannot be captured; names the line of its code.
    """
    model = usable(model, QuantizeError)
    if any(isinstance(module, _Called) for module in model.modules()):
        raise QuantizeError("the model is quantized already; quantize the float model instead")
    choose = chooser(model, scheme, layers or {})
    if runtime not in PROFILES:
        raise QuantizeError(f"runtime {runtime!r} has no quantization profile; one of {', '.join(PROFILES)}")
    helpers, given = helpers or Helpers(), list(batches)
    if helpers.smooth is not None and not given:
        raise QuantizeError("smoothing looks at activations: give it batches of model inputs")
    copied, _ = copy_model(model)
    trainable = {name for name, each in copied.named_parameters() if each.requires_grad}
    outside = _computed_in_float32(copied)
    captured = capture(copied, example_inputs, dynamic_shapes, outside=outside)
    axes = batch_axes(captured.program, captured.batch_axis)
    with quiet():  # importing torchao logs about extensions that this machine may lack
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        from torchslim.graph.decompose import open_products
        from torchslim.graph.portable_ops import open_bags
        from torchslim.quantize.batch_norm_folding import fold_batch_norms, hide_batch_norms, show_batch_norms, switch
        from torchslim.quantize.equalize import equalize, smooth
        from torchslim.quantize.fake_quantize import specs
        from torchslim.quantize.quantizer import SlimQuantizer
    quantizer = SlimQuantizer(
        choose, PROFILES[runtime], specs(runtime, observer, training=qat, learned_step=learned_step)
    )
    with quiet(), preserved_globals():
        program = captured.program.module()
        assert isinstance(program, GraphModule)
        program.graph.set_codegen(CodeGen())  # tensors in, tensors out: no structures to take apart
        open_bags(program)
        if PROFILES[runtime].products or PROFILES[runtime].gates:
            open_products(program, quantizer.takes_product)
        if not qat:
            fold_batch_norms(program)
        if helpers.equalize:
            equalize(program)
        if helpers.smooth is not None:
            smooth(program, [_leaves(captured, model, each) for each in given], helpers.smooth)
        hide_batch_norms(program)
        program = prepare_pt2e(program, quantizer)
        if not any(record.action == "quantized" for record in quantizer.records):
            raise QuantizeError(_nothing(scheme, quantizer.records))
        show_batch_norms(program)
        if qat:
            switch(program)
            for name, parameter in program.named_parameters():
                parameter.requires_grad_(name.removeprefix(WRAPPED) in trainable)
        program.recompile()
    prepared = Prepared(
        program, signature_of(model), captured.inputs, captured.outputs, captured.classes,
        records=quantizer.records, qat=qat, helpers=helpers, axes=axes,
        example=_leaves(captured, model, example_inputs),
    )  # fmt: skip
    _look_at_weights(prepared)
    return prepared


def _computed_in_float32(model: nn.Module) -> torch.dtype | None:
    """Make a model of another precision one of float32, which integer kernels begin from; the type that it had."""
    found = {each.dtype for each in model.parameters() if each.is_floating_point()}
    if found <= {torch.float32}:
        return None
    if len(found) > 1:
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in found))
        raise QuantizeError(f"the model's weights are of several types ({names}); quantize model.float()")
    model.float()
    return found.pop()


@checks_arguments(QuantizeError)
def convert(prepared: nn.Module, *, checks: Checks | None = Checks()) -> QuantizedModule:  # noqa: B008 - frozen
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


def integers(prepared: Prepared, released: Collection[str] = ()) -> QuantizedModule:
    """A prepared model converted, unchecked.

    Args:
        prepared: calibrated or trained.
        released: keys of the units that go back to float, see `units.units_of`.
    """
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        from torchslim.quantize.aten_ops import ANNOTATION
        from torchslim.quantize.batch_norm_folding import fold_batch_norms, hide_batch_norms, settle, show_batch_norms
        from torchslim.quantize.lowering import fit_biases, gather_first, store_groups
        from torchslim.quantize.sharing import keep_own_grids
        from torchslim.quantize.units import release, units_of
    copied = copy_model(prepared)[0].cpu()
    program = copied.program
    assert isinstance(program, GraphModule)
    with quiet(), preserved_globals(), torch.no_grad():
        if released:
            release(program, units_of(program), released)
        for node in program.graph.nodes:
            node.meta.pop(ANNOTATION, None)  # it speaks of the nodes of the graph that this one was copied from
        if prepared.qat:
            settle(program)
            fold_batch_norms(program)
        else:  # a network that was trained with shared grids keeps them
            keep_own_grids(program)
        fit_biases(program)
        store_groups(program)
        hide_batch_norms(program)
        program = convert_pt2e(program)
        show_batch_norms(program)
        gather_first(program)
        program.graph.eliminate_dead_code()
        program.recompile()
        strip_unused(program)
    return QuantizedModule(
        program, prepared.forward_signature, prepared.inputs, prepared.outputs, prepared.classes,
        records=prepared.records,
    )  # fmt: skip


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
        found: Scheme | None = default
        for pattern, each in chosen:
            if any(path and matches(pattern, path, types) for path in (layer, weight)):
                found = each
        return found

    return choose


def _nothing(scheme: str, records: list[LayerRecord]) -> str:
    refused = "; ".join(f"{record.layer}: {record.reason}" for record in records[:5])
    return (
        f"scheme {scheme!r} finds nothing to quantize in this model ({refused or 'no layer has weights'}); leave the "
        f"quantization out, or choose another scheme of {', '.join(SCHEMES)}"
    )


def _leaves(captured: Captured, model: nn.Module, inputs: Any) -> list[Tensor]:
    return [leaf.cpu() for leaf in flatten(captured.inputs, bind(model, inputs), "a calibration batch")]


def _look_at_weights(prepared: Prepared) -> None:
    """Set the scales of weights, which no data decide; an optimizer then sees learned steps, too."""
    from torchslim.quantize.lowering import observe_weights

    with torch.no_grad(), preserved_globals():
        observe_weights(prepared.program)
