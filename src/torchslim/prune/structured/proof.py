"""The proof that a removal is right, at the size of the example inputs and at a second one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from torchslim.core.isolation import trim
from torchslim.core.reason import Reason
from torchslim.core.step import Inputs
from torchslim.prune.dependency import verification
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.precision import widened
from torchslim.prune.dependency.sizes import carried
from torchslim.prune.dependency.union_find import Ids
from torchslim.prune.dependency.verify_runs import Divergence
from torchslim.prune.structured.attributes import mend
from torchslim.prune.structured.plan import Plan, shapes_of
from torchslim.prune.structured.selection import Amount, select
from torchslim.prune.structured.surgery import Surgery, perform

WITHDRAWALS = 12
"""How many changed attributes of the modules at work are tried with their old value where values differ."""

ROLLBACKS = 60
"""How often a removal that could not be verified is made smaller before everything is given up."""

CLEAR = 1e-3
"""A change of the outputs that float32, which takes half the time, cannot have brought about by rounding."""


@dataclass(frozen=True)
class Proof:
    """A surgery, and what is wrong with it."""

    surgery: Surgery
    divergence: Divergence | None  # where the shrunk model first leaves the prediction
    elsewhere: tuple[tuple[Ids, str], ...] = ()  # atoms that cannot go at a second size, and why
    error: float = float("inf")  # the largest relative difference of any value
    change: float = 0.0  # of the outputs against the unpruned model's

    @property
    def right(self) -> bool:
        """Does the shrunk model compute what the masked original computes?"""
        return self.divergence is None and not self.elsewhere

    @property
    def objection(self) -> str:
        """What is wrong, in words."""
        if self.divergence is not None:
            return f"{self.divergence.path}: {self.divergence.what}".removeprefix(": ")
        return "; ".join(dict.fromkeys(why for _, why in self.elsewhere))


def prove(plan: Plan, coupling: Coupling, removed: Mask) -> Proof:
    """Find the surgery for a removal, and verify it at the size of the example inputs and at a second one."""
    surgery, diverged = mend(plan.model, coupling, removed, plan.inputs)
    if diverged is not None:
        return Proof(surgery, diverged)
    surgery, verdict, change = _checked(plan, coupling, removed, surgery)
    if verdict.divergence is not None:
        return Proof(surgery, verdict.divergence)
    elsewhere = _elsewhere(plan, coupling, removed, surgery)
    return Proof(surgery, None, elsewhere, verdict.error, change)


def settle(plan: Plan) -> Coupling:
    """The groups of which each can lose a channel, found by trial: what cannot has the reason.

    All units lose a few channels at once, and the shapes are looked at once more with only half of the units losing
    any, in as many ways as it takes to tell every two of them apart.
    """
    for _ in range(ROLLBACKS):
        coupling = plan.coupling()
        if not coupling.units or all(_stands(plan, coupling, trial) for trial in _trials(coupling, plan)):
            return coupling
    return plan.coupling()


def _trials(coupling: Coupling, plan: Plan) -> Iterator[tuple[Mask, bool]]:
    """Removals, and whether values are compared as well."""
    rng = np.random.default_rng(0)
    selection = select(
        coupling, Amount(round_to=1, min_channels=1), plan.names, lambda _, group: rng.random(len(group.classes))
    )
    widths = [unit.width for unit in coupling.units]
    some = [max(width - 1 - place % 3, (width + 1) // 2) for place, width in enumerate(widths)]
    yield selection.removed(some), True
    for bit in range(max(len(widths) - 1, 0).bit_length()):
        for side in (0, 1):
            kept = [width - 1 if place >> bit & 1 == side else width for place, width in enumerate(widths)]
            yield selection.removed(kept), False


def _stands(plan: Plan, coupling: Coupling, trial: tuple[Mask, bool]) -> bool:
    """Does a trial pass? If not, what cannot be verified is given up."""
    removed, values = trial
    proof = prove(plan, coupling, removed) if values else Proof(*mend(plan.model, coupling, removed, plan.inputs))
    if not proof.right and not give_up(plan, proof, coupling, removed):
        for unit in coupling.units:  # nobody knows which of them is to blame
            plan.stays.append((np.concatenate([cell.classes for cell in unit.cells]), proof.objection))
    return proof.right


def give_up(plan: Plan, proof: Proof, coupling: Coupling, removed: Mask) -> bool:
    """Leave in what a failed proof shows to be impossible; False where nothing can be told."""
    if proof.divergence is not None:
        return plan.retreat(proof.divergence, coupling, removed)
    units = [np.concatenate([cell.classes for cell in unit.cells]) for unit in coupling.units]
    found = False
    for atoms, why in proof.elsewhere:
        suspects = coupling.roots[atoms]
        for classes in units:
            if np.isin(classes, suspects).any():
                plan.stays.append((classes, why))
                found = True
    return found


def _elsewhere(plan: Plan, coupling: Coupling, removed: Mask, surgery: Surgery) -> tuple[tuple[Ids, str], ...]:
    """What of a removal is wrong at a second size, and why."""
    second = plan.second()
    if second is None:
        return ()
    inputs, trace = second
    at = f"at another size of the inputs ({shapes_of(inputs)})"
    there, mask, conflicts = carried(coupling, removed, trace)
    if conflicts:
        return tuple((atoms, f"{at} {why or 'its channels mix with positions'}") for atoms, why in conflicts)
    check = _Check(plan, there, mask, inputs)
    if (diverged := check.verify(surgery).divergence) is None:
        return ()
    operation = trace.operations[diverged.index]
    values = (*operation.outputs, *operation.inputs)
    losing = [classes[mask[classes]] for value in values for classes in there.classes(value.layers)]
    atoms = np.concatenate(losing) if losing else np.zeros(0, dtype=np.int64)
    return (
        (
            atoms[atoms < coupling.atoms.count],
            Reason.NOT_VERIFIED.with_detail(f"{at}: {diverged.what} ({diverged.path})", " "),
        ),
    )


def _checked(
    plan: Plan, coupling: Coupling, removed: Mask, surgery: Surgery
) -> tuple[Surgery, verification.Verdict, float]:
    """Verify; where values differ, attributes that only looked like sizes get their old values back."""
    check = _Check(plan, coupling, removed, plan.inputs)
    trim()
    kinds = {path: type(module) for path, module in plan.model.named_modules()}
    verdict = check.verify(surgery)
    if verdict.divergence is not None and check.narrowed():
        verdict = check.verify(surgery)
    trials = WITHDRAWALS
    while (diverged := verdict.divergence) is not None and trials:
        near = [
            patch for patch in surgery.patches if f"{diverged.path}.".startswith(f"{patch.module}.") or not patch.module
        ]
        alike = {(kinds[each.module], each.name, each.place): None for each in reversed(near)}
        for kind, name, place in list(alike)[:trials]:
            trials -= 1
            left = tuple(
                patch
                for patch in surgery.patches
                if (kinds[patch.module], patch.name, patch.place) != (kind, name, place)
            )
            later = check.verify(Surgery(surgery.cuts, left))
            if later.divergence is None or later.divergence.index > diverged.index:
                surgery, verdict = Surgery(surgery.cuts, left), later
                break
        else:
            break
    return surgery, verdict, 0.0 if verdict.divergence else check.change(verdict)


class _Check:
    """Runs the shrunk model and the masked original, in float64 or in the most precise type that the model takes."""

    def __init__(self, plan: Plan, coupling: Coupling, removed: Mask, inputs: Inputs) -> None:
        self.plan, self.coupling, self.removed = plan, coupling, removed
        self.width = verification.width(plan.model)
        self.narrow = verification.vary(inputs, self.width)
        self.wide = verification.vary(inputs, plan.precision)

    def shrunk(self, trial: Surgery) -> nn.Module:
        narrowed = perform(verification.prepare(self.plan.model, self.width), trial)
        widening: nn.Module = narrowed._apply(lambda each: widened(each, self.plan.precision))
        return widening

    def whole(self) -> nn.Module:
        prepared: nn.Module = verification.prepare(self.plan.model, self.plan.precision)
        return prepared

    def verify(self, trial: Surgery) -> verification.Verdict:
        return verification.verify(
            lambda: self.shrunk(trial), self.whole, self.coupling, self.removed, self.wide, self.plan.precision
        )

    def narrowed(self) -> bool:
        """Does the original itself fail in float64, so that the check goes on in float32?"""
        plan = self.plan
        if plan.precise or plan.precision == self.width:
            return False
        failed = verification.runs(self.whole(), self.coupling, self.wide, plan.precision)
        plan.precise = True
        if failed is None:
            return False
        if (
            verification.runs(verification.prepare(plan.model, self.width), self.coupling, self.narrow, self.width)
            is not None
        ):
            return False
        plan.imprecise = (
            f"checked in {str(self.width).removeprefix('torch.')}: in float64 the model itself fails, {failed.what}"
        )
        plan.precision, self.wide = self.width, self.narrow
        return True

    def change(self, verdict: verification.Verdict) -> float:
        """How much the outputs change against the unpruned model's."""
        plan = self.plan
        change = verification.change(
            verification.prepare(plan.model, self.width), self.narrow, verdict.outputs, self.width
        )
        if not CLEAR < change < float("inf"):  # rounding may hide it, or may have taken the run another way
            change = verification.change(self.whole(), self.wide, verdict.outputs, plan.precision)
        return change
