"""Runs a model along a trace; the shrunk model's run checks shapes and records a footprint of every operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.isolation import preserved_globals
from torchslim.core.step import Inputs
from torchslim.core.trees import tensors
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.leaves import leaves
from torchslim.prune.dependency.precision import Precise
from torchslim.prune.dependency.trace import Dependent, Operation, Shape, Stack, Value, call, elementary, named_weights
from torchslim.prune.dependency.verify_values import digest, gathered, spread

PASSING = frozenset(
    {
        "clone",
        "alias",
        "detach",
        "empty",
        "as_strided_",
        "expand",
        "contiguous",
        "lift_fresh",
        "_to_copy",
    }
)
"""Operations that occur or not depending on memory layout and precision; they are left out of the comparison."""

ASIDE = frozenset({"_embedding_bag", "_embedding_bag_forward_only"})
"""Operations with further outputs, whose shapes depend on the kernel; only the first output is compared."""

UNSET = frozenset({"empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})
"""Operations that return uninitialized memory; their values are not compared."""

COUNTING = frozenset({"nms", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"})
"""Operations whose output sizes depend on the data."""

SORTING = frozenset({"sort", "topk", "nms"})
"""Operations that order values; rounding may swap values that are almost equal."""

NAMES = {"_unsafe_view": "view", "_reshape_alias": "view"}


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first point where a run differs from the prediction."""

    index: int  # index of the operation in the trace
    path: str  # the running module
    what: str


@dataclass(slots=True)
class Footprint:
    """Record of one operation of the shrunk run."""

    scalars: tuple[Any, ...]
    values: list[tuple[Shape, float, float] | None]
    order: Tensor | None = None  # the elements that a sort or suppression took, in order
    place: int | None = None  # in `Run.expected`; None if the operation depends on data and not on channels
    constant: bool = False
    name: str = ""

    def spare(self, name: str) -> bool:
        """Is the footprint of an operation on constants other than `name`, which may be missing?"""
        return self.constant and self.name != name


class Mismatch(Exception):
    """Raised inside a run to stop it."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(divergence.what)
        self.divergence = divergence


def opname(func: Any) -> str:
    """Name of an operation without its overload; aliases share one name."""
    name: str = func._opname
    return NAMES.get(name, name)


def lifted(func: Any, args: Any) -> float | None:
    """The number in a call of `torch.tensor(number)`; None for other operations."""
    if func._opname == "lift_fresh" and args[0].numel() == 1 and args[0].dtype != torch.bool:
        return float(args[0])
    return None


def compared(operations: Sequence[Operation]) -> list[int]:
    """The indices of the operations at which the runs must agree."""
    return [index for index, operation in enumerate(operations) if _base(operation.name) not in PASSING]


def _base(name: str) -> str:
    return name.split(".")[1]


class Run(Precise):
    """A run that follows a trace."""

    def __init__(
        self, model: nn.Module, coupling: Coupling, removed: Mask, precision: torch.dtype | None = None
    ) -> None:
        super().__init__(precision)
        self.coupling, self.removed = coupling, removed
        self.operations = coupling.trace.operations
        self.expected = compared(self.operations)
        self.at = 0
        self.stack = Stack(model)
        self.dependent = Dependent(())
        self.outputs: list[Tensor] = []

    @property
    def index(self) -> int:
        """Index of the operation of the trace that comes next."""
        return self.expected[min(self.at, len(self.expected) - 1)]

    def fail(self, what: str) -> Mismatch:
        """The exception for a divergence at the current operation."""
        index = self.index
        return Mismatch(Divergence(index, self.operations[index].path, what))

    def skipped(self, place: int, name: str) -> int:
        """The place after operations on constants that this run skips."""
        while (
            place < len(self.expected) and self.wanted(place) != name and self.operations[self.expected[place]].constant
        ):
            place += 1
        return place

    def wanted(self, place: int) -> str:
        """Name of the expected operation at a place; empty after the end."""
        if place >= len(self.expected):
            return ""
        name = _base(self.operations[self.expected[place]].name)
        return NAMES.get(name, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        arguments = leaves((args, kwargs))
        random = self.noise.drawn_by(func)
        constant = not self.dependent.note(arguments, (), random=random)
        result = self.operate(func, args, kwargs, constant)
        if not constant:
            written = (arguments[0],) if func._schema.is_mutable and arguments else ()
            self.dependent.note((), (*leaves(result), *written), random=True)
        return result

    def operate(self, func: Any, args: Any, kwargs: Any, constant: bool) -> Any:
        """Run one operation and return its result."""
        raise NotImplementedError

    def follow(self, model: nn.Module, inputs: Inputs) -> None:
        """Run the whole model; raises Mismatch where it diverges, and any error of the model's own."""
        self.dependent = Dependent([*named_weights(model).values(), *tensors(inputs)])
        with elementary(model), preserved_globals(seed=0), self.stack.watching(), self.promoting():
            self.outputs = tensors(call(model, inputs))


