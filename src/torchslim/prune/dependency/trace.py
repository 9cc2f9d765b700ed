"""One real run of a model, operation by operation, with tags beside the values.

The run is watched below autograd by a dispatch mode, not exported: whatever runs can be analyzed, cache objects,
detectors' post-processing and data-dependent branches included, in the time of a forward pass.
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
    """A tensor that an operation gave: its shape and what each element stands and falls with."""

    shape: Shape
    layers: Layers
    floating: bool = True


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the run."""

    name: str
    path: str  # the innermost module at work
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    scalars: tuple[Any, ...]
    macs: int = 0
    factors: tuple[tuple[Layers, int], ...] = ()  # the dimensions that its multiply-accumulates are proportional to
    constant: bool = False  # neither inputs nor weights reach it: code may keep its result for the next run


class Dependent:
    """The tensors of a run that hang on the model's inputs, its weights or random numbers; all others are constants."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        self._tensors: Any = WeakIdKeyDictionary()
        for each in given:
            self._tensors[each] = True

    def note(self, given: Iterable[Any], made: Iterable[Any], *, random: bool = False) -> bool:
        """Does an operation on `given` depend on them? If so, what it made does."""
        found = random or any(isinstance(each, Tensor) and each in self._tensors for each in given)
        if found:
            for each in made:
                if isinstance(each, Tensor):
                    self._tensors[each] = True
        return found


@dataclass
class Trace:
    """What a run showed: the operations, the tags of every weight, and the constraints between atoms."""

    tagger: Tagger
    operations: list[Operation] = field(default_factory=list)
    weights: dict[str, Value] = field(default_factory=dict)  # parameters and buffers by path, each tensor once
    unruled: dict[str, int] = field(default_factory=dict)  # operations without a rule, and how often they ran
    parameters: frozenset[str] = frozenset()  # the weights that are learnt; the others are buffers
    roles: dict[tuple[str, int], Role] = field(default_factory=dict)  # what dimensions of weights mean to operations
    norm_scales: frozenset[str] = frozenset()  # weights that scale a batch norm
    training: str = ""  # why the training mode was not analyzed, where that was needed
    unseen: Unseen = field(default_factory=Unseen)  # code that no call reached


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its first path."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def scalars_of(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The arguments of an operation that are not tensors."""
    return tuple(
        leaf
        for leaf in leaves((args, kwargs))
        if not isinstance(leaf, Tensor) and isinstance(leaf, (int, float, bool, complex))
    )


class Stack:
    """Which module is at work, by path."""

    def __init__(self, model: nn.Module, at_boundary: Callable[[str, Any], None] | None = None) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._at_boundary = at_boundary  # called with a module's path and what enters or leaves the module
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
        """Hooks on every module, for the time of one run."""
        self.paths = [""]
        first = register_module_forward_pre_hook(self._enter)
        last = register_module_forward_hook(self._leave)
        try:
            yield
        finally:
            first.remove()
            last.remove()


