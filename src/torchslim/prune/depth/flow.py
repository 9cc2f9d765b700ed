"""Records how values flow through one run of a model: which operation reads the result of which, in which call.

Values are told apart by their storage and the last operation that wrote to it. So views and operations in place need no
rules of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torchslim.core.isolation import preserved_globals
from torchslim.core.step import Inputs
from torchslim.core.tensor_objects import unpacked
from torchslim.core.trees import tensors
from torchslim.prune.dependency.leaves import leaves
from torchslim.prune.dependency.trace import call, elementary, named_weights
from torchslim.prune.structured.bypass import Place, arguments, named_arguments

ADDITIONS = ("add", "add_", "sub", "sub_")
"""Operations that may add a branch to its shortcut."""

PLAIN = (bool, int, float, str, type(None))

Shape = tuple[int, ...]
Key = tuple[str, int]
"""Path of a module, and the number of an addition among those that a call of it runs itself."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor at the boundary of a call: its last writer, a negative number for inputs and weights, and its form."""

    source: int
    shape: Shape
    dtype: torch.dtype

    @property
    def floating(self) -> bool:
        """Whether it holds real numbers."""
        return self.dtype.is_floating_point


class Unknown:
    """A value at the boundary of a call that is no tensor, container or plain value."""


@dataclass(slots=True)
class ModuleCall:
    """One call of a module: its operations are those from `start` to `end`."""

    path: str
    parent: int  # number of the call around it; -1 for a call of the model
    start: int
    end: int = -1
    given: Any = None  # arguments by name, tensors as `Leaf`
    returned: Any = None
    additions: int = 0


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor that an addition adds."""

    source: int
    shape: Shape
    floating: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of the run."""

    name: str
    reads: frozenset[int]
    call: int  # number of the innermost call
    macs: int
    shape: Shape  # of its first output
    key: Key | None = None  # of an addition
    terms: tuple[Term, ...] = ()  # of an addition of two tensors


@dataclass
class Flow:
    """The operations and calls of a run in order, and the values that it returns."""

    steps: list[Step] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)

    def live(self, cut: Mapping[int, int]) -> set[int]:
        """Operations that outputs depend on, where the step of each key of `cut` does not read that value."""
        alive = {source for source in self.outputs if source >= 0}
        for index in range(len(self.steps) - 1, -1, -1):
            if index in alive:
                step = self.steps[index]
                alive.update(step.reads - {cut[index]} if index in cut else step.reads)
        return {index for index in alive if index >= 0}

    def chain(self, number: int) -> list[int]:
        """Numbers of a call and the calls around it, the outermost first."""
        numbers: list[int] = []
        while number >= 0:
            numbers.append(number)
            number = self.calls[number].parent
        return numbers[::-1]

    def descends(self, source: int, ancestor: int) -> bool:
        """Whether a value depends on another one."""
        stack, seen = [source], set()
        while stack:
            current = stack.pop()
            if current == ancestor:
                return True
            if current >= 0 and current > ancestor and current not in seen:
                seen.add(current)
                stack.extend(self.steps[current].reads)
        return False

    def roots(self, source: int) -> list[int]:
        """A value and those that it was made of by operations that read nothing else, the nearest first."""
        values = [source]
        while source >= 0 and len(self.steps[source].reads) == 1:
            (source,) = self.steps[source].reads
            values.append(source)
        return values

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the run."""
        return sum(step.macs for step in self.steps)


def all_tensors(tree: Any) -> list[Tensor]:
    """Tensors of a call's arguments or results, those in objects such as caches included."""
    return tensors(unpacked(tree))