class Follower(Run):
    """Runs the shrunk model and checks its shapes; with a `precision` it also records digests of its values."""

    def __init__(
        self, model: nn.Module, coupling: Coupling, removed: Mask, precision: torch.dtype | None = None
    ) -> None:
        super().__init__(model, coupling, removed, precision)
        self.values = precision is not None
        self.loose = False  # has a size occurred that depends on data?
        self.footprints: list[Footprint] = []
        self.lifted: list[float] = []

    def operate(self, func: Any, args: Any, kwargs: Any, constant: bool) -> Any:
        """Run the operation, and record its footprint unless it is in `PASSING`."""
        if opname(func) in PASSING:
            if (number := lifted(func, args)) is not None:
                self.lifted.append(number)
            return self.execute(func, args, kwargs)
        operation = self.next(func, constant)
        result = (
            self._drawn(func, args, kwargs, operation)
            if self.noise.drawn_by(func)
            else self.execute(func, args, kwargs)
        )
        outputs = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        outputs = outputs[:1] if opname(func) in ASIDE else outputs
        order = outputs[-1] if self.values and opname(func) in SORTING else None
        if operation is None or (self.loose and not self._concerns(self.at)):
            self.footprints.append(Footprint((), [], order, None, constant, opname(func)))
            self.at += operation is not None
            return result
        self.loose |= opname(func) in COUNTING or torch.Tag.dynamic_output_shape in func.tags
        for value, output in zip(operation.outputs, outputs, strict=False):
            shape = self._shape(value, tuple(output.shape))
            if shape != tuple(output.shape):
                raise self.fail(f"{opname(func)} gives {tuple(output.shape)} instead of {shape}")
        scalars = [leaf for leaf in leaves((args, kwargs)) if not isinstance(leaf, Tensor)]
        valued = self.values and opname(func) not in UNSET
        digests = [digest(output) if valued else None for output in outputs]
        self.footprints.append(Footprint(tuple(scalars), digests, order, self.at, constant, opname(func)))
        self.at += 1
        return result

    def _drawn(self, func: Any, args: Any, kwargs: Any, operation: Operation | None) -> Any:
        """Draw random numbers of the original's size, and return those of the channels that this model keeps."""
        if operation is None:
            return self.draw(func, args, kwargs)
        drawn = operation.outputs[0]

        def kept(value: Value, shape: Shape) -> list[Mask | None]:
            keep = self.coupling.kept(value.layers, value.shape, self.removed)
            sizes = [size if mask is None else int(mask.sum()) for size, mask in zip(shape, keep, strict=False)]
            if len(shape) != len(keep) or sizes != list(shape):
                raise self.fail(f"{opname(func)} draws random numbers of {shape} where {tuple(sizes)} was predicted")
            return keep

        return self.draw(
            func,
            args,
            kwargs,
            sizes=lambda shape: tuple(
                size if mask is None else len(mask) for size, mask in zip(shape, kept(drawn, shape), strict=True)
            ),
            spread=lambda place, value: spread(
                value, kept(operation.inputs[place], tuple(value.shape)), operation.inputs[place].shape
            ),
            gather=lambda place, value: gathered(
                value, self.coupling.kept(operation.outputs[place].layers, tuple(value.shape), self.removed)
            ),
        )

    def next(self, func: Any, constant: bool) -> Operation | None:
        """The operation of the trace that runs now; None for an operation that is not in the trace.

        Where sizes depend on data, the path may too: operations without removable channels may be added or missing. So
        may operations on constants, whose results code may cache from one run to the next.
        """
        name, place = opname(func), self.skipped(self.at, opname(func))
        while self.loose and place < len(self.expected) and self.wanted(place) != name and not self._concerns(place):
            place += 1
        if self.wanted(place) == name:
            self.at = place
            return self.operations[self.expected[place]]
        if self.loose or constant:
            return None
        if not self.wanted(place):
            raise self.fail(f"{name} comes after the end of the traced run")
        raise self.fail(f"{name} runs where the traced run has {self.wanted(place)}")

    def _concerns(self, place: int) -> bool:
        operation = self.operations[self.expected[place]]
        return any(
            self.coupling.learnt[classes].any()
            for value in (*operation.inputs, *operation.outputs)
            for classes in self.coupling.classes(value.layers)
        )

    def follow(self, model: nn.Module, inputs: Inputs) -> None:
        """Run the whole model; raises Mismatch also if operations on removable channels are missing at the end."""
        super().follow(model, inputs)
        self.at = self.skipped(self.at, "")
        while self.loose and self.at < len(self.expected) and not self._concerns(self.at):
            self.at += 1
        if self.at < len(self.expected):
            raise self.fail("the run ends before the traced one")

    def _shape(self, value: Value, got: Shape) -> Shape:
        """Predicted shape of a value; sizes that may depend on data and lose nothing are taken from `got`."""
        shape = self.coupling.shape(value, self.removed)
        if not self.loose or len(got) != len(shape):
            return shape
        return tuple(new if old == size else size for old, size, new in zip(value.shape, shape, got, strict=True))
