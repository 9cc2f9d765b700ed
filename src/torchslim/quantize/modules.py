"""The classes of models that are prepared for quantization, and of quantized models."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import GraphModule

from torchslim.core.parts import Fitted
from torchslim.core.step import LayerRecord
from torchslim.core.trees import device_of
from torchslim.errors import DeployError, QuantizeError
from torchslim.graph.allowed_sizes import refusal
from torchslim.graph.calling import bind, bind_call
from torchslim.graph.flat_graphs import flat_module
from torchslim.graph.io_structure import Structure, build, flatten, leaf_names
from torchslim.graph.rewrite import place_constants
from torchslim.graph.size_guards import InputSizes
from torchslim.quantize.accuracy_options import Helpers
from torchslim.quantize.checks import Checks
from torchslim.quantize.samples import Samples

if TYPE_CHECKING:
    from torchslim.graph.lifting import Origin
    from torchslim.quantize.rollback import Evidence


OBSERVED = ("_observed_graph_module_attrs",)  # the entry of a graph's `meta` that its conversion reads


class Called(nn.Module):
    """A graph of flat tensors, called like the model that it was made from, with sizes that `input_sizes` takes.

    It can be pickled, for trainers that save whole models; load only files that you trust. Artifacts of torchslim hold
    no pickles. What is unpickled has no `origin`: its deployment captures the graph again.
    """

    def __init__(
        self,
        program: GraphModule,
        signature: inspect.Signature,
        inputs: Structure,
        outputs: Structure,
        classes: Mapping[str, type],
        *,
        input_sizes: InputSizes,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self.program: GraphModule = program
        self.inputs, self.outputs, self.classes = inputs, outputs, dict(classes)
        self.forward_signature = signature
        self.input_sizes, self.origin = input_sizes, origin
        self.training = False

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        # annotations may be of classes that no pickle finds, and no call needs them
        parameters = [item.replace(annotation=item.empty) for item in self.forward_signature.parameters.values()]
        state["forward_signature"] = inspect.Signature(parameters)
        state["_modules"] = {name: flat_module(module, OBSERVED) for name, module in self._modules.items()}
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Called:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))  # the graph itself, not what a pickle keeps of it
        return copied

    def check_sizes(self, leaves: Sequence[Tensor]) -> None:
        """Raise QuantizeError for sizes that the captured graph does not take."""
        if not all(isinstance(size, int) for leaf in leaves for size in leaf.shape):
            return  # symbols of a capture
        reason = refusal(self.input_sizes, [leaf.shape for leaf in leaves], leaf_names(self.inputs))
        if reason is not None:
            raise QuantizeError(f"{reason}; prepare the model with a list of example inputs that span the sizes")

    def fitted(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, sizes: bool = False) -> Fitted | None:
        """The flat tensors of a call of the captured structure and ranks (and `sizes`); None for other calls."""
        try:
            leaves = flatten(self.inputs, bind_call(self.forward_signature, args, kwargs))
        except (TypeError, DeployError):
            return None
        own = self.input_sizes.sizes
        if len(own) == len(leaves) and any(leaf.dim() != len(each) for leaf, each in zip(leaves, own, strict=True)):
            return None
        if sizes and self.input_sizes.misfit([leaf.shape for leaf in leaves]) is not None:
            return None
        return Fitted(leaves)

    def leaves_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The flat tensors of a call, of checked sizes."""
        if len(args) == 1 and isinstance(args[0], Fitted):
            leaves = args[0].leaves
        else:
            leaves = flatten(self.inputs, bind_call(self.forward_signature, args, kwargs), "inputs")
        self.check_sizes(leaves)
        return leaves


class QuantizedModule(Called):
    """A converted graph, called like the model it was made from; its weights are fixed, so it cannot be trained.

    Attributes:
        records: what was done to each layer, and which layers went back to float and why.
        notes: a line for every layer or operation that went back to float.
        origin: how the graph was captured, from which deployment makes its program; None where it exports anew.
        evidence: data that the graph was checked on, and the model it was made from; None where it was not checked.
    """

    records: list[LayerRecord]
    notes: list[str]
    evidence: Evidence | None

    def __init__(
        self,
        *args: Any,
        records: Sequence[LayerRecord] = (),
        evidence: Evidence | None = None,
        input_sizes: InputSizes,
        origin: Origin | None = None,
    ) -> None:
        super().__init__(*args, input_sizes=input_sizes, origin=origin)
        self.records, self.notes, self.evidence = list(records), [], evidence

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = self.leaves_of(args, kwargs)
        return build(self.outputs, self.program(*leaves), self.classes)

    def train(self, mode: bool = True) -> QuantizedModule:
        """Only `train(False)` is possible."""
        if mode:
            raise QuantizeError("a quantized model cannot be trained; train before the quantization")
        return self


