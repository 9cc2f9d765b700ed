"""Proof that a removal is right, at the size of the example inputs and at a second size."""

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
"""How many changed attributes, at most, are tried with their old value where values differ."""

ROLLBACKS = 60
"""How many times, besides once per unit, a removal that fails verification is made smaller; then none is made."""

CLEAR = 1e-3
"""A change of the outputs above this cannot be due to rounding in float32, which takes half the time of float64."""


@dataclass(frozen=True)
class Proof:
    """A surgery, and the result of its verification."""

    surgery: Surgery
    divergence: Divergence | None  # where the shrunk model first leaves the prediction
    elsewhere: tuple[tuple[Ids, str], ...] = ()  # atoms that cannot go at a second size, and why
    error: float = float("inf")  # the largest relative difference of any value
    change: float = 0.0  # of the outputs against the unpruned model's

    @property
    def right(self) -> bool:
        """Whether the shrunk model computes the same as the masked original."""
        return self.divergence is None and not self.elsewhere

    @property
    def objection(self) -> str:
        """The divergence, or the reasons from the second size, as text."""
        if self.divergence is not None:
            return f"{self.divergence.path}: {self.divergence.what}".removeprefix(": ")
        return "; ".join(dict.fromkeys(reason for _, reason in self.elsewhere))


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
    """The coupling after trial removals: groups that cannot lose a channel have a reason, and all others can.

    First all units lose a few channels at once. Then shapes are checked with only half of the units losing any, in as
    many ways as it takes to tell every two units apart.
    """
    coupling = plan.coupling()
    for _ in range(ROLLBACKS + len(coupling.units)):
        if not coupling.units or all(_stands(plan, coupling, trial) for trial in _trials(coupling, plan)):
            return coupling
        coupling = plan.coupling()
    plan.stays += [(classes, Reason.NOT_VERIFIED) for classes in _classes(coupling)]
    return plan.coupling()


def _classes(coupling: Coupling) -> list[Ids]:
    """Classes of the channels of each unit."""
    return [np.concatenate([cell.classes for cell in unit.cells]) for unit in coupling.units]


def _trials(coupling: Coupling, plan: Plan) -> Iterator[tuple[Mask, bool]]:
    """Trial removals, and whether to compare values besides shapes."""
    rng = np.random.default_rng(0)
    selection = select(
        coupling, Amount(round_to=1, min_channels=1), plan.names, lambda _, group: rng.random(len(group.classes))
    )
    widths = [unit.width for unit in coupling.units]
    narrowed = [max(width - 1 - place % 3, (width + 1) // 2) for place, width in enumerate(widths)]
    yield selection.removed(narrowed), True
    for bit in range(max(len(widths) - 1, 0).bit_length()):
        for side in (0, 1):
            kept = [width - 1 if place >> bit & 1 == side else width for place, width in enumerate(widths)]
            yield selection.removed(kept), False


def _stands(plan: Plan, coupling: Coupling, trial: tuple[Mask, bool]) -> bool:
    """Whether a trial passes; if not, channels that cannot be verified are left in from now on."""
    removed, values = trial
    proof = prove(plan, coupling, removed) if values else Proof(*mend(plan.model, coupling, removed, plan.inputs))
    if not proof.right and not give_up(plan, proof, coupling, removed):
        plan.stays += [(classes, proof.objection) for classes in _classes(coupling)]  # the unit at fault is unknown
    return proof.right


def give_up(plan: Plan, proof: Proof, coupling: Coupling, removed: Mask) -> bool:
    """Rule out removals that a failed proof shows to be wrong; False if the proof points to none."""
    if proof.divergence is not None:
        return plan.retreat(proof.divergence, coupling, removed)
    units, left_in = _classes(coupling), False
    for atoms, reason in proof.elsewhere:
        suspects = coupling.roots[atoms]
        for classes in units:
            if np.isin(classes, suspects).any():
                plan.stays.append((classes, reason))
                left_in = True
    return left_in


def _elsewhere(plan: Plan, coupling: Coupling, removed: Mask, surgery: Surgery) -> tuple[tuple[Ids, str], ...]:
    """Atoms that cannot be removed at a second size of the inputs, and why."""
    second = plan.second()
    if second is None:
        return ()
    inputs, trace = second
    at = f"at another size of the inputs ({shapes_of(inputs)})"
    second_coupling, mask, conflicts = carried(coupling, removed, trace)
    if conflicts:
        return tuple((atoms, f"{at} {reason or 'its channels mix with positions'}") for atoms, reason in conflicts)
    check = _Check(plan, second_coupling, mask, inputs)
    if (diverged := check.verify(surgery).divergence) is None:
        return ()
    operation = trace.operations[diverged.index]
    values = (*operation.outputs, *operation.inputs)
    losing = [classes[mask[classes]] for value in values for classes in second_coupling.classes(value.layers)]
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
    """Verify a surgery; where values differ, give attributes that only looked like sizes their old values back."""
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
        sites = {(kinds[patch.module], patch.name, patch.place): None for patch in reversed(near)}
        for kind, name, place in list(sites)[:trials]:
            trials -= 1
            remaining = tuple(
                patch
                for patch in surgery.patches
                if (kinds[patch.module], patch.name, patch.place) != (kind, name, place)
            )
            new_verdict = check.verify(Surgery(surgery.cuts, remaining))
            if new_verdict.divergence is None or new_verdict.divergence.index > diverged.index:
                surgery, verdict = Surgery(surgery.cuts, remaining), new_verdict
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
        widening: nn.Module = narrowed._apply(lambda tensor: widened(tensor, self.plan.precision))
        return widening

    def whole(self) -> nn.Module:
        prepared: nn.Module = verification.prepare(self.plan.model, self.plan.precision)
        return prepared

    def verify(self, trial: Surgery) -> verification.Verdict:
        return verification.verify(
            lambda: self.shrunk(trial), self.whole, self.coupling, self.removed, self.wide, self.plan.precision
        )

    def narrowed(self) -> bool:
        """Whether the original itself fails in float64, so that the check continues in float32."""
        plan = self.plan
        if plan.precise or plan.precision == self.width:
            return False
        failure = verification.runs(self.whole(), self.coupling, self.wide, plan.precision)
        plan.precise = True
        if failure is None:
            return False
        if (
            verification.runs(verification.prepare(plan.model, self.width), self.coupling, self.narrow, self.width)
            is not None
        ):
            return False
        plan.imprecise = (
            f"checked in {str(self.width).removeprefix('torch.')}: in float64 the model itself fails, {failure.what}"
        )
        plan.precision, self.wide = self.width, self.narrow
        return True

    def change(self, verdict: verification.Verdict) -> float:
        """Change of the outputs against the unpruned model's."""
        plan = self.plan
        change = verification.change(
            verification.prepare(plan.model, self.width), self.narrow, verdict.outputs, self.width
        )
        if not CLEAR < change < float("inf"):  # rounding may hide a change, or may have changed the path of the run
            change = verification.change(self.whole(), self.wide, verdict.outputs, plan.precision)
        return change
