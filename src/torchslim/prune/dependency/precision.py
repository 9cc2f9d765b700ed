"""Runs in one precision, whatever precision the model's own code asks for.

The check runs in float64. Tensors that `forward` makes, constants and attributes that are no buffers are of float32,
and so are casts in the code; here all of them become float64. Nothing global changes: both modes belong to one thread.
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
"""By the precision of a run, what each lower precision becomes."""


def widened(value: Tensor, precision: torch.dtype) -> Tensor:
    """A floating or complex tensor in this precision; other tensors, and more precise ones, as they are."""
    wider = WIDER[precision].get(value.dtype)
    return value if wider is None else value.to(wider)


class Precise(TorchDispatchMode):
    """A run in one precision; None leaves the model's own. Random numbers are the same in every run.

    Args:
        precision: torch.float64 or torch.float32.
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
        """A random operation: see `Noise.draw`."""
        return self._cast(self.noise.draw(func, args, kwargs, **placing))

    @contextmanager
    def promoting(self) -> Iterator[None]:
        """The mode itself, and one above it which widens before torch compares the types of its arguments."""
        with _Promoting(self), self:
            yield

    def precise(self, args: Any, kwargs: Any) -> Any:
        """The arguments with wide tensors in place of others, and casts to a lower precision left out."""
        if not self.wider:
            return args, kwargs
        flat = leaves((args, kwargs))
        chosen = [self.wide(leaf) for leaf in flat]
        if all(new is old for new, old in zip(chosen, flat, strict=True)):
            return args, kwargs
        return filled((args, kwargs), iter(chosen))

    def wide(self, leaf: Any) -> Any:
        """A tensor's copy in the run's precision, always the same one, as the code may write to it; a type's like."""
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
        """The operation; what it makes in a lower precision, because nothing says which, is widened."""
        result = execute(func, args, kwargs)
        if not self.wider:
            return result
        flat = leaves(result)
        if not any(isinstance(leaf, Tensor) and leaf.dtype in self.wider for leaf in flat):
            return result
        if torch.Tag.pointwise in func.tags:  # whole numbers divided, say: as precise as the rest of the run
            numbers = leaves((args, kwargs))
            precise = (number.to(self.precision) if isinstance(number, Tensor) else number for number in numbers)
            args, kwargs = filled((args, kwargs), precise)
            return func(*args, **kwargs)
        return self._cast(result)

    def _cast(self, result: Any) -> Any:
        flat = leaves(result)
        low = [isinstance(leaf, Tensor) and leaf.dtype in self.wider for leaf in flat]
        wide = (leaf.to(self.wider[leaf.dtype]) if each else leaf for leaf, each in zip(flat, low, strict=True))
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
    """The operation; in float64 also where torch has it in lower precision only."""
    if func._opname == "_grouped_mm" and args[0].dtype == torch.float64:
        rows, stack, ends = args[:3]
        parts = rows.tensor_split(ends[:-1].cpu().long())
        return torch.cat([part @ each for part, each in zip(parts, stack, strict=True)])
    return func(*args, **kwargs)
