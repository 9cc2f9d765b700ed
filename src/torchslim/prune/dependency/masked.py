"""Runs the masked original, and compares it with the shrunk model's run at every operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.step import Inputs
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.leaves import filled, leaves
from torchslim.prune.dependency.trace import Operation, Shape
from torchslim.prune.dependency.verify_runs import PASSING, Follower, Footprint, Run, lifted, opname
from torchslim.prune.dependency.verify_values import digest, gathered, in_order, spread, zeroed

TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-4}
"""Largest difference of a value, relative to its norm, by the precision of the check."""

COMPACT = frozenset(
    {
        "native_layer_norm",
        "_fused_rms_norm",
        "native_group_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "cudnn_batch_norm",
        "_softmax",
        "_log_softmax",
        "_safe_softmax",
        "mean",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "amax",
        "amin",
        "max",
        "min",
        "prod",
        "logsumexp",
        "argmax",
        "argmin",
        "all",
        "cumprod",
        "aminmax",
        "logcumsumexp",
        "median",
        "nanmedian",
        "cummax",
        "cummin",
    }
)
"""Operations whose result depends on removed channels even if these are zero: they run on the kept channels alone."""

SCALING = frozenset({"mul", "div"})
"""Operations with whole-number arguments that may be sizes."""

POWERS = (1.0, 0.5, 0.25)


class Masked(Run):
    """Runs the original with removed elements set to zero; each value must match the shrunk run's footprint."""

    def __init__(self, model: nn.Module, coupling: Coupling, removed: Mask, followed: Follower) -> None:
        super().__init__(model, coupling, removed, followed.precision)
        self.footprints = followed.footprints
        self.tolerance = TOLERANCE[followed.precision or torch.float64]
        self.step = 0
        self.lifted = iter(followed.lifted)
        self.largest = 0.0
        self.ratios = _ratios(coupling, removed)

    def keep(self, layers: Any, shape: Shape) -> list[Mask | None]:
        """One mask per dimension, True for the indices that stay; None where all of them stay."""
        return self.coupling.kept(layers, shape, self.removed)

    def operate(self, func: Any, args: Any, kwargs: Any, constant: bool) -> Any:
        """Run the operation with removed elements set to zero, and compare the result with its footprint."""
        name = opname(func)
        if name in PASSING:
            result = self.execute(func, args, kwargs)
            number = lifted(func, args)
            if number is not None and (shrunk_number := next(self.lifted, number)) != number:
                result = torch.full_like(result, self.scale(func, number, shrunk_number))
            return result
        footprint = self._footprint(name, constant)
        if footprint is None:
            return self.execute(func, args, kwargs)
        if footprint.place is None:
            return self._aside(func, args, kwargs, footprint)
        self.at = footprint.place
        if self.wanted(self.at) != name:
            raise self.fail(f"{name} runs where the shrunk run has {self.wanted(self.at)}")
        operation = self.operations[self.index]
        touched = any(
            any(mask is not None for mask in self.keep(value.layers, value.shape)) for value in operation.inputs
        )
        if name in COMPACT and touched:
            result = self._compact(func, args, kwargs, operation, footprint)
        else:
            result = self._plain(func, args, kwargs, footprint)
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

    def _footprint(self, name: str, constant: bool) -> Footprint | None:
        """The shrunk run's footprint; None for an operation on constants whose result that run had cached."""
        self._skip(name)
        if self.step < len(self.footprints) and (not constant or self.footprints[self.step].name == name):
            self.step += 1
            return self.footprints[self.step - 1]
        if constant:
            return None
        raise self.fail(f"{name} comes after the end of the shrunk run")

    def _skip(self, name: str) -> None:
        while self.step < len(self.footprints) and self.footprints[self.step].spare(name):
            self.step += 1

    def follow(self, model: nn.Module, inputs: Inputs) -> None:
        """Run the whole model; raises Mismatch also where it ends before the shrunk run."""
        super().follow(model, inputs)
        self._skip("")
        if self.step < len(self.footprints):
            raise self.fail("the run ends before the shrunk one")

    def _aside(self, func: Any, args: Any, kwargs: Any, footprint: Footprint) -> Any:
        """Run an operation that touches no channel, in a part of the run that depends on data."""
        if footprint.order is not None:
            return in_order(func, args, kwargs, footprint.order)
        return self.draw(func, args, kwargs) if self.noise.drawn_by(func) else self.execute(func, args, kwargs)

    def _plain(self, func: Any, args: Any, kwargs: Any, footprint: Footprint) -> Any:
        if self.noise.drawn_by(func):
            return self.draw(func, args, kwargs)
        numbers = iter(footprint.scalars)
        arguments = []
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                arguments.append(leaf)
                continue
            shrunk_number = next(numbers, leaf)
            scaling = isinstance(leaf, float) or (type(leaf) is int and opname(func).rstrip("_") in SCALING)
            if scaling and isinstance(shrunk_number, (int, float)) and shrunk_number != leaf:
                leaf = self.scale(func, leaf, shrunk_number)
            arguments.append(leaf)
        args, kwargs = filled((args, kwargs), iter(arguments))
        return self.execute(func, args, kwargs)

    def scale(self, func: Any, mine: float, other: float) -> float:
        """The shrunk run's number `other`, which may differ from `mine` only by a ratio of changed sizes."""
        if not any(abs(other - mine * ratio) <= 1e-6 * abs(other) for ratio in self.ratios):
            raise self.fail(f"{opname(func)} takes {other!r} where the original takes {mine!r}")
        return other

    def _compact(self, func: Any, args: Any, kwargs: Any, operation: Operation, footprint: Footprint) -> Any:
        numbers, values = iter(footprint.scalars), iter(operation.inputs)
        arguments = []
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                value = next(values)
                arguments.append(gathered(leaf, self.keep(value.layers, value.shape)))
            else:
                arguments.append(next(numbers, leaf))
        args, kwargs = filled((args, kwargs), iter(arguments))
        result = self.execute(func, args, kwargs)
        flat = leaves(result)
        for position, (leaf, value) in enumerate(zip(flat, operation.outputs, strict=False)):
            flat[position] = spread(leaf, self.keep(value.layers, value.shape), value.shape)
        return filled(result, iter(flat))

    def _compare(self, full: Tensor, keep: list[Mask | None], expected: tuple[Shape, float, float] | None) -> None:
        if expected is None:
            return
        shape, norm, product = digest(gathered(full, keep))
        if shape != expected[0]:
            raise self.fail(f"a value of shape {expected[0]} should be of shape {shape}")
        error = max(abs(norm - expected[1]), abs(product - expected[2])) / max(norm, expected[1], 1e-12)
        if not error <= self.tolerance:
            raise self.fail(f"a value differs by {error:.1e} of its norm")
        self.largest = max(self.largest, error)


def _ratios(coupling: Coupling, removed: Mask) -> set[float]:
    """Factors by which a scale that is computed from changed sizes may change."""
    pairs = set()
    for operation in coupling.trace.operations:
        for value in (*operation.inputs, *operation.outputs):
            if value.layers:
                pairs |= set(zip(value.shape, coupling.shape(value, removed), strict=True))
    ratios = {new / old for old, new in pairs if new != old and new}
    return {factor for ratio in ratios for power in POWERS for factor in (ratio**power, ratio**-power)}
