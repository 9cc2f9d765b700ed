"""Records one real run of a model, operation by operation, with the tags of its values.

A dispatch mode watches the run below autograd, and nothing is exported. So every model that runs can be analyzed, in
the time of a forward pass, including cache objects, detectors' post-processing and data-dependent branches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from torchslim.core.isolation import quiet, unfused_attention
from torchslim.core.reason import Reason
from torchslim.core.step import Inputs
from torchslim.core.trees import tensors
from torchslim.prune.dependency.examples import Examples, calls_of
from torchslim.prune.dependency.leaves import leaves
from torchslim.prune.dependency.noise import Noise
from torchslim.prune.dependency.propagation import Layers, Tagger
from torchslim.prune.dependency.rules import Call, apply
from torchslim.prune.dependency.unseen import Boundaries, Unseen, Watch, shared_channels

Shape = tuple[int, ...]
Role = Literal["in", "out", "other"]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the run: its shape, and the layers of atoms that its elements are removed with."""

    shape: Shape
    layers: Layers
    floating: bool = True


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the run."""

    name: str
    path: str  # the innermost running module
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    scalars: tuple[Any, ...]
    macs: int = 0
    factors: tuple[tuple[Layers, int], ...] = ()  # its MACs are proportional to these dimensions
    constant: bool = False  # neither inputs nor weights reach it: code may cache its result for the next run


class Dependent:
    """The tensors of a run that depend on the model's inputs, weights or random numbers; all others are constants."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        self._tensors: Any = WeakIdKeyDictionary()
        for tensor in given:
            self._tensors[tensor] = True

    def note(self, given: Iterable[Any], made: Iterable[Any], *, random: bool = False) -> bool:
        """Does an operation on `given` depend on such tensors? If so, add the tensors that it made."""
        dependent = random or any(isinstance(value, Tensor) and value in self._tensors for value in given)
        if dependent:
            for value in made:
                if isinstance(value, Tensor):
                    self._tensors[value] = True
        return dependent


@dataclass
class Trace:
    """Result of a run: the operations, the tags of every weight, and the constraints between atoms."""

    tagger: Tagger
    operations: list[Operation] = field(default_factory=list)
    weights: dict[str, Value] = field(default_factory=dict)  # parameters and buffers by path, each tensor once
    unruled: dict[str, int] = field(default_factory=dict)  # operations without a rule, and how often they ran
    parameters: frozenset[str] = frozenset()  # names of the trained weights; the others are buffers
    roles: dict[tuple[str, int], Role] = field(default_factory=dict)  # (weight, dimension) -> its role in operations
    norm_scales: frozenset[str] = frozenset()  # weights that scale a batch norm
    training: str = ""  # why training mode was not analyzed, if it was needed
    unseen: Unseen = field(default_factory=Unseen)  # code that no call reached


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its first path."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def scalars_of(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The numbers among the arguments of an operation."""
    return tuple(
        leaf
        for leaf in leaves((args, kwargs))
        if not isinstance(leaf, Tensor) and isinstance(leaf, (int, float, bool, complex))
    )


