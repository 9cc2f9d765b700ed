"""Penalties on the loss that shrink whole channels before they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchslim.core.distributed import whole
from torchslim.core.parts import under
from torchslim.errors import PruneError
from torchslim.prune.criteria.registry import slices
from torchslim.prune.dependency.coupling import Coupling
from torchslim.training.loop import Hook, Loop

Sparsify = Literal["group-lasso", "bn-l1"]
PENALTIES = {
    "group-lasso": "the norm of all weights of a channel",
    "bn-l1": "the magnitude of batch-norm scales",
}


@dataclass(frozen=True, slots=True)
class Slices:
    """One dimension of one parameter: the classes that its indices belong to, numbered over all groups."""

    weight: str
    dim: int
    indices: Tensor
    classes: Tensor


def slices_of(coupling: Coupling) -> tuple[list[Slices], int]:
    """Slices of the parameters in all groups that may shrink, and the number of classes."""
    parts: list[Slices] = []
    count = 0
    for number in sorted({number for unit in coupling.units for number in unit.groups}):
        group = coupling.groups[number]
        for member in group.members:
            if member.weight in coupling.trace.parameters:
                classes = torch.from_numpy(member.classes) + count
                parts.append(Slices(member.weight, member.dim, torch.from_numpy(member.indices), classes))
        count += len(group.classes)
    return parts, count


class _Penalty(Hook):
    """A weighted sum over classes; epochs before the last are not as sparse yet, so none is kept as the best."""

    def __init__(self, coupling: Coupling, strength: float, path: str = "") -> None:
        self.strength, self.path = strength, path
        self.slices, self.count = slices_of(coupling)
        self.parts: list[tuple[Tensor, Slices]] = []

    def on_start(self, loop: Loop) -> None:
        """Look up the parameters once, and move the indices to their devices."""
        parameters = dict(loop.model.named_parameters())
        self.parts = []
        for part in self.slices:
            weight = parameters[under(self.path, part.weight)]
            if weight.requires_grad:
                placed = Slices(part.weight, part.dim, part.indices.to(weight.device), part.classes.to(weight.device))
                self.parts.append((weight, placed))

    def settled(self, loop: Loop) -> bool:
        """Whether the training is over: only its last epoch has had all of the penalty."""
        return loop.progress >= 1


class GroupLasso(_Penalty):
    """The sum over channels of sqrt(n) times the Euclidean norm of the n weights that go with the channel.

    A weight whose row and column both go with the channel counts twice. Source: Wen et al. 2016, arXiv:1608.03665,
    section 3.1; the factor is that of Yuan & Lin 2006 (group lasso), section 2.
    """

    def on_start(self, loop: Loop) -> None:
        """Count the weights of every class."""
        super().on_start(loop)
        sizes = torch.zeros(self.count)
        for weight, part in self.parts:
            share = torch.full((len(part.classes),), weight.numel() / weight.shape[part.dim])
            sizes.index_add_(0, part.classes.cpu(), share)
        if self.parts:
            first = self.parts[0][0]  # sums of squares leave the range of halves
            self.roots = sizes.sqrt().to(first.device, torch.promote_types(first.dtype, torch.float32))

    def penalty(self, loop: Loop) -> Tensor | None:
        """The penalty, a scalar; None without parameters that train."""
        if not self.parts:
            return None
        squares = torch.zeros_like(self.roots)
        for weight, part in self.parts:
            sums = slices(whole(weight).square(), part.dim).sum(1)[part.indices].to(squares)
            squares = squares.index_add(0, part.classes.to(squares.device), sums)
        alive = squares > 0  # a norm has no gradient at zero: channels at zero stay there
        norms = torch.where(alive, squares, 1.0).sqrt() * alive
        return self.strength * (self.roots * norms).sum()


class ScaleL1(_Penalty):
    """The sum of |scale| over the batch norms of channels that may go.

    Source: Liu et al. 2017 (network slimming), arXiv:1708.06519, section 3, eq. 1.
    """

    def __init__(self, coupling: Coupling, strength: float, path: str = "") -> None:
        super().__init__(coupling, strength, path)
        self.slices = [part for part in self.slices if part.weight in coupling.trace.norm_scales]
        if not self.slices:
            raise PruneError("sparsify='bn-l1' finds no batch norm with removable channels; use 'group-lasso'")

    def penalty(self, loop: Loop) -> Tensor | None:
        """The penalty, a scalar; None without parameters that train."""
        if not self.parts:
            return None
        device = self.parts[0][0].device
        return (
            self.strength
            * torch.stack([whole(weight)[part.indices].abs().sum().to(device) for weight, part in self.parts]).sum()
        )


def make_penalty(kind: Sparsify, coupling: Coupling, strength: float, path: str = "") -> Hook:
    """The hook that adds the penalty `kind` to the loss; `path` is that of the part whose channels are coupled."""
    return GroupLasso(coupling, strength, path) if kind == "group-lasso" else ScaleL1(coupling, strength, path)
