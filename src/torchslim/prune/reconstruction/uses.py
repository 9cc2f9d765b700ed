"""Finds where a model multiplies with its weights, below autograd, so that no layer is known by its class.

A *use* is a matrix product or a convolution with elements of one parameter. Both are a linear regression: the rows are
samples and positions, the features are the inputs that meet one output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from torchslim.prune.dependency.leaves import leaves


@dataclass(frozen=True, slots=True)
class Convolution:
    """The settings of a convolution, one number per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    groups: int


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One operation with elements of a parameter.

    Args:
        weight: the parameter's first path.
        parameter: the parameter.
        view: the elements that are multiplied with; it shares the parameter's memory. (in, out) for a product, as the
            parameter for a convolution.
        given: (..., rows, in) for a product, (batch, in, ...) for a convolution.
        made: (..., rows, out), or (batch, out, ...).
        bias: path of the parameter that the operation adds, or None.
        convolution: None for a product.
    """

    weight: str
    parameter: Tensor
    view: Tensor
    given: Tensor
    made: Tensor
    bias: str | None
    convolution: Convolution | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for uses of the same elements in the same way."""
        return (
            self.weight,
            self.view.storage_offset(),
            tuple(self.view.shape),
            self.view.stride(),
            self.bias,
            self.convolution,
        )

    @property
    def rows(self) -> int:
        """Number of samples and positions."""
        channels = 1 if self.convolution else self.made.dim() - 1
        return self.made.numel() // max(self.made.shape[channels], 1)

    def matrix(self, values: Tensor) -> Tensor:
        """The elements of the use among `values`, which have the parameter's shape: (groups, features, outputs)."""
        like = torch.empty_like(self.parameter, dtype=values.dtype, device=values.device)
        assert like.stride() == self.parameter.stride()
        like.copy_(values)
        offset = self.view.storage_offset() - self.parameter.storage_offset()
        part = like.as_strided(self.view.shape, self.view.stride(), offset)
        if self.convolution is None:
            return part.unsqueeze(0)
        groups = self.convolution.groups
        if not self.convolution.transposed:
            return part.reshape(groups, part.shape[0] // groups, -1).transpose(1, 2)
        kernel = list(range(3, part.dim() + 1))
        split = part.reshape(groups, part.shape[0] // groups, *part.shape[1:]).flip(kernel)
        return split.movedim(2, -1).reshape(groups, -1, part.shape[1])

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Set the elements of the use, in place; the inverse of `matrix`."""
        matrix = matrix.to(self.view)
        if self.convolution is None:
            self.view.copy_(matrix[0])
        elif not self.convolution.transposed:
            self.view.copy_(matrix.transpose(1, 2).reshape(self.view.shape))
        else:
            outputs, *kernel = self.view.shape[1:]
            split = matrix.reshape(self.convolution.groups, -1, *kernel, outputs).movedim(-1, 2)
            self.view.copy_(split.flip(list(range(3, split.dim()))).reshape(self.view.shape))

    def features(self, rows: Tensor) -> Tensor:
        """The inputs of some rows, by their numbers: (rows, groups, features)."""
        if self.convolution is None:
            return self.given.reshape(-1, self.given.shape[-1])[rows].unsqueeze(1)
        patches = _patches(self.given, self.made, self.view, self.convolution)
        positions = torch.unravel_index(rows, patches.shape[: self.made.dim() - 1])
        return patches[positions].reshape(len(rows), self.convolution.groups, -1)

    def outputs(self, rows: Tensor) -> Tensor:
        """The outputs of some rows, by their numbers: (rows, outputs)."""
        channels = 1 if self.convolution else self.made.dim() - 1
        last = self.made.movedim(channels, -1)
        return last[torch.unravel_index(rows, last.shape[:-1])]


def _patches(given: Tensor, made: Tensor, kernel: Tensor, settings: Convolution) -> Tensor:
    """The inputs that meet each output: a view of shape (batch, *positions, in, *kernel)."""
    spatial = given.dim() - 2
    stride, sizes, padding = settings.stride, kernel.shape[2:], []
    reach = [dilation * (size - 1) for dilation, size in zip(settings.dilation, sizes, strict=True)]
    if settings.transposed:  # a convolution of stride 1 over the input with zeros between its elements
        spread = given.new_zeros(
            *given.shape[:2],
            *((size - 1) * step + 1 for size, step in zip(given.shape[2:], stride, strict=True)),
        )
        spread[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = given
        for axis in range(spatial):
            left = reach[axis] - settings.padding[axis]
            padding.append((left, made.shape[2 + axis] + reach[axis] - spread.shape[2 + axis] - left))
        given, stride = spread, (1,) * spatial
    else:
        padding = [(size, size) for size in settings.padding]
    given = functional.pad(given, [size for sides in reversed(padding) for size in sides])
    for axis in range(spatial):
        given = given.unfold(2 + axis, reach[axis] + 1, stride[axis])[..., :: settings.dilation[axis]]
    return given.movedim(1, 1 + spatial)


class Enough(BaseException):
    """Ends a forward pass after the last use that is needed; no exception of the model's own code."""


@dataclass
class Others:
    """Why parameters cannot be solved for: operations that read them in other ways; and where biases are added."""

    reasons: dict[str, str] = field(default_factory=dict)
    biases: dict[str, set[Any]] = field(default_factory=dict)


class Watch(TorchDispatchMode):
    """Calls `heard` for every use of a parameter while a model runs.

    Args:
        model: its parameters are watched.
        heard: called right after each use, before later operations may change its tensors in place.
        needed: number of uses by parameter; after these the pass ends with `Enough`. None: all of them.
        others: collects all other operations with parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        heard: Callable[[Use], None],
        needed: Mapping[str, int] | None = None,
        others: Others | None = None,
    ) -> None:
        super().__init__()
        self._heard, self._others = heard, others or Others()
        self._left = None if needed is None else Counter({name: count for name, count in needed.items() if count})
        self._owners: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if _stored(parameter):
                self._owners.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter.detach()))

    def _owner(self, tensor: Any) -> tuple[str, Tensor] | None:
        """The parameter whose memory a tensor shares."""
        if not isinstance(tensor, Tensor) or not _stored(tensor):
            return None
        for name, parameter in self._owners.get(tensor.untyped_storage().data_ptr(), ()):
            start = parameter.storage_offset()
            if start <= tensor.storage_offset() < start + parameter.numel():
                return name, parameter
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        owned = [owner for leaf in leaves((args, kwargs or {})) if (owner := self._owner(leaf)) is not None]
        if not owned:
            return result
        use = self._use(func, args, kwargs or {}, result)
        if use is None:
            if not any(self._owner(leaf) for leaf in leaves(result)):  # else it is a view, or an update in place
                self._others.reasons |= {name: f"{func._opname} reads it" for name, _ in owned}
            return result
        if use.bias is not None:
            self._others.biases.setdefault(use.bias, set()).add(use.key)
        self._heard(use)
        if self._left is not None and use.weight in self._left:
            self._left[use.weight] -= 1
            if not any(self._left.values()):
                raise Enough
        return result

    def _use(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Use | None:
        """The use that an operation is; None if it is none, or scales its operands."""
        name = func._opname
        if name == "convolution" and not kwargs:
            given, kernel, bias, stride, padding, dilation, transposed, _, groups = args
            owner = self._owner(kernel)
            whole = owner is not None and kernel.shape == owner[1].shape and kernel.stride() == owner[1].stride()
            if owner is None or not whole or self._owner(given) is not None:
                return None
            settings = Convolution(tuple(stride), tuple(padding), tuple(dilation), transposed, groups)
            return self._with_bias(*owner, kernel, given, result, bias, settings)
        if name == "addmm" and not kwargs:
            bias, left, right = args
        elif name in ("mm", "bmm") and not kwargs:
            bias, (left, right) = None, args
        else:
            return None
        owner = self._owner(right)
        if owner is None:  # weight @ inputs: the transpose of inputs @ weight
            left, right, result = right.mT, left.mT, result.mT
            owner = self._owner(right)
            if bias is not None:
                return None
        if owner is None or self._owner(left) is not None:
            return None
        if right.dim() == 3:  # one matrix for the whole batch
            if right.shape[0] > 1 and right.stride(0):
                return None
            right = right[0]
        return self._with_bias(*owner, right, left, result, bias, None)

    def _with_bias(
        self,
        weight: str,
        parameter: Tensor,
        view: Tensor,
        given: Tensor,
        made: Tensor,
        bias: Tensor | None,
        settings: Convolution | None,
    ) -> Use:
        owner = self._owner(bias)
        channels = made.shape[1 if settings else -1]
        # parts of a bias, as in fused projections, are not solved for
        name = owner[0] if owner is not None and owner[1].shape == (channels,) else None
        return Use(weight, parameter, view, given, made, name, settings)


def _stored(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own that views can share."""
    return tensor.layout is torch.strided and tensor.numel() > 0 and type(tensor) in (Tensor, nn.Parameter)