def places(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """The leaves of nested tuples, lists and dicts, with their places."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from places(item, (*place, key))
    elif isinstance(tree, (tuple, list)):
        for index, item in enumerate(tree):
            yield from places(item, (*place, index))
    else:
        yield place, tree


def record(model: nn.Module, inputs: Inputs) -> Flow:
    """Run a copy of a model in evaluation mode and record the flow; the copy's own state may change as in any run."""
    recorder = _Recorder(model.eval(), inputs)
    with elementary(model), preserved_globals(seed=0), watching(model, recorder.enter, recorder.leave), recorder:
        outputs = call(model, inputs)
    recorder.flow.outputs = {recorder.source(tensor) for tensor in all_tensors(outputs)} | recorder.rewritten()
    return recorder.flow


@contextmanager
def watching(model: nn.Module, enter: Any, leave: Any) -> Iterator[None]:
    """Call `enter(path, module, args, kwargs)` before every call of a module, and `leave` with its output after it.

    An output that `leave` returns replaces the module's own.
    """

    def entering(path: str) -> Any:
        return lambda module, args, kwargs: enter(path, module, args, kwargs)

    def leaving(path: str) -> Any:
        return lambda module, args, kwargs, output: leave(path, module, args, kwargs, output)

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(entering(path), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leaving(path), with_kwargs=True).remove)
        yield


def storage(tensor: Tensor) -> int:
    """Identity of a tensor's memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without a storage
        return -id(tensor)


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.flow = Flow()
        self._inside: list[int] = []
        self._names = {path: named_arguments(module) for path, module in model.named_modules()}
        self._kept = [*named_weights(model).values(), *all_tensors(inputs)]
        self._sources = {storage(tensor): -2 - place for place, tensor in enumerate(self._kept)}
        self._given = dict(self._sources)

    def rewritten(self) -> set[int]:
        """The last writers of the inputs and weights that the run changed."""
        return {source for key in self._given if (source := self._sources[key]) != self._given[key]}

    def source(self, tensor: Tensor) -> int:
        return self._sources.get(storage(tensor), -1)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Leaf(self.source(value), tuple(value.shape), value.dtype)
        if type(value) in (tuple, list):
            return type(value)(self._leaf(item) for item in value)
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: self._leaf(item) for key, item in value.items()}
        return value if isinstance(value, PLAIN) else Unknown()

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = self._leaf(arguments(self._names[path], args, kwargs))
        parent = self._inside[-1] if self._inside else -1
        self._inside.append(len(self.flow.calls))
        self.flow.calls.append(ModuleCall(path, parent, len(self.flow.steps), given=given))

    def leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current = self.flow.calls[self._inside.pop()]
        current.end, current.returned = len(self.flow.steps), self._leaf(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reads = frozenset(self.source(tensor) for tensor in read) if func._opname != "lift_fresh" else frozenset()
        key, terms = self._addition(func, args)
        result = func(*args, **kwargs)
        made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        known = {storage(tensor) for tensor in read}
        written = [tensor for tensor in made if storage(tensor) not in known]
        if func._schema.is_mutable:
            written += [
                leaf
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
                for leaf in leaves(value)
                if isinstance(leaf, Tensor)
            ]
            written += [value for name, value in kwargs.items() if name == "out" and isinstance(value, Tensor)]
        if not written:  # a view, whose readers read the storage's last writer
            return result
        index = len(self.flow.steps)
        for tensor in written:
            self._sources[storage(tensor)] = index
        shape = tuple(written[0].shape)
        inside = self._inside[-1] if self._inside else -1
        self.flow.steps.append(Step(func._opname, reads, inside, _macs(func, args, kwargs, result), shape, key, terms))
        return result

    def _addition(self, func: Any, args: Sequence[Any]) -> tuple[Key | None, tuple[Term, ...]]:
        if not is_addition(func, args):
            return None, ()
        path, number = "", -1
        if self._inside:
            current = self.flow.calls[self._inside[-1]]
            path, number = current.path, current.additions
            current.additions += 1
        return (path, number), tuple(
            Term(self.source(term), tuple(term.shape), term.is_floating_point()) for term in args[:2]
        )


def is_addition(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation adds two tensors."""
    return func._opname in ADDITIONS and len(args) > 1 and all(isinstance(term, Tensor) for term in args[:2])


def _macs(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result)) // 2
