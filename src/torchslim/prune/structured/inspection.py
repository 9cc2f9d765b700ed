"""List the coupled channel groups and the residual blocks of a model, their savings, and why some must stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from torchslim.prune.depth.plan import DepthPlan, analyze_depth
from torchslim.prune.structured.plan import UnseenCode, analyze
from torchslim.prune.structured.proof import settle

SHOWN = 4
"""How many members of a group a table shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGroup:
    """Channels, neurons or heads' dimensions that are alike, with all weight slices that go with a channel.

    Args:
        members: the dimensions of weights that lose slices, as "conv1.weight[0]".
        width: number of channels.
        parameters: number of parameters that would go with all channels, everything else kept. A weight between two
            groups counts for both, so the groups do not add up to the model.
        macs: likewise, multiply-accumulates of one run on the example inputs.
        unit: groups with the same number lose channels in step; None if the group must stay.
        reason: why the group must stay; empty if it may go.
        extent: True for a kernel's extent or the positions of a table, which are no channels.
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
        """Whether the group may lose channels."""
        return self.unit is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualBlock:
    """A branch that is added to the value that it starts from, or a module around several of them.

    Args:
        name: path of the module that the block belongs to; `ts.prune.blocks(..., blocks=[name])` removes it.
        modules: paths of the modules that go with it.
        parameters: number of parameters that go with it.
        macs: multiply-accumulates of one run on the example inputs that go with it.
        reason: why the block must stay; empty if it may go.
    """

    name: str
    modules: tuple[str, ...]
    parameters: int
    macs: int
    reason: str = ""

    @property
    def prunable(self) -> bool:
        """Whether the block may go."""
        return not self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """All groups and blocks of a model, in the order of its weights."""

    groups: tuple[ChannelGroup, ...]
    parameters: int  # of the whole model
    macs: int
    unruled: dict[str, int]  # operations without a rule, and how often they ran; channels that reach them stay
    training: str = ""  # why the training mode was not analyzed, where that was needed
    unreached: tuple[str, ...] = ()  # weights and methods that no example reached
    blocks: tuple[ResidualBlock, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain lists, numbers and text."""
        groups = [
            {**asdict(group), "members": list(group.members), "prunable": group.prunable} for group in self.groups
        ]
        blocks = [
            {**asdict(block), "modules": list(block.modules), "prunable": block.prunable} for block in self.blocks
        ]
        return {**asdict(self), "groups": groups, "blocks": blocks}

    def table(self, *, all: bool = False) -> str:
        """The inspection as text; with `all` also kernel extents, position tables and every member of every group."""
        lines = [f"{self.parameters:,} parameters, {self.macs:,} MACs a run; what goes with all channels of a group:"]
        for title, groups in (
            ("may go", [group for group in self.groups if group.prunable]),
            ("stay", [group for group in self.groups if not group.prunable and (all or not group.extent)]),
        ):
            lines += ["", f"{title}: {len(groups)} group{'' if len(groups) == 1 else 's'}"]
            if groups:
                lines.append(f"  {'channels':>8}  {'parameters':>13}  {'MACs':>17}  members")
            for row in groups:
                shown = row.members if all else row.members[:SHOWN]
                rest = len(row.members) - len(shown)
                members = ", ".join(shown) + (f" and {rest} more" if rest else "")
                lines.append(f"  {row.width:>8,}  {row.parameters:>13,}  {row.macs:>17,}  {members}")
                others = [other.members[0] for other in groups if other is not row and other.unit == row.unit]
                if row.prunable and others:
                    lines.append(f"{'':46}in step with {', '.join(others)}")
                if row.reason:
                    lines.append(f"{'':46}{row.reason}")
        lines += self._table_of_blocks()
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

    def _table_of_blocks(self) -> list[str]:
        """Lines that list the residual blocks; none if the model has none."""
        if not self.blocks:
            return []
        free = sum(block.prunable for block in self.blocks)
        lines = ["", f"residual blocks: {free} may go, {len(self.blocks) - free} stay"]
        lines.append(f"  {'':>8}  {'parameters':>13}  {'MACs':>17}  block")
        for block in self.blocks:
            lines.append(f"  {'':>8}  {block.parameters:>13,}  {block.macs:>17,}  {block.name}")
            if block.reason:
                lines.append(f"{'':46}{block.reason}")
        return lines

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
    """List the coupled channel groups of `model` and its residual blocks, and why some of them must stay.

    One run of the model finds the groups that `channels` may remove; then copies lose a few channels of every group. A
    group that may go has passed the verification of such a removal; a group that could not be verified stays, with the
    reason. Likewise each block that `blocks` may remove has been removed from a copy, and verified.

    >>> import torch
    >>> found = inspect(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.ones(1, 4),))
    >>> group = next(group for group in found.groups if group.prunable)
    >>> group.members
    ('0.weight[0]', '0.bias[0]', '2.weight[1]')
    >>> group.width, group.parameters, group.macs
    (8, 56, 48)

    Args:
        model: any module that runs on `example_inputs`; it is not modified.
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
    nothing = np.zeros(coupling.atoms.count, dtype=bool)
    return Inspection(
        groups=tuple(_channel_groups(coupling, frozenset(plan.names))),
        parameters=coupling.parameters(nothing, plan.names),
        macs=coupling.macs(nothing),
        unruled=dict(plan.trace.unruled),
        training=plan.trace.training,
        unreached=(*plan.trace.unseen.weights, *plan.trace.unseen.methods),
        blocks=tuple(_residual_blocks(analyze_depth(model, example_inputs, exclude=exclude, examples=examples))),
    )


def _residual_blocks(plan: DepthPlan) -> Iterator[ResidualBlock]:
    """All blocks of a plan, each verified alone."""
    for name in plan.blocks:
        reason = plan.verify([], name)
        yield ResidualBlock(
            name=name,
            modules=tuple(sorted(plan.modules([name]))) if plan.blocks[name].ways else (),
            parameters=plan.size([name], "params") if plan.blocks[name].ways else 0,
            macs=plan.size([name], "macs") if plan.blocks[name].ways else 0,
            reason=reason,
        )


def _channel_groups(coupling: Coupling, parameters: frozenset[str]) -> Iterator[ChannelGroup]:
    """All groups of a coupling; `parameters` are the names of the weights that count as parameters."""
    nothing = np.zeros(coupling.atoms.count, dtype=bool)
    macs = coupling.macs(nothing)
    unit_of = {number: place for place, unit in enumerate(coupling.units) for number in unit.groups}
    for number, group in enumerate(coupling.groups):
        removed = nothing.copy()
        removed[group.classes] = True
        names = sorted({member.weight for member in group.members} & parameters)
        yield ChannelGroup(
            members=tuple(f"{member.weight}[{member.dim}]" for member in group.members),
            width=len(group.classes),
            parameters=coupling.parameters(nothing, names) - coupling.parameters(removed, names),
            macs=macs - coupling.macs(removed),
            unit=unit_of.get(number),
            reason=group.reason,
            extent=bool(group.reason) and _is_extent(group, coupling),
        )


def _is_extent(group: Group, coupling: Coupling) -> bool:
    """Whether the group is one dimension of one weight that no data looks up, of integers or not used as channels."""
    if len(group.members) > 1 or Reason.LOOKED_UP.given_in(group.reason):
        return False
    (member,) = group.members
    value = coupling.trace.weights[member.weight]
    several = sum(size > 1 for size in value.shape) > 1
    return not value.floating or (several and (member.weight, member.dim) not in coupling.trace.roles)