@contextmanager
def elementary(model: nn.Module) -> Iterator[None]:
    """Fused attention and recurrent kernels are taken apart into operations that have rules."""
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
    """The model on its example inputs; what several calls give, in a list."""
    if isinstance(inputs, Examples):
        return [each(model) for each in inputs.calls]
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Run the model once in evaluation mode, and find what goes together.

    Weights that this run never uses may be used in training, as auxiliary heads are: then a run in training mode adds
    what it finds. The model's own state may change as in any forward pass: hand in a copy.
    """
    model.eval()
    recorder = _Recorder(model)
    recorder.run(inputs)
    if recorder.unused():
        model.train()
        operations, recorder.trace.operations = recorder.trace.operations, []
        try:
            recorder.run(inputs)
        except Exception as error:  # noqa: BLE001 - many models want more than example inputs to train on
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
        self._counts = True  # whether multiply-accumulates are those of the call on the example inputs
        self.noise = Noise()
        self.tagger = Tagger()
        self.trace = Trace(self.tagger)
        self._layers: Any = WeakIdKeyDictionary()
        self._dependent = Dependent(())
        self._causes: Any = WeakIdKeyDictionary()  # tensors that lost all their layers, with the first reason
        self._stored: dict[Any, Layers] = {}
        self._positions: Any = WeakIdKeyDictionary()  # tensors of positions along layers, with these and the reason
        self._used: set[int] = set()  # of tensors by identity; the weights stay alive, so none is taken for another
        self._weights = named_weights(model)
        for path, tensor in self._weights.items():
            if tensor not in self._layers:
                self._layers[tensor] = self.tagger.own(tensor.shape)
                self.trace.weights[path] = Value(tuple(tensor.shape), self._layers[tensor], tensor.is_floating_point())
                if tensor.numel():
                    self._stored[_storage(tensor)] = self._layers[tensor]

    def layers_of(self, value: Any) -> Layers:
        """The tags of a tensor; one that nobody made in this run is of a fixed size, unless it is a weight's data."""
        if not isinstance(value, Tensor):
            return ()
        found: Layers | None = self._layers.get(value)
        return self._stored.get(_storage(value), ()) if found is None else found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # random numbers as in the check, so that what hangs on them goes the same way
        drawn = self.noise.drawn_by(func)
        result = self.noise.draw(func, args, kwargs) if drawn else func(*args, **kwargs)
        outputs = tuple(leaf for leaf in leaves(result) if isinstance(leaf, Tensor))
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = str(func)
        self.tagger.path = self.stack.paths[-1]
        self.tagger.where = f"{self.tagger.path or 'model'}: {func._opname}"
        dependent = self._dependent.note(given, outputs, random=drawn)
        causes = (self._causes.get(each, "") for each in given if not self.layers_of(each))
        self.tagger.cause = next(filter(None, causes), "")
        self._read_positions(given)
        made = self._made(func, args, kwargs, outputs, given)
        self._used.update(map(id, given))
        for each in given:
            self._boundaries.note(self.tagger.path, tuple(each.shape), self.layers_of(each))
        for place, output in enumerate(outputs):
            layers = made[place] if place < len(made) else ()
            # what is known to stay is of a fixed size, as if it had no atoms
            self._layers[output] = tuple(core for core in layers if not self.tagger.atoms.stuck(core.numpy()))
            if not self._layers[output]:
                self._causes[output] = self._cause(layers, given)
            self._boundaries.note(self.tagger.path, tuple(output.shape), self._layers[output])
        cost, factors = self._cost(func, args, kwargs, result)
        self.trace.operations.append(
            Operation(
                name,
                self.stack.paths[-1],
                tuple(Value(tuple(each.shape), self.layers_of(each)) for each in given),
                tuple(Value(tuple(each.shape), self._layers[each], each.is_floating_point()) for each in outputs),
                scalars_of(args, kwargs),
                cost,
                factors,
                not dependent,
            )
        )
        return result

    def _cause(self, layers: Layers, given: list[Tensor]) -> str:
        """Why a value is of a fixed size: what holds its layers, or those that went in, or what held those before."""
        cores = (*layers, *(core for each in given for core in self.layers_of(each)))
        reasons = [each for core in cores if (each := self.tagger.atoms.why(core.numpy()))]
        telling = (reason for reason in reasons if not Reason.FIXED_SIZE.given_in(reason))
        return next(telling, self.tagger.cause or next(iter(reasons), ""))

    def _note_positions(self, tensor: Tensor, layers: Sequence[Tensor], why: str) -> None:
        if layers:
            self._positions[tensor] = (tuple(layers), f"{why} ({self.tagger.where})")

    def _read_positions(self, given: Iterable[Tensor]) -> None:
        """Positions along a dimension that may lose elements would change: what reads them keeps the dimension whole.

        Most models that take the largest of several values never look at its place.
        """
        for each in given:
            layers, why = self._positions.get(each, ((), ""))
            for core in layers:
                self.tagger.atoms.freeze(core.numpy(), why)

    def _made(self, func: Any, args: Any, kwargs: Any, outputs: Any, given: list[Tensor]) -> Any:
        call_ = Call(self.tagger, func, args, kwargs, outputs, self.layers_of, self._note_positions)
        try:
            made, known = apply(call_)
        except Exception as error:  # noqa: BLE001 - a rule that cannot cope freezes; the reason is reported
            layers = (core for each in given for core in self.layers_of(each))
            self.tagger.freeze(layers, f"the rule of {func._opname!r} failed: {type(error).__name__}: {error}")
            made, known = (), False
        if not known and any(self.layers_of(each) for each in given):
            self.trace.unruled[str(func)] = self.trace.unruled.get(str(func), 0) + 1
        return made

    def _cost(self, func: Any, args: Any, kwargs: Any, result: Any) -> tuple[int, tuple[tuple[Layers, int], ...]]:
        formula = flop_registry.get(func._overloadpacket)
        if formula is None or not self._counts:
            return 0, ()
        flops = int(formula(*args, **kwargs, out_val=result))
        if "convolution" in func._opname:
            kernel = self.layers_of(args[1])
            return flops // 2, ((kernel, 0), (kernel, 1))
        left, right = args[-2:] if func._opname in ("mm", "bmm") else args[1:3]
        first, second = self.layers_of(left), self.layers_of(right)
        return flops // 2, (*((first, dim) for dim in range(left.dim())), (second, right.dim() - 1))

    def _at_boundary(self, path: str, values: Any) -> None:
        self._called.add(path)
        for tensor in tensors(values):
            self._boundaries.note(path, tuple(tensor.shape), self.layers_of(tensor))

    def run(self, inputs: Inputs) -> None:
        """One forward pass, and the further calls of `Examples`. What reaches an output stays."""
        self.noise = Noise()
        self._dependent = Dependent([*self._weights.values(), *tensors(inputs)])
        with elementary(self._model), self.stack.watching(), self._watch.watching(), self:
            outputs = []
            for place, each in enumerate(calls_of(inputs)):
                self._counts = place == 0
                outputs.append(each(self._model))
        self.tagger.where = ""
        self._read_positions(tensors(outputs))
        for tensor in tensors(outputs):
            self.tagger.freeze(self.layers_of(tensor), Reason.OUTPUT)

    def unused(self) -> list[Tensor]:
        """Weights that no operation has seen; single numbers, as counters of batches, have nothing to lose."""
        return [weight for weight in self._weights.values() if id(weight) not in self._used and self.layers_of(weight)]

    def finish(self) -> Trace:
        """What the run never touched stays."""
        unused = {id(each) for each in self.unused()}
        learnt = {path for path, _ in self._model.named_parameters()}
        weights = {
            path: each
            for path, each in self._weights.items()
            if id(each) in unused
            and each.is_floating_point()
            # layers that ran keep tables that they use in other cases alone
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
    """What the dimensions of weights mean to the operations they are used in, and which weights scale a batch norm."""
    owner = {
        int(core.reshape(-1)[0]): (name, next(dim for dim, size in enumerate(core.shape) if size > 1))
        for name, value in trace.weights.items()
        for core in value.layers
    }
    found: dict[tuple[str, int], Role] = {}
    scales: set[str] = set()

    def note(layers: Layers, meaning: Mapping[int, Role]) -> None:
        for core in layers:
            weight = owner.get(int(core.reshape(-1)[0]))
            dims = [dim for dim, size in enumerate(core.shape) if size > 1]
            if weight is not None and len(dims) == 1 and dims[0] in meaning:
                found.setdefault(weight, meaning[dims[0]])

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
    return found, frozenset(scales)


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    except (NotImplementedError, RuntimeError):  # sparse and the like have no storage
        return weakref.ref(tensor)
