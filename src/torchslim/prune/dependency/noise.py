"""Draws random numbers that are the same in every run of a model, whatever size it is pruned to.

The n-th random operation of a run is seeded by n and runs at the size of the original, in float64. A shrunk model gets
the numbers of the channels that it keeps, so noise in evaluation is compared like all other values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchslim.prune.dependency.leaves import filled, leaves

RANDOM = frozenset(
    {
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "bernoulli",
        "bernoulli_",
        "uniform_",
        "normal_",
        "normal",
        "randint",
        "randint_like",
        "multinomial",
        "randperm",
        "exponential_",
        "random_",
        "cauchy_",
        "log_normal_",
        "geometric_",
        "poisson",
        "binomial",
        "native_dropout",
    }
)
"""Random operations by name; operations that torch tags as random count as well."""

Shape = tuple[int, ...]
Placed = Callable[[int, Tensor], Tensor]


class Noise:
    """Draws the numbers of one run's random operations, in order."""

    def __init__(self) -> None:
        self.count = 0

    @staticmethod
    def drawn_by(func: Any) -> bool:
        """Does the operation draw random numbers?"""
        return torch.Tag.nondeterministic_seeded in func.tags or func._opname in RANDOM

    def draw(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        *,
        sizes: Callable[[Shape], Shape] | None = None,
        spread: Placed | None = None,
        gather: Placed | None = None,
    ) -> Any:
        """Run the operation with the numbers that belong to its place in the run.

        Args:
            sizes: size among the arguments -> size in the original.
            spread: place of a tensor among the arguments, and the tensor -> the tensor in the original's shape.
            gather: place of an output, and its value in the original's shape -> the part that this model keeps.
        """
        self.count += 1
        inputs = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        full = [self._wide(value if spread is None else spread(place, value)) for place, value in enumerate(inputs)]
        originals = {id(new): old for new, old in zip(full, inputs, strict=True)}
        remaining = iter(full)
        flat = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves((args, kwargs))]
        new_args, new_kwargs = filled((args, kwargs), iter(flat))
        dtype = new_kwargs.get("dtype")
        if dtype is not None and dtype.is_floating_point:
            new_kwargs["dtype"] = torch.float64
        if "generator" in new_kwargs:
            new_kwargs["generator"] = None
        new_args = _with_size(func, new_args, sizes)
        device = inputs[0].device if inputs else torch.device(kwargs.get("device") or "cpu")
        _seed(self.count, device)
        result = func(*new_args, **new_kwargs)
        if dtype is None and _is_floating(result) and not inputs:  # no argument sets the precision
            _seed(self.count, device)
            dtype, new_kwargs["dtype"] = result.dtype, torch.float64
            result = func(*new_args, **new_kwargs)
        flat = leaves(result)
        for place, leaf in enumerate(flat):
            if isinstance(leaf, Tensor):
                kept = leaf if gather is None else gather(place, leaf)
                flat[place] = self._placed(kept, originals.get(id(leaf)), dtype, inputs)
        return filled(result, iter(flat))

    @staticmethod
    def _wide(value: Tensor) -> Tensor:
        # a copy, for in-place operations to write to; contiguous, as numbers are drawn in the order of memory
        value = value.detach().clone(memory_format=torch.contiguous_format)
        return value.double() if value.is_floating_point() else value

    @staticmethod
    def _placed(value: Tensor, target: Tensor | None, dtype: torch.dtype | None, inputs: list[Tensor]) -> Tensor:
        """The drawn numbers in the operation's precision, or `target` after an in-place operation wrote to it."""
        if target is not None:
            return target.copy_(value)
        if not value.is_floating_point():
            return value
        precision = dtype or next((tensor.dtype for tensor in inputs if tensor.is_floating_point()), value.dtype)
        return value.to(precision)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _seed(number: int, device: torch.device) -> None:
    """Seed torch's generators; every run restores the random state afterwards."""
    torch.default_generator.manual_seed(7919 * number)
    if device.type == "cuda":
        torch.cuda.manual_seed(7919 * number)


def _with_size(func: Any, args: Any, sizes: Callable[[Shape], Shape] | None) -> Any:
    """The arguments, with sizes replaced by those of the original."""
    if sizes is None:
        return args
    names = [argument.name for argument in func._schema.arguments]
    changed = list(args)
    for place, name in enumerate(names[: len(changed)]):
        if name == "size" and isinstance(changed[place], (list, tuple)):
            changed[place] = list(sizes(tuple(changed[place])))
        elif name == "n" and func._opname == "randperm":
            changed[place] = sizes((changed[place],))[0]
    return tuple(changed)
