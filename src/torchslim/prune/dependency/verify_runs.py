"""Runs that follow a trace: the shrunk model's, which leaves footprints, and the masked original's, which must fit."""

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
"""Operations that come and go with memory layout and precision; the runs are not compared at them."""

ASIDE = frozenset({"_embedding_bag", "_embedding_bag_forward_only"})
"""Operations that give more than their result, in shapes that depend on the kernel that runs."""

UNSET = frozenset({"empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})
"""Operations whose results hold whatever memory held."""

COUNTING = frozenset({"nms", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"})
"""Operations of which the data decides how much comes out."""

SORTING = frozenset({"sort", "topk", "nms"})
"""Operations that decide by comparing: rounding may turn near ties."""

NAMES = {"_unsafe_view": "view", "_reshape_alias": "view"}


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a run first left the prediction."""

    index: int  # of the operation in the trace
    path: str  # the module at work
    what: str


@dataclass(slots=True)
class Footprint:
    """What the shrunk run leaves of one operation."""

    scalars: tuple[Any, ...]
    values: list[tuple[Shape, float, float] | None]
    order: Tensor | None = None  # which elements a sort or a suppression took, in order
    place: int | None = None  # among the operations of the trace; None where data, not channels, bring it about
    constant: bool = False
    name: str = ""

    def spare(self, name: str) -> bool:
        """Is it of an operation on constants, and not the one that runs?"""
        return self.constant and self.name != name


class Mismatch(Exception):
    """Raised inside a run to stop it."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(divergence.what)
        self.divergence = divergence


def opname(func: Any) -> str:
    """An operation's name without its overload; aliases are one."""
    name: str = func._opname
    return NAMES.get(name, name)


def lifted(func: Any, args: Any) -> float | None:
    """The number that `torch.tensor(number)` makes."""
    if func._opname == "lift_fresh" and args[0].numel() == 1 and args[0].dtype != torch.bool:
        return float(args[0])
    return None


def compared(operations: Sequence[Operation]) -> list[int]:
    """The indices of the operations at which the runs must agree."""
    return [index for index, each in enumerate(operations) if _base(each.name) not in PASSING]


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
        """The operation of the trace that comes next."""
        return self.expected[min(self.at, len(self.expected) - 1)]

    def fail(self, what: str) -> Mismatch:
        """A divergence at the current operation."""
        index = self.index
        return Mismatch(Divergence(index, self.operations[index].path, what))

    def skipped(self, place: int, name: str) -> int:
        """The place after operations on constants that this run has no need of."""
        while (
            place < len(self.expected) and self.wanted(place) != name and self.operations[self.expected[place]].constant
        ):
            place += 1
        return place

    def wanted(self, place: int) -> str:
        """The name of the operation at a place of the expected ones; empty after the end."""
        if place >= len(self.expected):
            return ""
        name = _base(self.operations[self.expected[place]].name)
        return NAMES.get(name, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        given = leaves((args, kwargs))
        random = self.noise.drawn_by(func)
        constant = not self.dependent.note(given, (), random=random)
        result = self.operate(func, args, kwargs, constant)
        if not constant:
            written = (given[0],) if func._schema.is_mutable and given else ()
            self.dependent.note((), (*leaves(result), *written), random=True)
        return result

    def operate(self, func: Any, args: Any, kwargs: Any, constant: bool) -> Any:
        """One operation of the run."""
        raise NotImplementedError

    def follow(self, model: nn.Module, inputs: Inputs) -> None:
        """Run the whole model; raises Mismatch where it diverges, whatever else the model raises."""
        self.dependent = Dependent([*named_weights(model).values(), *tensors(inputs)])
        with elementary(model), preserved_globals(seed=0), self.stack.watching(), self.promoting():
            self.outputs = tensors(call(model, inputs))


class Follower(Run):
    """The shrunk model's run: shapes must be as predicted; in a `precision` it leaves numbers to compare with."""

    def __init__(
        self, model: nn.Module, coupling: Coupling, removed: Mask, precision: torch.dtype | None = None
    ) -> None:
        super().__init__(model, coupling, removed, precision)
        self.values = precision is not None
        self.loose = False  # has a size been seen that depends on data?
        self.footprints: list[Footprint] = []
        self.lifted: list[float] = []

    def operate(self, func: Any, args: Any, kwargs: Any, constant: bool) -> Any:
        """The operation with its footprint, if it is one of those that the trace has."""
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
        digests = [digest(each) if valued else None for each in outputs]
        self.footprints.append(Footprint(tuple(scalars), digests, order, self.at, constant, opname(func)))
        self.at += 1
        return result

    def _drawn(self, func: Any, args: Any, kwargs: Any, operation: Operation | None) -> Any:
        """Random numbers of the original's size, of which this model gets those of the channels that it keeps."""
        if operation is None:
            return self.draw(func, args, kwargs)
        made = operation.outputs[0]

        def kept(value: Value, shape: Shape) -> list[Mask | None]:
            keep = self.coupling.kept(value.layers, value.shape, self.removed)
            sizes = [size if each is None else int(each.sum()) for size, each in zip(shape, keep, strict=False)]
            if len(shape) != len(keep) or sizes != list(shape):
                raise self.fail(f"{opname(func)} draws random numbers of {shape} where {tuple(sizes)} was predicted")
            return keep

        return self.draw(
            func,
            args,
            kwargs,
            sizes=lambda shape: tuple(
                size if each is None else len(each) for size, each in zip(shape, kept(made, shape), strict=True)
            ),
            spread=lambda place, value: spread(
                value, kept(operation.inputs[place], tuple(value.shape)), operation.inputs[place].shape
            ),
            gather=lambda place, value: gathered(
                value, self.coupling.kept(operation.outputs[place].layers, tuple(value.shape), self.removed)
            ),
        )

    def next(self, func: Any, constant: bool) -> Operation | None:
        """The operation of the trace that runs now; None for one that only this run's data bring about.

        Where sizes depend on data, so may the path: operations without channels that could go may come and go. So may
        those on constants, which code may keep from one run to the next.
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
        """As for every run; all operations that concern channels must have come."""
        super().follow(model, inputs)
        self.at = self.skipped(self.at, "")
        while self.loose and self.at < len(self.expected) and not self._concerns(self.at):
            self.at += 1
        if self.at < len(self.expected):
            raise self.fail("the run ends before the traced one")

    def _shape(self, value: Value, got: Shape) -> Shape:
        """What is predicted; sizes that may depend on data and lose nothing are taken as they come."""
        shape = self.coupling.shape(value, self.removed)
        if not self.loose or len(got) != len(shape):
            return shape
        return tuple(new if old == size else size for old, size, new in zip(value.shape, shape, got, strict=True))