class Stack:
    """Paths of the running modules, the innermost last."""

    def __init__(self, model: nn.Module, at_boundary: Callable[[str, Any], None] | None = None) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._at_boundary = at_boundary  # called with a module's path and its arguments or outputs
        self.paths = [""]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._paths:
            self.paths.append(self._paths[id(module)])
            if self._at_boundary is not None:
                self._at_boundary(self.paths[-1], args)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self._paths and len(self.paths) > 1:
            if self._at_boundary is not None:
                self._at_boundary(self._paths[id(module)], output)
            self.paths.pop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook every module for the duration of one run."""
        self.paths = [""]
        enter_hook = register_module_forward_pre_hook(self._enter)
        leave_hook = register_module_forward_hook(self._leave)
        try:
            yield
        finally:
            enter_hook.remove()
            leave_hook.remove()


@contextmanager
def elementary(model: nn.Module) -> Iterator[None]:
    """Decompose fused attention and recurrent kernels into operations that have rules."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(unfused_attention())
        yield


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Output of the model on its example inputs; a list of outputs for several calls."""
    if isinstance(inputs, Examples):
        return [example(model) for example in inputs.calls]
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Run the model once in evaluation mode, and record which channels are coupled.

    Weights that this run never uses may be used in training, such as auxiliary heads: then a run in training mode adds
    its constraints. The model's own state may change as in any forward pass, so pass a copy.
    """
    model.eval()
    recorder = _Recorder(model)
    recorder.run(inputs)
    if recorder.unused():
        model.train()
        operations, recorder.trace.operations = recorder.trace.operations, []
        try:
            recorder.run(inputs)
        except Exception as error:  # noqa: BLE001 - many models need more than example inputs in training mode
            recorder.trace.training = f"not analyzed in training mode: {type(error).__name__}: {error}"
        recorder.trace.operations = operations
        model.eval()
    return recorder.finish()


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._boundaries, self._watch, self._called = Boundaries(), Watch(model), {""}
        self.stack = Stack(model, self._at_boundary)
        self._counts = True  # whether to count MACs: only in the call on the example inputs
        self.noise = Noise()
        self.tagger = Tagger()
        self.trace = Trace(self.tagger)
        self._layers: Any = WeakIdKeyDictionary()
        self._dependent = Dependent(())
        self._causes: Any = WeakIdKeyDictionary()  # tensors that lost all their layers -> the first reason
        self._stored: dict[Any, Layers] = {}
        self._positions: Any = WeakIdKeyDictionary()  # tensors of positions -> their layers and the reason
        self._used: set[int] = set()  # ids of tensors; the weights stay alive, so their ids are not reused
        self._weights = named_weights(model)
        for path, tensor in self._weights.items():
            if tensor not in self._layers:
                self._layers[tensor] = self.tagger.own(tensor.shape)
                self.trace.weights[path] = Value(tuple(tensor.shape), self._layers[tensor], tensor.is_floating_point())
                if tensor.numel():
                    self._stored[_storage(tensor)] = self._layers[tensor]

    def layers_of(self, value: Any) -> Layers:
        """Layers of a tensor; a tensor that this run did not make has none, unless it is a weight's data."""
        if not isinstance(value, Tensor):
            return ()
        layers: Layers | None = self._layers.get(value)
        return self._stored.get(_storage(value), ()) if layers is None else layers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # the same random numbers as in the check, so that branches that depend on them go the same way
        drawn = self.noise.drawn_by(func)
        result = self.noise.draw(func, args, kwargs) if drawn else func(*args, **kwargs)
        outputs = tuple(leaf for leaf in leaves(result) if isinstance(leaf, Tensor))
        inputs = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = str(func)
        self.tagger.path = self.stack.paths[-1]
        self.tagger.where = f"{self.tagger.path or 'model'}: {func._opname}"
        dependent = self._dependent.note(inputs, outputs, random=drawn)
        causes = (self._causes.get(tensor, "") for tensor in inputs if not self.layers_of(tensor))
        self.tagger.cause = next(filter(None, causes), "")
        self._read_positions(inputs)
        output_layers = self._made(func, args, kwargs, outputs, inputs)
        self._used.update(map(id, inputs))
        for tensor in inputs:
            self._boundaries.note(self.tagger.path, tuple(tensor.shape), self.layers_of(tensor))
        for place, output in enumerate(outputs):
            layers = output_layers[place] if place < len(output_layers) else ()
            # a layer that is known to stay is dropped: it is of a fixed size, as if it had no atoms
            self._layers[output] = tuple(core for core in layers if not self.tagger.atoms.stuck(core.numpy()))
            if not self._layers[output]:
                self._causes[output] = self._cause(layers, inputs)
            self._boundaries.note(self.tagger.path, tuple(output.shape), self._layers[output])
        cost, factors = self._cost(func, args, kwargs, result)
        self.trace.operations.append(
            Operation(
                name,
                self.stack.paths[-1],
                tuple(Value(tuple(tensor.shape), self.layers_of(tensor)) for tensor in inputs),
                tuple(
                    Value(tuple(output.shape), self._layers[output], output.is_floating_point()) for output in outputs
                ),
                scalars_of(args, kwargs),
                cost,
                factors,
                not dependent,
            )
        )
        return result

    def _cause(self, layers: Layers, inputs: list[Tensor]) -> str:
        """Why a value is of a fixed size: the reason of its layers or its inputs' layers, or an earlier cause."""
        cores = (*layers, *(core for tensor in inputs for core in self.layers_of(tensor)))
        reasons = [why for core in cores if (why := self.tagger.atoms.why(core.numpy()))]
        specific = (reason for reason in reasons if not Reason.FIXED_SIZE.given_in(reason))
        return next(specific, self.tagger.cause or next(iter(reasons), ""))

    def _note_positions(self, tensor: Tensor, layers: Sequence[Tensor], why: str) -> None:
        if layers:
            self._positions[tensor] = (tuple(layers), f"{why} ({self.tagger.where})")

    def _read_positions(self, inputs: Iterable[Tensor]) -> None:
        """Freeze the layers whose positions an operation reads, as removing elements would change the positions.

        Most models that take the largest of several values never read its position.
        """
        for tensor in inputs:
            layers, why = self._positions.get(tensor, ((), ""))
            for core in layers:
                self.tagger.atoms.freeze(core.numpy(), why)

    def _made(self, func: Any, args: Any, kwargs: Any, outputs: Any, inputs: list[Tensor]) -> Any:
        call_ = Call(self.tagger, func, args, kwargs, outputs, self.layers_of, self._note_positions)
        try:
            output_layers, has_rule = apply(call_)
        except Exception as error:  # noqa: BLE001 - inputs of a rule that fails are frozen; the reason is reported
            layers = (core for tensor in inputs for core in self.layers_of(tensor))
            self.tagger.freeze(layers, f"the rule of {func._opname!r} failed: {type(error).__name__}: {error}")
            output_layers, has_rule = (), False
        if not has_rule and any(self.layers_of(tensor) for tensor in inputs):
            self.trace.unruled[str(func)] = self.trace.unruled.get(str(func), 0) + 1
        return output_layers

    def _cost(self, func: Any, args: Any, kwargs: Any, result: Any) -> tuple[int, tuple[tuple[Layers, int], ...]]:
        formula = flop_registry.get(func._overloadpacket)
        if formula is None or not self._counts:
            return 0, ()
        flops = int(formula(*args, **kwargs, out_val=result))
        if "convolution" in func._opname:
            kernel = self.layers_of(args[1])
            return flops // 2, ((kernel, 0), (kernel, 1))
        left, right = args[1:3] if func._opname in ("addmm", "baddbmm") else args[:2]
        left_layers, right_layers = self.layers_of(left), self.layers_of(right)
        return flops // 2, (*((left_layers, dim) for dim in range(left.dim())), (right_layers, right.dim() - 1))

    def _at_boundary(self, path: str, values: Any) -> None:
        self._called.add(path)
        for tensor in tensors(values):
            self._boundaries.note(path, tuple(tensor.shape), self.layers_of(tensor))

    def run(self, inputs: Inputs) -> None:
        """Run a forward pass and the further calls of `Examples`, then freeze the layers that reach an output."""
        self.noise = Noise()
        self._dependent = Dependent([*self._weights.values(), *tensors(inputs)])
        with elementary(self._model), self.stack.watching(), self._watch.watching(), self:
            outputs = []
            for place, example in enumerate(calls_of(inputs)):
                self._counts = place == 0
                outputs.append(example(self._model))
        self.tagger.where = ""
        self._read_positions(tensors(outputs))
        for tensor in tensors(outputs):
            self.tagger.freeze(self.layers_of(tensor), Reason.OUTPUT)

    def unused(self) -> list[Tensor]:
        """Weights that no operation used; single numbers, such as batch counters, have no channels to lose."""
        return [weight for weight in self._weights.values() if id(weight) not in self._used and self.layers_of(weight)]

    def finish(self) -> Trace:
        """Freeze the weights that the run never used, and return the trace."""
        unused = {id(weight) for weight in self.unused()}
        learnt = {path for path, _ in self._model.named_parameters()}
        weights = {
            path: weight
            for path, weight in self._weights.items()
            if id(weight) in unused
            and weight.is_floating_point()
            # modules that ran may keep tables that they use only in other cases
            and (path in learnt or path.rpartition(".")[0] not in self._called)
        }
        self.trace.unseen = Unseen(
            tuple(weights),
            self._watch.unreached(),
            shared_channels(self._model, weights, self._boundaries, self._called, self.tagger.atoms),
        )
        for tensor in self.unused():
            self.tagger.freeze(self.layers_of(tensor), "not used in this run")
        self.trace.parameters = frozenset(name for name, _ in self._model.named_parameters())
        self.trace.roles, self.trace.norm_scales = _roles(self.trace)
        return self.trace


