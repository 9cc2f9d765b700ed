"""Widths that the user gives by name, as steps of units; and the widths of a selection by name.

A width is a number of channels of a group, as `inspect` lists it. The name of any member names the whole group.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from torchslim.core.layer_patterns import check_patterns, class_names, matches, parameter_paths
from torchslim.core.parts import WHOLE, patterns_inside
from torchslim.core.reason import Reason
from torchslim.errors import PruneError, SelectError
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.dependency.groups import Member, Unit
from torchslim.prune.structured.selection import Amount, losses

Widths = Mapping[str, int]

MEMBER = re.compile(r"(?P<weight>.+)\[(?P<dim>\d{1,3})\]")
"""The name of one dimension of a weight, such as `conv1.weight[0]`."""


@dataclass(frozen=True, slots=True)
class _Named:
    """The width that a pattern gives to a group."""

    pattern: str
    width: int


def weight_pattern(pattern: str) -> str:
    """The pattern without the dimension at its end."""
    member = MEMBER.fullmatch(pattern)
    return member["weight"] if member else pattern


def widths_inside(model: nn.Module, path: str, widths: Widths) -> dict[str, int]:
    """The widths whose patterns match layers of a part, by the names inside of it."""
    if path == WHOLE:
        return dict(widths)
    inner: dict[str, int] = {}
    for pattern, width in widths.items():
        weight = weight_pattern(pattern)
        for name in patterns_inside(model, path, [weight])[weight]:
            inner[f"{name}{pattern.removeprefix(weight)}"] = width
    return inner


def widths_of(coupling: Coupling, kept: Sequence[int]) -> dict[str, int]:
    """The widths of all groups that may shrink, by group name, if the units keep `kept` steps; inverse of `steps`."""
    return {
        coupling.groups[number].name: len(coupling.groups[number].classes) - (unit.width - left) * loss
        for unit, left in zip(coupling.units, kept, strict=True)
        for number, loss in losses(unit, coupling).items()
    }


def steps(model: nn.Module, coupling: Coupling, amount: Amount, share: float = 1.0) -> list[int]:
    """How many steps each unit keeps so that the named groups have the widths of the amount; others keep all.

    Args:
        model: the model that was analyzed.
        coupling: its groups.
        amount: its `widths` are by the name of a layer, of a weight, or of a member as `conv1.weight[0]`; globs are
            allowed, and for each member the last pattern counts. The name of a layer means its outputs.
        share: the fraction of the way to these widths.

    Raises:
        SelectError: a name matches nothing.
        PruneError: a group cannot have its width, or two names give one group different widths.
    """
    assert amount.widths is not None
    named = _by_group(model, coupling, amount.widths)
    kept = []
    for unit in coupling.units:
        wanted = {
            steps: name
            for number, loss in losses(unit, coupling).items()
            if (name := named.get(number)) is not None
            for steps in [_steps_for(unit, coupling, number, loss, name, amount)]
        }
        if len(wanted) > 1:
            raise PruneError(_conflict([*wanted.values()], coupling.groups[unit.groups[0]].name))
        target = next(iter(wanted), unit.width)
        kept.append(unit.width - round((unit.width - target) * share))
    return kept


def _by_group(model: nn.Module, coupling: Coupling, widths: Widths) -> dict[int, _Named]:
    """The width of each named group that may shrink."""
    types, aliases = class_names(model), parameter_paths(model)
    members = [(number, member) for number, group in enumerate(coupling.groups) for member in group.members]
    moving = {number for unit in coupling.units for number in unit.groups}
    by_member: dict[tuple[int, str, int], _Named] = {}
    for pattern, width in widths.items():
        matching = [
            (number, member)
            for number, member in members
            if any(_covers(pattern, path, member.dim, types) for path in aliases.get(member.weight, [member.weight]))
        ]
        if (
            MEMBER.fullmatch(pattern) is None
        ):  # a layer: the channels that it makes, or else those that it is applied to
            matching = [item for item in matching if _makes(item[1], coupling)] or matching
        if not matching:
            raise _unmatched(pattern, model, coupling)
        free = [item for item in matching if item[0] in moving]
        if not free and any(len(coupling.groups[number].classes) != width for number, _ in matching):
            group = coupling.groups[matching[0][0]]
            raise PruneError(
                f"widths gives {width} to {pattern!r}, but its {len(group.classes)} channels stay: {group.reason}"
            )
        for number, member in free:
            by_member[number, member.weight, member.dim] = _Named(pattern, width)
    named: dict[int, _Named] = {}
    for (number, _, _), name in by_member.items():
        if named.setdefault(number, name).width != name.width:
            raise PruneError(_conflict([named[number], name], coupling.groups[number].name))
    return named


def _covers(pattern: str, path: str, dim: int, types: Mapping[str, Sequence[str]]) -> bool:
    member = MEMBER.fullmatch(pattern)
    if member is None:
        return matches(pattern, path, types)
    return dim == int(member["dim"]) and matches(member["weight"], path, types)


def _makes(member: Member, coupling: Coupling) -> bool:
    """Whether a member holds the outputs of a layer, such as the rows of a linear layer's weight."""
    trace = coupling.trace
    several = len(trace.weights[member.weight].shape) > 1
    return several and trace.roles.get((member.weight, member.dim)) == "out"


def _steps_for(unit: Unit, coupling: Coupling, number: int, loss: int, name: _Named, amount: Amount) -> int:
    """The steps that a unit keeps so that one of its groups has the given width.

    Raises:
        PruneError: the group cannot have it.
    """
    group = coupling.groups[number]
    width = len(group.classes)
    subject = f"widths gives {name.width} channels to {name.pattern!r}, the group {group.name} of {width}"
    if not 1 <= name.width <= width:
        raise PruneError(f"{subject}; give 1 to {width}")
    removed, rest = divmod(width - name.width, loss)
    narrowest = width - (unit.width - 1) * loss
    if rest or removed >= unit.width:
        raise PruneError(
            f"{subject}; it loses {loss} channels at once: give {narrowest}, {narrowest + loss} ... {width}"
        )
    if removed and name.width % amount.round_to:
        raise PruneError(f"{subject}; it is no multiple of round_to={amount.round_to}: give one, or round_to=1")
    if removed and name.width < amount.min_channels:
        raise PruneError(f"{subject}; min_channels={amount.min_channels} must stay: give more, or a lower min_channels")
    return unit.width - removed


def _conflict(names: Sequence[_Named], group: str) -> str:
    first, second = names[:2]
    return (
        f"widths gives {first.width} to {first.pattern!r} and {second.width} to {second.pattern!r}, which shrink "
        f"together (group {group}); name one of them"
    )


def _unmatched(pattern: str, model: nn.Module, coupling: Coupling) -> SelectError:
    """The error for a pattern without members: nothing has this name, or it has no channels."""
    check_patterns(model, [weight_pattern(pattern)], None)  # raises for names that do not exist, with near ones
    names = [
        f"{member.weight}[{member.dim}]"
        for group in coupling.groups
        if not Reason.KERNEL_EXTENT.given_in(group.reason)
        for member in group.members
    ]
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:5]
    return SelectError(f"widths names {pattern!r}, which has no channels; near names: {', '.join(near)}")
