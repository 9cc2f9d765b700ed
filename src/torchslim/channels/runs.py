"""Runs that follow a trace: the shrunk model's, which leaves footprints, and the masked original's, which must fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchslim.channels.groups import Coupling, Mask
from torchslim.channels.leaves import filled, leaves
from torchslim.channels.trace import Operation, Shape, Stack, Value, call, elementary, named_weights
from torchslim.channels.values import calm, digest, execute, gathered, in_order, spread, zeroed
from torchslim.isolation import preserved_globals
from torchslim.steps import Inputs
from torchslim.task import tensors

TOLERANCE = 1e-6
"""Of float64 values, relative to their norm."""

COMPACT = frozenset({
    "native_layer_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "cudnn_batch_norm", "_softmax", "_log_softmax", "_safe_softmax", "mean", "var", "std", "var_mean", "std_mean",
    "amax", "amin", "max", "min", "prod", "logsumexp", "argmax", "argmin", "all", "cumprod", "aminmax", "logcumsumexp",
})  # fmt: skip
"""Operations to which a zero is not as good as nothing: the masked run gives them only what is kept."""

PASSING = frozenset({
    "clone", "alias", "detach", "empty", "as_strided_", "expand", "contiguous", "lift_fresh", "_to_copy",
})  # fmt: skip
"""Operations that come and go with memory layout and precision; the runs are not compared at them."""

LOW = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""What the model may cast to; the check stays in float64."""

RANDOM = frozenset({"rand", "randn", "rand_like", "randn_like", "bernoulli", "bernoulli_", "uniform_", "normal_",
                    "normal", "randint", "multinomial", "randperm", "exponential_", "random_"})  # fmt: skip
