"""Runs a model in one precision, whatever precision its code asks for.

The check runs in float64. Tensors that `forward` creates, constants, attributes that are not buffers and casts in the
code are float32; here all of them become float64. No global setting changes: both modes belong to one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from torchslim.prune.dependency.leaves import filled, leaves
from torchslim.prune.dependency.noise import Noise

WIDER: Mapping[torch.dtype, Mapping[torch.dtype, torch.dtype]] = {
    torch.float64: {
        torch.float16: torch.float64,
        torch.bfloat16: torch.float64,
        torch.float32: torch.float64,
        torch.complex32: torch.complex128,
        torch.complex64: torch.complex128,
    },
    torch.float32: {
        torch.float16: torch.float32,
        torch.bfloat16: torch.float32,
        torch.complex32: torch.complex64,
    },
}
"""The dtype that each lower precision becomes, by the precision of a run."""


def widened(value: Tensor, precision: torch.dtype) -> Tensor:
    """A floating or complex tensor in at least this precision; other tensors are returned unchanged."""
    wider = WIDER[precision].get(value.dtype)
    return value if wider is None else value.to(wider)


class Precise(TorchDispatchMode):
    """Runs a model in one precision, with the same random numbers in every run.

    Args:
        precision: torch.float64 or torch.float32; None keeps the model's own.
    """

    def __init__(self, precision: torch.dtype | None) -> None:
        super().__init__()
        self.precision = precision
        self.wider = WIDER[precision] if precision is not None else {}
        self.noise = Noise()
        self._twins: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        return self.draw(func, args, kwargs) if self.noise.drawn_by(func) else self.execute(func, args, kwargs)

    def draw(self, func: Any, args: Any, kwargs: Any, **placing: Any) -> Any:
        """Run a random operation: see `Noise.draw`."""
        return self._cast(self.noise.draw(func, args, kwargs, **placing))

    @contextmanager
    def promoting(self) -> Iterator[None]:
        """Enter this mode, and one above it that widens arguments before torch compares their types."""
        with _Promoting(self), self:
            yield

    def precise(self, args: Any, kwargs: Any) -> Any:
        """The arguments, with tensors and types of a lower precision replaced by those of the run."""
        if not self.wider:
            return args, kwargs
        flat = leaves((args, kwargs))
        wide = [self.wide(leaf) for leaf in flat]
        if all(new is old for new, old in zip(wide, flat, strict=True)):
            return args, kwargs
        return filled((args, kwargs), iter(wide))

    def wide(self, leaf: Any) -> Any:
        """A tensor or type in the run's precision; a tensor always gets the same copy, as code may write to it."""
        if isinstance(leaf, torch.dtype):
            return self.wider.get(leaf, leaf)
        if not isinstance(leaf, Tensor) or leaf.dtype not in self.wider:
            return leaf
        twin = self._twins.get(leaf)
        if twin is None:
            with _disable_current_modes(), torch.no_grad():
                twin = leaf.detach().to(self.wider[leaf.dtype])
            self._twins[leaf] = twin
        return twin

    def execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operation; widen its result if that has a lower precision because no argument sets one."""
        result = execute(func, args, kwargs)
        if not self.wider:
            return result
        flat = leaves(result)
        if not any(isinstance(leaf, Tensor) and leaf.dtype in self.wider for leaf in flat):
            return result
        if torch.Tag.pointwise in func.tags:  # such as a division of integers: compute in the run's precision
            numbers = leaves((args, kwargs))
            precise = (number.to(self.precision) if isinstance(number, Tensor) else number for number in numbers)
            args, kwargs = filled((args, kwargs), precise)
            return func(*args, **kwargs)
        return self._cast(result)

    def _cast(self, result: Any) -> Any:
        flat = leaves(result)
        low = [isinstance(leaf, Tensor) and leaf.dtype in self.wider for leaf in flat]
        wide = (leaf.to(self.wider[leaf.dtype]) if is_low else leaf for leaf, is_low in zip(flat, low, strict=True))
        return filled(result, wide) if any(low) else result


class _Promoting(TorchFunctionMode):
    def __init__(self, run: Precise) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, torch._ops.OpOverload):
            args, kwargs = self.run.precise(args, kwargs or {})
        return func(*args, **(kwargs or {}))


def execute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run the operation, in float64 also where torch only supports lower precision."""
    if func._opname == "_grouped_mm" and args[0].dtype == torch.float64:
        rows, stack, ends = args[:3]
        parts = rows.tensor_split(ends[:-1].cpu().long())
        return torch.cat([part @ matrix for part, matrix in zip(parts, stack, strict=True)])
    return func(*args, **kwargs)
