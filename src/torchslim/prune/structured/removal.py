"""Physical removal of whole channels, neurons and heads: shrink, verify, record, and warn.

`shrink` removes the channels that a selection chooses and verifies the result. If the verification fails, the channels
at fault stay, and it tries again. `finish` records the removal with the module; the other functions warn the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from torchslim.core.isolation import trim
from torchslim.core.reason import Reason
from torchslim.errors import PruneError
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.structured.other_forwards import with_other_forwards
from torchslim.prune.structured.plan import Plan, shapes_of
from torchslim.prune.structured.proof import ROLLBACKS, Proof, give_up, prove
from torchslim.prune.structured.record import attach
from torchslim.prune.structured.selection import NEAR, Amount, Scores, Selection, is_bound, select, step_size
from torchslim.prune.structured.surgery import Surgery, perform
from torchslim.prune.structured.widths import steps

SHOWN = 6
"""How many reasons a refusal lists."""

SHOWN_GROUPS = 4
"""How many groups of uneven width a warning lists."""

ASKED = (Reason.EXCLUDED, Reason.NOT_INCLUDED)
"""Reasons that the caller gave; a refusal lists them last."""

EVERYWHERE = (Reason.OUTPUT, Reason.KERNEL_EXTENT, Reason.FIXED_SIZE)
"""Reasons that hold in every model; a refusal lists them only if there are no others."""


Choose = Callable[[Selection], list[int]]
"""Returns how many steps each unit of a selection keeps."""


@dataclass(frozen=True)
class Shrunk:
    """A verified removal."""

    model: nn.Module
    surgery: Surgery
    coupling: Coupling
    removed: Mask
    error: float  # the largest relative difference of any value, in the precision of the check
    change: float  # of the outputs against the unpruned model's
    left: float  # the fraction of the model that is left, in the amount's measure
    rollbacks: tuple[str, ...]  # the objections to removals that were tried before
    imprecise: str = ""  # why the check ran in another precision than float64


class TooLittle(PruneError):
    """The sparsity is so low that no channel goes."""


class Stuck(PruneError):
    """No channel can go, whatever the sparsity."""


def shrink(plan: Plan, amount: Amount, scores: Scores, choose: Choose | None = None) -> Shrunk:
    """Remove the least important channels and verify the result; channels that cannot be verified stay.

    Args:
        plan: of the model, which is not modified. The plan remembers removals that failed.
        amount: how much to remove, and in what steps.
        scores: of the classes of a group.
        choose: returns how many steps of each unit stay; None: the amount decides.

    Raises:
        PruneError: no channel can go, or a named group cannot have its width.
        SelectError: a name among the amount's widths matches no layer.
    """
    choose = choose or chooser(plan, amount)
    rollbacks: list[str] = []
    for _ in range(ROLLBACKS):
        coupling = plan.coupling()
        if not coupling.units:
            break
        selection = select(coupling, amount, plan.names, scores, narrowest=plan.narrowest)
        kept = choose(selection)
        removed = selection.removed(kept)
        trim()
        if not removed.any():
            raise _nothing_removed(plan, amount, rollbacks)
        proof = prove(plan, coupling, removed)
        if proof.right:
            surgery = with_other_forwards(plan.model, coupling, removed, plan.inputs, proof.surgery)
            return Shrunk(
                model=perform(plan.model, surgery),  # a new copy: the verified one has run and may have changed
                surgery=surgery,
                coupling=coupling,
                removed=removed,
                error=proof.error,
                change=proof.change,
                left=selection.left(kept),
                rollbacks=tuple(rollbacks),
                imprecise=plan.imprecise,
            )
        rollbacks.append(proof.objection)
        if not _roll_back(plan, proof, coupling, removed, kept):
            break
    raise Stuck(f"no channel of {type(plan.model).__name__} can go: {refusal(plan, rollbacks)}")


def chooser(plan: Plan, amount: Amount, share: float = 1.0) -> Choose:
    """The function that chooses the steps of an amount; with widths, `share` of the way to them."""
    if amount.widths is None:
        return Selection.choose

    def named(selection: Selection) -> list[int]:
        return steps(plan.model, selection.coupling, amount, share)

    return named


def _nothing_removed(plan: Plan, amount: Amount, rollbacks: Sequence[str]) -> PruneError:
    """The exception for a selection that removes no channel, at once or after rollbacks."""
    if rollbacks:
        return Stuck(
            f"no channel of {type(plan.model).__name__} can go that passes the check: "
            f"{'; '.join(dict.fromkeys(rollbacks))}"
        )
    if amount.widths is not None:
        return TooLittle(f"widths={dict(amount.widths)} removes no channel: the model has these widths already")
    return TooLittle(
        f"a sparsity of {amount.sparsity} of {amount.of} removes no channel; the smallest step is "
        f"{amount.round_to} channels: ask for more, or give a smaller round_to"
    )


def _roll_back(plan: Plan, proof: Proof, coupling: Coupling, removed: Mask, kept: Sequence[int]) -> bool:
    """Rule out a removal that failed its proof, so that the next one differs; False if the proof shows no fault."""
    if plan.narrowest == 1 and any(steps == 1 < unit.width for unit, steps in zip(coupling.units, kept, strict=True)):
        plan.narrowest = 2  # a value of size 1 often takes another path through views and products
        return True
    return give_up(plan, proof, coupling, removed)


def refusal(plan: Plan, rollbacks: Sequence[str]) -> str:
    """The reasons why no channel can go, as text: the reason that keeps the most parameters first."""
    sizes = _sizes_by_reason(plan.coupling())
    specific = {
        reason: size for reason, size in sizes.items() if not any(general.given_in(reason) for general in EVERYWHERE)
    }
    sizes = specific or sizes
    unlisted = [
        rollback
        for rollback in dict.fromkeys(rollbacks)
        # without the module's path
        if not any((rollback.partition(": ")[2] or rollback) in reason for reason in sizes)
    ]
    reasons = [*unlisted, *sorted(sizes, key=lambda reason: (reason in ASKED, -sizes[reason]))]
    if not reasons:
        return "it has no groups"
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    if plan.unseen == "keep" and any(Reason.NOT_REACHED.given_in(reason) for reason in reasons):
        more += "".join(f"; {note}, or unseen='prune'" for note in plan.notes())
    return "; ".join(reasons[:SHOWN]) + more


def _sizes_by_reason(coupling: Coupling) -> dict[str, int]:
    """Parameters of the weights of the largest group that stays for each reason."""
    sizes: dict[str, int] = {}
    for group in coupling.groups:
        if group.reason:
            size = sum(int(np.prod(coupling.trace.weights[member.weight].shape)) for member in group.members)
            sizes[group.reason] = max(sizes.get(group.reason, 0), size)
    return sizes


def finish(plan: Plan, removal: Shrunk, amount: Amount, criterion: str) -> None:
    """Attach the record of a removal to the shrunk module."""
    attach(removal.model, plan.model, removal.surgery, _about(plan, removal, amount, criterion))


def finish_part(whole: nn.Module, path: str, plan: Plan, removal: Shrunk, amount: Amount, criterion: str) -> nn.Module:
    """The whole model after the removal from a part at `path`, with its record.

    The surgery runs on the whole model, so that weights that the part shares with the rest stay shared.
    """
    if not path:
        finish(plan, removal, amount, criterion)
        return removal.model
    surgery = removal.surgery.under(path)
    shrunk: nn.Module = perform(whole, surgery)
    attach(shrunk, whole, surgery, {**_about(plan, removal, amount, criterion), "part": path})
    return shrunk


def _about(plan: Plan, removal: Shrunk, amount: Amount, criterion: str) -> dict[str, Any]:
    """The entry "about" of a record: the verification, the request, sizes before and after, and groups that stayed."""
    coupling = removal.coupling
    masks = (np.zeros_like(removal.removed), removal.removed)
    return {
        "verified": True,
        "precision": str(plan.precision).removeprefix("torch."),
        "sizes": [shapes_of(plan.inputs), *([shapes_of(plan.elsewhere[0])] if plan.elsewhere else [])],
        "largest_error": removal.error,
        "output_change": removal.change,
        "criterion": criterion,
        **asdict(amount if amount.widths is None else replace(amount, sparsity=1 - removal.left)),
        "left": removal.left,
        "uneven": uneven(removal, amount),
        "parameters": [coupling.parameters(mask, plan.names) for mask in masks],
        "macs": [coupling.macs(mask) for mask in masks],
        "rolled_back": list(removal.rollbacks),
        "unruled": dict(plan.trace.unruled),
        "unreached": [*plan.trace.unseen.weights, *plan.trace.unseen.methods],
        "stayed": {group.name: group.reason for group in coupling.groups if group.reason},
    }


def tolerance(plan: Plan, coupling: Coupling, amount: Amount) -> float:
    """How far the fraction removed may be from its target because widths are whole steps; at least `NEAR`.

    This is the largest fraction of the model that one step of one unit removes. With the scope "layer", where all units
    shrink together, it is the fraction that one step of every unit removes.
    """
    order = [[cell.classes for cell in unit.cells] for unit in coupling.units]  # the size depends on no order
    selection = Selection(coupling, amount, plan.names, order, [])
    full = [unit.width for unit in coupling.units]
    narrowed = [max(unit.width - step_size(unit, coupling, amount), 1) for unit in coupling.units]
    if amount.scope == "layer":
        return max(NEAR, 1 - selection.left(narrowed))
    removed = [1 - selection.left([*full[:place], width, *full[place + 1 :]]) for place, width in enumerate(narrowed)]
    return max([NEAR, *removed])


def uneven(removal: Shrunk, amount: Amount) -> dict[str, list[int]]:
    """Width before and after of the groups that are no multiple of `round_to`, because their parts must stay equal."""
    widths = {}
    for unit in filter(is_bound, removal.coupling.units):
        for group in (removal.coupling.groups[number] for number in unit.groups):
            before, after = len(group.classes), int((~removal.removed[group.classes]).sum())
            if after < before and before >= amount.round_to and after % amount.round_to:
                widths[group.name] = [before, after]
    return widths


def gave_way(removal: Shrunk, amount: Amount) -> list[str]:
    """A warning if some widths are no multiples of `round_to`."""
    widths = uneven(removal, amount)
    if not widths:
        return []
    few = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in list(widths.items())[:SHOWN_GROUPS])
    rest = f" and {len(widths) - SHOWN_GROUPS} more" if len(widths) > SHOWN_GROUPS else ""
    return [
        f"round_to={amount.round_to} gave way in {len(widths)} groups whose parts must stay equal, as those of a group "
        f"norm: {few}{rest}"
    ]


def vacuous(removal: Shrunk) -> list[str]:
    """Warnings of a check that was less precise than float64, or whose outputs the removal does not change."""
    imprecise = [removal.imprecise] if removal.imprecise else []
    if removal.change > 0:
        return imprecise
    return [
        *imprecise,
        "what was removed changes no output of the model on these inputs: the channels are dead, or nothing reads "
        "them; the check compared every value, but shows nothing of the outputs",
    ]


def missed_target(left: float, amount: Amount, tolerated: float) -> list[str]:
    """A warning if the fraction left is further from its target than tolerated; widths are never missed."""
    if amount.widths is not None or abs(left - 1 + amount.sparsity) <= tolerated + 1e-9:
        return []
    return [
        f"a sparsity of {amount.sparsity:.2f} of {amount.of} cannot be reached with round_to={amount.round_to} and "
        f"min_channels={amount.min_channels}: {1 - left:.2f} is the nearest; ts.surgery(model) says what stayed"
    ]