COUNTING = frozenset({"nms", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"})
"""Operations of which the data decides how much comes out."""

SCALING = frozenset({"mul", "div"})
"""Operations whose whole numbers may be sizes."""

SORTING = frozenset({"sort", "topk", "nms"})
"""Operations that decide by comparing: rounding may turn near ties."""

NAMES = {"_unsafe_view": "view", "_reshape_alias": "view"}
POWERS = (1.0, 0.5, 0.25)


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


class Precise(TorchDispatchMode):
    """A run that stays in float64, and in which random numbers are constants."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.double = any(each.dtype == torch.float64 for each in named_weights(model).values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        result = execute(func, args, kwargs)
        return calm(result) if opname(func) in RANDOM else result

    def precise(self, args: Any, kwargs: Any) -> Any:
        """The arguments with casts to lower precision left out, in a float64 run."""
        if not self.double:
            return args, kwargs
        flat = leaves((args, kwargs))
        low = [isinstance(leaf, torch.dtype) and leaf in LOW for leaf in flat]
        if not any(low):
            return args, kwargs
        chosen = (torch.float64 if each else leaf for leaf, each in zip(flat, low, strict=True))
        return filled((args, kwargs), chosen)


class Run(Precise):
    """A run that follows a trace."""

    def __init__(self, model: nn.Module, coupling: Coupling, removed: Mask) -> None:
        super().__init__(model)
        self.coupling, self.removed = coupling, removed
        self.operations = coupling.trace.operations
        self.expected = compared(self.operations)
        self.at = 0
        self.stack = Stack(model)
        self.outputs: list[Tensor] = []

    @property
    def index(self) -> int:
        """The operation of the trace that comes next."""
        return self.expected[min(self.at, len(self.expected) - 1)]

    def fail(self, what: str) -> Mismatch:
        """A divergence at the current operation."""
        index = self.index
        return Mismatch(Divergence(index, self.operations[index].path, what))

    def wanted(self, place: int) -> str:
        """The name of the operation at a place of the expected ones; empty after the end."""
        if place >= len(self.expected):
            return ""
        name = _base(self.operations[self.expected[place]].name)
        return NAMES.get(name, name)

    def follow(self, model: nn.Module, inputs: Inputs) -> None:
        """Run the whole model; raises Mismatch where it diverges, whatever else the model raises."""
        with elementary(model), preserved_globals(seed=0), self.stack.watching(), self:
            self.outputs = tensors(call(model, inputs))


class Follower(Run):
    """The shrunk model's run: shapes must be as predicted; with `footprints` it leaves numbers to compare with."""

    def __init__(self, model: nn.Module, coupling: Coupling, removed: Mask, *, values: bool) -> None:
        super().__init__(model, coupling, removed)
        self.values = values
        self.loose = False  # has a size been seen that depends on data?
        self.footprints: list[Footprint] = []
        self.lifted: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        if opname(func) in PASSING:
            if (number := lifted(func, args)) is not None:
                self.lifted.append(number)
            return execute(func, args, kwargs)
        operation = self.next(func)
        result = execute(func, args, kwargs)
        if opname(func) in RANDOM:
            result = calm(result)
        outputs = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        order = outputs[-1] if self.values and opname(func) in SORTING else None
        if operation is None or (self.loose and not self._concerns(self.at)):
            self.footprints.append(Footprint((), [], order))
            self.at += operation is not None
            return result
        self.loose |= opname(func) in COUNTING or torch.Tag.dynamic_output_shape in func.tags
        for value, output in zip(operation.outputs, outputs, strict=False):
            shape = self._shape(value, tuple(output.shape))
            if shape != tuple(output.shape):
                raise self.fail(f"{opname(func)} gives {tuple(output.shape)} instead of {shape}")
        scalars = [leaf for leaf in leaves((args, kwargs)) if not isinstance(leaf, Tensor)]
        digests = [digest(each) if self.values else None for each in outputs]
        self.footprints.append(Footprint(tuple(scalars), digests, order, self.at))
        self.at += 1
        return result

    def next(self, func: Any) -> Operation | None:
        """The operation of the trace that runs now; None for one that only this run's data bring about.

        Where sizes depend on data, so may the path: operations without channels that could go may come and go.
        """
        name, place = opname(func), self.at
        while self.loose and place < len(self.expected) and self.wanted(place) != name and not self._concerns(place):
            place += 1
        if self.wanted(place) == name:
            self.at = place
            return self.operations[self.expected[place]]
        if self.loose:
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


class Masked(Run):
    """The original's run with everything removed set to zero; each value must leave what the shrunk run left."""

    def __init__(self, model: nn.Module, coupling: Coupling, removed: Mask, followed: Follower) -> None:
        super().__init__(model, coupling, removed)
        self.footprints = followed.footprints
        self.step = 0
        self.lifted = iter(followed.lifted)
        self.largest = 0.0
        self.ratios = _ratios(coupling, removed)

    def keep(self, layers: Any, shape: Shape) -> list[Mask | None]:
        """Per dimension what stays."""
        return self.coupling.kept(layers, shape, self.removed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        name = opname(func)
        if name in PASSING:
            result = execute(func, args, kwargs)
            number = lifted(func, args)
            if number is not None and (other := next(self.lifted, number)) != number:
                result = torch.full_like(result, self.scale(func, number, other))
            return result
        if self.step >= len(self.footprints):
            raise self.fail(f"{name} comes after the end of the shrunk run")
        footprint = self.footprints[self.step]
        self.step += 1
        if footprint.place is None:
            return self._aside(func, args, kwargs, footprint)
        self.at = footprint.place
        if self.wanted(self.at) != name:
            raise self.fail(f"{name} runs where the shrunk run has {self.wanted(self.at)}")
        operation = self.operations[self.index]
        touched = any(
            any(each is not None for each in self.keep(value.layers, value.shape)) for value in operation.inputs
        )
        if name in COMPACT and touched:
            result = self._compact(func, args, kwargs, operation, footprint)
        else:
            result = self._plain(func, args, kwargs, footprint)
        if name in RANDOM:
            result = calm(result)
        if footprint.order is not None:
            result = in_order(func, args, kwargs, footprint.order)
        flat = leaves(result)
        place = 0
        for position, leaf in enumerate(flat):
            if not isinstance(leaf, Tensor):
                continue
            if place < len(operation.outputs):
                value = operation.outputs[place]
                keep = self.keep(value.layers, value.shape)
                flat[position] = zeroed(leaf, keep)
                self._compare(flat[position], keep, footprint.values[place] if place < len(footprint.values) else None)
            place += 1
        return filled(result, iter(flat))

    def follow(self, model: nn.Module, inputs: Inputs) -> None:
        """As for every run; it must come as far as the shrunk one."""
        super().follow(model, inputs)
        if self.step < len(self.footprints):
            raise self.fail("the run ends before the shrunk one")

    def _aside(self, func: Any, args: Any, kwargs: Any, footprint: Footprint) -> Any:
        """An operation that concerns no channel, in a part of the run that depends on data."""
        if footprint.order is not None:
            return in_order(func, args, kwargs, footprint.order)
        result = execute(func, args, kwargs)
        return calm(result) if opname(func) in RANDOM else result

    def _plain(self, func: Any, args: Any, kwargs: Any, footprint: Footprint) -> Any:
        numbers = iter(footprint.scalars)
        chosen = []
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                chosen.append(leaf)
                continue
            other = next(numbers, leaf)
            scaling = isinstance(leaf, float) or (type(leaf) is int and opname(func).rstrip("_") in SCALING)
            if scaling and isinstance(other, (int, float)) and other != leaf:
                leaf = self.scale(func, leaf, other)
            chosen.append(leaf)
        args, kwargs = filled((args, kwargs), iter(chosen))
        return execute(func, args, kwargs)

    def scale(self, func: Any, mine: float, other: float) -> float:
        """The shrunk run's number, if it is this run's but for the sizes that it is computed from."""
        if not any(abs(other - mine * ratio) <= 1e-6 * abs(other) for ratio in self.ratios):
            raise self.fail(f"{opname(func)} takes {other!r} where the original takes {mine!r}")
        return other

    def _compact(self, func: Any, args: Any, kwargs: Any, operation: Operation, footprint: Footprint) -> Any:
        numbers, values = iter(footprint.scalars), iter(operation.inputs)
        chosen = []
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                value = next(values)
                chosen.append(gathered(leaf, self.keep(value.layers, value.shape)))
            else:
                chosen.append(next(numbers, leaf))
        args, kwargs = filled((args, kwargs), iter(chosen))
        result = execute(func, args, kwargs)
        flat = leaves(result)
        for position, (leaf, value) in enumerate(zip(flat, operation.outputs, strict=False)):
            flat[position] = spread(leaf, self.keep(value.layers, value.shape), value.shape)
        return filled(result, iter(flat))

    def _compare(self, full: Tensor, keep: list[Mask | None], wanted: tuple[Shape, float, float] | None) -> None:
        if wanted is None:
            return
        shape, norm, product = digest(gathered(full, keep))
        if shape != wanted[0]:
            raise self.fail(f"a value of shape {wanted[0]} should be of shape {shape}")
        error = max(abs(norm - wanted[1]), abs(product - wanted[2])) / max(norm, wanted[1], 1e-12)
        if not error <= TOLERANCE:
            raise self.fail(f"a value differs by {error:.1e} of its norm")
        self.largest = max(self.largest, error)


def _ratios(coupling: Coupling, removed: Mask) -> set[float]:
    """The factors that scales computed from changed sizes may change by."""
    pairs = set()
    for operation in coupling.trace.operations:
        for value in (*operation.inputs, *operation.outputs):
            if value.layers:
                pairs |= set(zip(value.shape, coupling.shape(value, removed), strict=True))
    ratios = {new / old for old, new in pairs if new != old and new}
    return {sign for ratio in ratios for power in POWERS for sign in (ratio**power, ratio**-power)}
