"""Whole channels, neurons and heads physically removed: what goes, and the proof that it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from torchslim.core.isolation import trim
from torchslim.core.reason import Reason
from torchslim.errors import PruneError
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.structured.plan import Plan, shapes_of
from torchslim.prune.structured.proof import ROLLBACKS, give_up, prove
from torchslim.prune.structured.record import attach
from torchslim.prune.structured.selection import NEAR, Amount, Scores, Selection, is_bound, select, step_size
from torchslim.prune.structured.surgery import Surgery, perform

SHOWN = 6
"""How many reasons a refusal tells."""

ASKED = (Reason.EXCLUDED, Reason.NOT_INCLUDED)
"""Reasons that the caller gave; they come last."""

EVERYWHERE = (Reason.OUTPUT, Reason.KERNEL_EXTENT, Reason.FIXED_SIZE)
"""Reasons that hold in every model: they are listed where there are no others."""


Choose = Callable[[Selection], list[int]]


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
    rollbacks: tuple[str, ...]
    imprecise: str = ""  # why the check ran in another precision than float64


class TooLittle(PruneError):
    """A sparsity so low that no channel goes."""


class Stuck(PruneError):
    """No channel can go, whatever the sparsity."""


def shrink(plan: Plan, amount: Amount, scores: Scores, choose: Choose = Selection.choose) -> Shrunk:
    """Remove the least important channels, verify, and give up what cannot be verified.

    Args:
        choose: how many steps of each unit stay.

    Raises:
        PruneError: nothing can go.
    """
    rollbacks: list[str] = []
    for _ in range(ROLLBACKS):
        coupling = plan.coupling()
        if not coupling.units:
            break
        selection = select(coupling, amount, plan.names, scores, narrowest=plan.narrowest)
        kept = choose(selection)
        removed = selection.removed(kept)
        trim()
        if not removed.any() and rollbacks:
            raise Stuck(
                f"no channel of {type(plan.model).__name__} can go that passes the check: "
                f"{'; '.join(dict.fromkeys(rollbacks))}"
            )
        if not removed.any():
            raise TooLittle(
                f"a sparsity of {amount.sparsity} of {amount.of} removes no channel; the smallest step is "
                f"{amount.round_to} channels: ask for more, or give a smaller round_to"
            )
        proof = prove(plan, coupling, removed)
        if proof.right:
            # the module that was tried has run, and may have changed its state
            shrunk = perform(plan.model, proof.surgery)
            return Shrunk(
                shrunk,
                proof.surgery,
                coupling,
                removed,
                proof.error,
                proof.change,
                selection.left(kept),
                tuple(rollbacks),
                plan.imprecise,
            )
        rollbacks.append(proof.objection)
        if plan.narrowest == 1 and any(left == 1 < unit.width for unit, left in zip(coupling.units, kept, strict=True)):
            plan.narrowest = 2  # a value of size 1 often takes another path through views and products
        elif not give_up(plan, proof, coupling, removed):
            break
    raise Stuck(f"no channel of {type(plan.model).__name__} can go: {refusal(plan, rollbacks)}")


def refusal(plan: Plan, rollbacks: Sequence[str]) -> str:
    """Why nothing can go, the reason that holds the most parameters first."""
    coupling = plan.coupling()
    held: dict[str, int] = {}
    for group in coupling.groups:
        stake = sum(int(np.prod(coupling.trace.weights[member.weight].shape)) for member in group.members)
        held[group.reason] = max(held.get(group.reason, 0), stake)
    held.pop("", None)
    plain = {
        each: size for each, size in held.items() if not any(reason.given_in(each) for reason in EVERYWHERE)
    } or held
    unlisted = [
        fromkey for fromkey in dict.fromkeys(rollbacks) if not any(fromkey.partition(": ")[2] in why for why in plain)
    ]
    reasons = [*unlisted, *sorted(plain, key=lambda each: (each in ASKED, -plain[each]))]
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    if plan.unseen == "keep" and any(Reason.NOT_REACHED.given_in(each) for each in reasons):
        more += "".join(f"; {note}, or unseen='prune'" for note in plan.notes())
    return "; ".join(reasons[:SHOWN]) + more if reasons else "it has no groups"


def finish(plan: Plan, done: Shrunk, amount: Amount, criterion: str) -> None:
    """Record a removal with the module."""
    nothing = np.zeros_like(done.removed)
    coupling = done.coupling
    about = {
        "verified": True,
        "precision": str(plan.precision).removeprefix("torch."),
        "sizes": [shapes_of(plan.inputs), *([shapes_of(plan.elsewhere[0])] if plan.elsewhere else [])],
        "largest_error": done.error,
        "output_change": done.change,
        "criterion": criterion,
        **asdict(amount),
        "left": done.left,
        "uneven": uneven(done, amount),
        "parameters": [coupling.parameters(each, plan.names) for each in (nothing, done.removed)],
        "macs": [coupling.macs(each) for each in (nothing, done.removed)],
        "rolled_back": list(done.rollbacks),
        "unruled": dict(plan.trace.unruled),
        "unreached": [*plan.trace.unseen.weights, *plan.trace.unseen.methods],
        "stayed": {group.name: group.reason for group in coupling.groups if group.reason},
    }
    attach(done.model, plan.model, done.surgery, about)


def tolerance(plan: Plan, coupling: Coupling, amount: Amount) -> float:
    """How far from its target a removal may end for no other reason than that widths are whole steps.

    It is what one step of one unit takes from the model; of all units where each loses the same fraction.
    """
    selection = Selection(coupling, amount, plan.names, _any_order(coupling), [])
    whole = [unit.width for unit in coupling.units]
    less = [unit.width - step_size(unit, coupling, amount) for unit in coupling.units]
    if amount.scope == "layer":
        return max(NEAR, 1 - selection.left([max(each, 1) for each in less]))
    steps = [1 - selection.left([*whole[:place], max(each, 1), *whole[place + 1 :]]) for place, each in enumerate(less)]
    return max([NEAR, *steps])


def _any_order(coupling: Coupling) -> list[list[NDArray[np.int64]]]:
    return [[cell.classes for cell in unit.cells] for unit in coupling.units]


def uneven(done: Shrunk, amount: Amount) -> dict[str, list[int]]:
    """Groups whose width is no multiple of `round_to`, as their parts must stay equal: width before and after."""
    found = {}
    for unit in done.coupling.units:
        for number in unit.groups if is_bound(unit) else ():
            group = done.coupling.groups[number]
            left = int((~done.removed[group.classes]).sum())
            if left < len(group.classes) and len(group.classes) >= amount.round_to and left % amount.round_to:
                found[group.name] = [len(group.classes), left]
    return found


def gave_way(done: Shrunk, amount: Amount) -> list[str]:
    """What a user must know of widths that are no multiples of `round_to`."""
    found = uneven(done, amount)
    if not found:
        return []
    few = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in list(found.items())[:4])
    rest = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return [
        f"round_to={amount.round_to} gave way in {len(found)} groups whose parts must stay equal, as those of a group "
        f"norm: {few}{rest}"
    ]


def vacuous(done: Shrunk) -> list[str]:
    """What a user must know of a check that could not fail, or not as surely as in float64."""
    imprecise = [done.imprecise] if done.imprecise else []
    if done.change > 0:
        return imprecise
    return [
        *imprecise,
        "what was removed changes no output of the model on these inputs: the channels are dead, or nothing reads "
        "them; the check compared every value, but shows nothing of the outputs",
    ]


def missed_target(left: float, amount: Amount, tolerated: float) -> list[str]:
    """What a user must know: a target that could not be reached."""
    if abs(left - 1 + amount.sparsity) <= tolerated + 1e-9:
        return []
    return [
        f"a sparsity of {amount.sparsity:.2f} of {amount.of} cannot be reached with round_to={amount.round_to} and "
        f"min_channels={amount.min_channels}: {1 - left:.2f} is the nearest; ts.surgery(model) says what stayed"
    ]