class Prepared(Called):
    """A model between float and integers, called like the model: call it to calibrate, or train it, then `convert` it.

    With `qat`, weights and activations are rounded to their grids; in training mode, dropouts and batch norms are
    active and the ranges follow the data until `freeze_norms` and `freeze_ranges`.
    """

    records: list[LayerRecord]
    qat: bool
    accepts_loss_kwargs = False  # transformers.Trainer reads it: else it would pass arguments that were not captured

    def __init__(
        self,
        *args: Any,
        records: list[LayerRecord],
        qat: bool,
        helpers: Helpers,
        axes: tuple[Sequence[int | None], Sequence[int | None], int],
        example: Sequence[Tensor],
        input_sizes: InputSizes,
        origin: Origin | None = None,
    ) -> None:
        super().__init__(*args, input_sizes=input_sizes, origin=origin)
        self.records, self.qat, self.helpers = records, qat, helpers
        self.output_axes = tuple(axes[1])
        self.samples, self.example = Samples(axes[0], axes[2]), [leaf.detach().cpu() for leaf in example]
        self.reference: list[list[Tensor]] | None = None  # float outputs, from before a helper rounded weights
        self.training = qat
        self._observing: bool | None = None
        self.norms_frozen = self.ranges_frozen = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = self.leaves_of(args, kwargs)
        self.samples.add(leaves)
        switches: tuple[bool, ...] = ()
        if self.qat:
            self.observe(self.training and not self.ranges_frozen)
            switches = (self.training, self.training and not self.norms_frozen)
        return build(self.outputs, self.program(*leaves, *switches), self.classes)

    def _apply(self, fn: Any, recurse: bool = True) -> Prepared:
        """Move the model as any module, with the tensors that its graph makes: the capture fixed their device.

        Ranges stay in float32, in which their scales and zero points are computed: trainers store models in float16.
        """
        observers = [module for module in self.program.modules() if hasattr(module, "calculate_qparams")]
        ranges = [(module, name, value) for module in observers for name, value in module._buffers.items()]
        super()._apply(fn, recurse)
        for module, name, before in ranges:
            after = module._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        place_constants(self.program, device_of(self.program))
        return self

    def train(self, mode: bool = True) -> Prepared:
        """Switch dropouts, batch norms and the observation of ranges on or off."""
        if mode and not self.qat:
            raise QuantizeError("the model was prepared for calibration; prepare it with qat=True to train it")
        self.training = mode
        return self

    def freeze_norms(self) -> None:
        """Make batch norms use their running statistics from now on, as the converted model will."""
        self.norms_frozen = True

    def freeze_ranges(self) -> None:
        """Keep the grids as they are from now on, so that the weights can settle on them."""
        self.ranges_frozen = True

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Observe model inputs without rounding anything.

        Raises:
            QuantizeError: no batches, a batch that does not fit, or a value in it or in the model that is not finite.
        """
        from torchslim.quantize.calibration import show_batches
        from torchslim.quantize.fake_quantize import rounding_modules

        rounding = [module for module in rounding_modules(self) if bool(module.fake_quant_enabled[0])]
        for module in rounding:
            module.disable_fake_quant()
        self.observe(True)
        batch_list = list(batches)
        try:
            show_batches(self, batch_list)
        finally:
            for module in rounding:
                module.enable_fake_quant()
            self._observing = None
        self.show(batch_list)
        if not self.qat and self.helpers.afterwards:
            from torchslim.quantize.accuracy_passes import after_observing
            from torchslim.quantize.samples import float_outputs

            self.reference = float_outputs(self.program, self.samples.runs(Checks().samples))
            after_observing(self.program, [self.leaves(batch) for batch in batch_list], self.helpers)

    def show(self, batches: Iterable[Any]) -> None:
        """Store samples of model inputs for the checks, unless a calibration has stored some."""
        for batch in batches:
            self.samples.add(self.leaves(batch))
        self.samples.closed = bool(self.samples.batches)

    def leaves(self, inputs: Any) -> list[Tensor]:
        """Model inputs as the flat tensors that the program takes, on the device of its weights."""
        device = device_of(self.program)
        return [leaf.to(device) for leaf in flatten(self.inputs, bind(self, inputs), "inputs")]

    def observe(self, wanted: bool) -> None:
        """Switch the observers of the modules that round on or off."""
        from torchslim.quantize.fake_quantize import rounding_modules

        if wanted is not self._observing:
            for module in rounding_modules(self):
                module.enable_observer(wanted)
            self._observing = wanted


def is_quantized(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is a quantized graph."""
    return any(isinstance(module, QuantizedModule) for module in model.modules())
