"""List the coupled channel groups of a model, what each would save, and why some must stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from torchslim.core.arguments import checks_arguments
from torchslim.core.layer_patterns import Patterns
from torchslim.core.reason import Reason
from torchslim.core.step import Inputs
from torchslim.core.usable import usable
from torchslim.errors import PruneError
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.dependency.groups import Group
from torchslim.prune.dependency.resolve import Heads
from torchslim.prune.structured.plan import UnseenCode, analyze
from torchslim.prune.structured.proof import settle

SHOWN = 4
"""How many members of a group a table shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGroup:
    """Channels, neurons or heads' dimensions that are alike, and all the slices of weights that go with each.

    Args:
        members: the dimensions of weights that lose slices, as "conv1.weight[0]".
        width: how many channels there are.
        parameters: how many parameters would go with all of them, everything else kept. A weight between two groups
            counts for both, so these do not add up to the model's.
        macs: likewise, multiply-accumulates of one run on the example inputs.
        unit: groups with the same number lose channels in step; None where it must stay.
        reason: why it must stay; empty when it may go.
        extent: it is no channels at all: a kernel's extent, or the positions of a table.
    """

    members: tuple[str, ...]
    width: int
    parameters: int
    macs: int
    unit: int | None = None
    reason: str = ""
    extent: bool = False

    @property
    def prunable(self) -> bool:
        """May it lose channels?"""
        return self.unit is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """All groups of a model, in the order of its weights."""

    groups: tuple[ChannelGroup, ...]
    parameters: int  # of the whole model
    macs: int
    unruled: dict[str, int]  # operations whose channels nobody knows, and how often they ran; what meets them stays
    training: str = ""  # why the training mode was not looked at, where that was needed
    unreached: tuple[str, ...] = ()  # weights and methods that no example reached

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, numbers and text."""
        groups = [
            {**asdict(group), "members": list(group.members), "prunable": group.prunable} for group in self.groups
        ]
        return {**asdict(self), "groups": groups}

    def table(self, *, all: bool = False) -> str:
        """As text; with `all` also kernel extents and position tables, and every member of every group."""
        lines = [f"{self.parameters:,} parameters, {self.macs:,} MACs a run; what goes with all channels of a group:"]
        for title, chosen in (
            ("may go", [group for group in self.groups if group.prunable]),
            ("stay", [group for group in self.groups if not group.prunable and (all or not group.extent)]),
        ):
            lines += ["", f"{title}: {len(chosen)} group{'' if len(chosen) == 1 else 's'}"]
            if chosen:
                lines.append(f"  {'channels':>8}  {'parameters':>13}  {'MACs':>17}  members")
            for each in chosen:
                shown = each.members if all else each.members[:SHOWN]
                rest = len(each.members) - len(shown)
                members = ", ".join(shown) + (f" and {rest} more" if rest else "")
                lines.append(f"  {each.width:>8,}  {each.parameters:>13,}  {each.macs:>17,}  {members}")
                others = [other.members[0] for other in chosen if other is not each and other.unit == each.unit]
                if each.prunable and others:
                    lines.append(f"{'':46}in step with {', '.join(others)}")
                if each.reason:
                    lines.append(f"{'':46}{each.reason}")
        hidden = sum(group.extent and not group.prunable for group in self.groups)
        if hidden and not all:
            lines += ["", f"not shown: {hidden} kernel extents and position tables"]
        if self.unruled:
            lines += ["", f"operations that nobody knows the channels of: {', '.join(sorted(self.unruled))}"]
        if self.unreached:
            lines += ["", f"no example reached: {', '.join(self.unreached)}"]
        if self.training:
            lines += ["", self.training]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


@checks_arguments(PruneError)
def inspect(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    heads: Heads = "auto",
    include: Patterns = None,
    exclude: Patterns = None,
    examples: Sequence[Any] = (),
    unseen: UnseenCode = "keep",
) -> Inspection:
    """Which channels of a model go together, which `channels` may remove, and why others must stay.

    Found from one run, and then by removing a few channels of every group in copies: a group that may go has lost some
    and was verified, one that could not be verified stays, and the reason says so.

    >>> import torch
    >>> found = inspect(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.ones(1, 4),))
    >>> group = next(group for group in found.groups if group.prunable)
    >>> group.members
    ('0.weight[0]', '0.bias[0]', '2.weight[1]')
    >>> group.width, group.parameters, group.macs
    (8, 56, 48)

    Args:
        model: any module that runs on `example_inputs`; it is left as it is.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        heads: as for `channels`.
        include: as for `channels`.
        exclude: as for `channels`.
        examples: as for `channels`.
        unseen: as for `channels`.

    Raises:
        PruneError: an argument is out of its range.
    """
    model = usable(model, PruneError)
    plan = analyze(
        model, example_inputs, heads=heads, include=include, exclude=exclude, examples=examples, unseen=unseen
    )
    coupling = settle(plan)
    parameters = set(plan.names)
    nothing = np.zeros(coupling.atoms.count, dtype=bool)
    macs = coupling.macs(nothing)
    unit_of = {number: place for place, unit in enumerate(coupling.units) for number in unit.groups}
    groups = []
    for number, group in enumerate(coupling.groups):
        removed = nothing.copy()
        removed[group.classes] = True
        names = sorted({member.weight for member in group.members} & parameters)
        groups.append(
            ChannelGroup(
                members=tuple(f"{member.weight}[{member.dim}]" for member in group.members),
                width=len(group.classes),
                parameters=coupling.parameters(nothing, names) - coupling.parameters(removed, names),
                macs=macs - coupling.macs(removed),
                unit=unit_of.get(number),
                reason=group.reason,
                extent=bool(group.reason) and _is_extent(group, coupling),
            )
        )
    return Inspection(
        groups=tuple(groups),
        parameters=coupling.parameters(nothing, plan.names),
        macs=macs,
        unruled=dict(plan.trace.unruled),
        training=plan.trace.training,
        unreached=(*plan.trace.unseen.weights, *plan.trace.unseen.methods),
    )


def _is_extent(group: Group, coupling: Coupling) -> bool:
    """One dimension of one weight that no operation takes for channels and no data looks up, or of whole numbers."""
    if len(group.members) > 1 or Reason.LOOKED_UP.given_in(group.reason):
        return False
    (member,) = group.members
    value = coupling.trace.weights[member.weight]
    several = sum(size > 1 for size in value.shape) > 1
    return not value.floating or (several and (member.weight, member.dim) not in coupling.trace.roles)
