"""Registers the rules, and calls the rule of an operation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchslim.prune.dependency.leaves import leaves
from torchslim.prune.dependency.propagation import Layers, Operand, Tagger


@dataclass(frozen=True)
class Call:
    """One call of an operation: its arguments, its outputs, and the layers of the tensors among them."""

    tagger: Tagger
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Any, ...]
    layers_of: Callable[[Any], Layers]
    positions: Callable[[Tensor, Sequence[Tensor], str], None]
    """Callback (output, layers, reason): the output holds positions along these layers, which stay if it is read."""

    def operand(self, value: Any) -> Operand:
        """A tensor's layers and shape; numbers have neither."""
        return (self.layers_of(value), tuple(value.shape)) if isinstance(value, Tensor) else ((), ())

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments."""
        return (leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor))


Rule = Callable[[Call], Sequence[Layers]]
"""Returns the layers of each output, in order; outputs beyond the last entry have none."""

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by their names without overloads."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply(call: Call) -> tuple[Sequence[Layers], bool]:
    """The outputs' layers, and whether the operation has a rule."""
    namespace, _, name = call.func._schema.name.partition("::")
    function = RULES.get(name) if namespace in ("aten", "torchvision", "prims") else None
    if function is None and _is_pointwise(call.func):
        function = RULES["where"]
    if function is None and name.endswith("_") and name[:-1] in RULES:
        function = RULES[name[:-1]]  # in place: the output is the same tensor
    if function is not None:
        return function(call), True
    call.tagger.freeze(
        (core for tensor in call.tensors() for core in call.layers_of(tensor)), f"operation {name!r} has no rule"
    )
    return (), False


@functools.cache
def _is_pointwise(func: Any) -> bool:
    packet = getattr(torch.ops, func.namespace)
    plain = getattr(packet, func._opname.removesuffix("_"), None)  # only the out-of-place form carries the tag
    overloads = [func, *(getattr(plain, name) for name in plain.overloads())] if plain is not None else [func]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def axis(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % max(rank, 1)


def axes(dims: Any, rank: int) -> list[int]:
    """Dimensions counted from the front; None and () stand for all of them."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [axis(dim, rank) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