def _roles(trace: Trace) -> tuple[dict[tuple[str, int], Role], frozenset[str]]:
    """Roles of the weights' dimensions in the operations that use them, and the weights that scale a batch norm."""
    owner = {
        int(core.reshape(-1)[0]): (name, next(dim for dim, size in enumerate(core.shape) if size > 1))
        for name, value in trace.weights.items()
        for core in value.layers
    }
    roles: dict[tuple[str, int], Role] = {}
    scales: set[str] = set()

    def note(layers: Layers, meaning: Mapping[int, Role]) -> None:
        for core in layers:
            weight = owner.get(int(core.reshape(-1)[0]))
            dims = [dim for dim, size in enumerate(core.shape) if size > 1]
            if weight is not None and len(dims) == 1 and dims[0] in meaning:
                roles.setdefault(weight, meaning[dims[0]])

    for operation in trace.operations:
        name = operation.name.split(".")[1]
        if name in ("convolution", "deform_conv2d"):
            flags = [scalar for scalar in operation.scalars if isinstance(scalar, bool)]
            transposed = name == "convolution" and flags[0]
            note(operation.inputs[1].layers, {0: "in", 1: "out"} if transposed else {0: "out", 1: "in"})
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = operation.inputs[-2:]
            last = len(right.shape) - 1
            note(right.layers, {last - 1: "in", last: "out"})
            note(left.layers, {last - 1: "out", last: "in"})
        elif name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
            note(operation.inputs[0].layers, {1: "out"})
        elif "batch_norm" in name and len(operation.inputs) > 1:
            scales |= {
                owner[int(core.reshape(-1)[0])][0]
                for core in operation.inputs[1].layers
                if int(core.reshape(-1)[0]) in owner
            }
    return roles, frozenset(scales)


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    except (NotImplementedError, RuntimeError):  # sparse tensors, for example, have no storage
        return weakref.ref(tensor)
