"""Verify, else roll back: compares a converted graph with float, and puts layers that cause faults back in float."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from torchslim.core.isolation import copy_model
from torchslim.core.reason import Reason
from torchslim.core.step import LayerRecord
from torchslim.core.trees import device_of
from torchslim.errors import QuantizeError
from torchslim.graph.io_structure import leaf_names
from torchslim.quantize.checks import Checks, Fault, Figure, faults, worst
from torchslim.quantize.conversion import integers
from torchslim.quantize.modules import Prepared, QuantizedModule
from torchslim.quantize.samples import Run, float_outputs, outputs
from torchslim.quantize.units import Unit, observes, units_of

ROUNDS = 12  # culprits that are searched for, one after the other
PROGRESS = 0.8  # of the faults' weight may remain with a culprit in float; else the unit is no culprit
WEIGHTS = {"not finite": 1e6, "constant": 60.0, "steps": 20.0}  # decibels that faults of a kind count as
BROKEN = ("not finite", "constant")

Released = frozenset[str]
"""Keys of the units that are left in float."""
Look = Callable[[Released], Sequence[Fault]]
"""Returns the faults of the model in which these units are in float."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """The data that a quantized model was checked on, and the parts needed to leave more of its layers in float.

    Copies of the model share the evidence.

    Attributes:
        prepared: the model that was converted.
        checks: the thresholds.
        runs: flat inputs of each call.
        reference: outputs of the float model.
        trained: outputs of the model that was trained on the grid; without training, those of the float model.
        units: units of the prepared graph.
        graph: outputs of the converted graph.
        released: keys of the units in float, with the reasons.
        worst: the output or channel with the lowest signal over noise; None where no output can be compared.
    """

    prepared: Prepared
    checks: Checks
    runs: Sequence[Run]
    reference: Sequence[Sequence[Tensor]]
    trained: Sequence[Sequence[Tensor]]
    units: Sequence[Unit]
    graph: Sequence[Sequence[Tensor]] = ()
    released: Mapping[str, str] = field(default_factory=dict)
    worst: Figure | None = None

    def __deepcopy__(self, memo: Any) -> Evidence:
        return self

    @property
    def program(self) -> GraphModule:
        """The prepared graph."""
        program = self.prepared.program
        assert isinstance(program, GraphModule)
        return program

    @property
    def names(self) -> list[str]:
        """Names of the outputs."""
        return leaf_names(self.prepared.outputs)

    def off(self, graph: Sequence[Sequence[Tensor]]) -> list[Fault]:
        """Faults of a converted graph's outputs."""
        axes, checks = self.prepared.output_axes, self.checks
        failures = faults(self.reference, graph, axes, checks)
        if self.trained is not self.reference:
            failures = [fault for fault in failures if fault.kind in BROKEN]
            failures += [fault for fault in faults(self.trained, graph, axes, checks) if fault.kind not in BROKEN]
        return failures


class Unverified(QuantizeError):
    """The quantized model fails its checks, which depend on its weights: another training may mend that."""


def verified(prepared: Prepared, checks: Checks, known: Mapping[str, str] | None = None) -> QuantizedModule:
    """Convert a prepared model, with as many layers in float as the checks require.

    Args:
        prepared: calibrated or trained model.
        checks: the thresholds.
        known: units that are left in float in any case, with the reasons.

    Raises:
        QuantizeError: the checks hold for no choice that was tried.
    """
    evidence = _gather(prepared, checks)
    last: dict[Released, tuple[QuantizedModule, list[list[Tensor]]]] = {}

    def make(released: Released) -> tuple[QuantizedModule, list[list[Tensor]]]:
        if released not in last:
            last.clear()  # models can be large: keep only one
            model = integers(prepared, released)
            last[released] = model, outputs(graph_of(model), evidence.runs)
        return last[released]

    def look(released: Released) -> list[Fault]:
        return evidence.off(make(released)[1])

    failures = look(frozenset(known or ()))
    reasons: dict[str, str] | None = dict(known or {})
    if failures:
        reasons = search(evidence.units, look, failures, evidence.names, known=known)
    if reasons is None:
        raise Unverified(
            f"the quantized model cannot be verified: {failures[0].told(evidence.names)}, "
            "whichever layers stay in float; look at the calibration data, leave layers in float yourself, "
            "or pass checks with other thresholds"
        )
    model, graph = make(frozenset(reasons))
    return concluded(model, replace(evidence, prepared=_kept(prepared)), graph, reasons)


def concluded(
    model: QuantizedModule, evidence: Evidence, graph: Sequence[Sequence[Tensor]], reasons: Mapping[str, str]
) -> QuantizedModule:
    """Attach evidence, records and notes to a converted model; returns the model.

    Args:
        model: converted model with the units of `reasons` in float.
        evidence: data that the model was checked on.
        graph: outputs of the model on the runs of the evidence.
        reasons: reasons why units went back to float, by the units' keys.
    """
    lowest = worst(evidence.trained, graph, evidence.prepared.output_axes)
    model.evidence = replace(evidence, graph=graph, released=dict(reasons), worst=lowest)
    model.records = rolled_back(evidence.prepared.records, evidence.units, reasons)
    model.notes = told(evidence.units, reasons)
    return model


def told(units: Sequence[Unit], reasons: Mapping[str, str]) -> list[str]:
    """A line for every unit that went back to float because of a fault."""
    return [
        f"{_named(unit)} went back to float: {reasons[unit.key]}"
        for unit in units
        if unit.key in reasons and not Reason.FASTER_IN_FLOAT.given_in(reasons[unit.key])
    ]


def rolled_back(records: Sequence[LayerRecord], units: Sequence[Unit], reasons: Mapping[str, str]) -> list[LayerRecord]:
    """Records in which the units that went back to float are refused, with the reason."""
    layers = {unit.layer: reasons[unit.key] for unit in units if unit.key in reasons and not unit.operation}
    updated = [
        LayerRecord(layer=record.layer, action="refused", reason=_recorded(layers[record.layer]))
        if record.layer in layers
        else record
        for record in records
    ]
    recorded = {record.layer for record in records}
    for unit in units:
        follows = unit.operation and Reason.FASTER_IN_FLOAT.given_in(reasons.get(unit.key, ""))  # the layers before it
        if unit.key in reasons and (unit.operation or unit.layer not in recorded) and not follows:
            operation = f" ({unit.operation})" if unit.operation else ""
            reason = _recorded(reasons[unit.key], operation)
            updated.append(LayerRecord(layer=unit.layer, action="refused", reason=reason))
    return updated


def _recorded(reason: str, operation: str = "") -> str:
    """The reason of a record: a choice for speed is no fault, and stands for itself."""
    if Reason.FASTER_IN_FLOAT.given_in(reason):
        return reason
    return Reason.BACK_IN_FLOAT.with_detail(f"{operation}: {reason}", "")


def search(
    units: Sequence[Unit],
    look: Look,
    found: Sequence[Fault],
    names: Sequence[str],
    *,
    known: Mapping[str, str] | None = None,
    where: str = "",
) -> dict[str, str] | None:
    """The units that must go back to float for the checks to hold, with the reasons; None where no choice helps.

    Bisection finds the first unit that causes a fault with the units before it on integers and those behind it in
    float. That unit is left in float, then the next one is searched. Where this does not help, the longest part from
    the front or from the back that holds stays on integers, and the rest goes back. Channels below the threshold that
    a few units do not explain are noise of the whole network and are accepted.

    Args:
        units: all units, in the order of execution.
        look: returns the faults with some units in float.
        found: the faults with the known units in float.
        names: names of the outputs.
        known: units that are in float already, with the reasons.
        where: suffix of the reasons.
    """
    reasons = dict(known or {})
    hard = [fault for fault in found if fault.kind != "channel"]
    if hard:

        def look_hard(released: Released) -> list[Fault]:
            return [fault for fault in look(released) if fault.kind != "channel"]

        message = f"{hard[0].told(names)}{where}"
        extended = _culprits(units, look_hard, hard, names, reasons, where)
        extended = extended if extended is not None else _parts(units, look_hard, message, reasons)
        if extended is None:
            return None
        reasons = extended
        found = [fault for fault in look(frozenset(reasons)) if fault.kind == "channel"]
    if found:
        extended = _culprits(units, look, found, names, reasons, where)
        reasons = extended if extended is not None else reasons
    return reasons


def _culprits(
    units: Sequence[Unit],
    look: Look,
    failures: Sequence[Fault],
    names: Sequence[str],
    released: Mapping[str, str],
    where: str,
) -> dict[str, str] | None:
    """Single units without which there are no faults, with reasons; None where releasing them one by one fails."""
    reasons = dict(released)
    for _ in range(ROUNDS):
        rest = [unit for unit in units if unit.key not in reasons]
        if not rest:
            return None
        front = _longest(rest, look, reasons)
        culprit = rest[front]
        remaining = look(_released(reasons, [culprit]))
        if _weight(remaining) > PROGRESS * _weight(failures):
            return None
        reasons[culprit.key] = f"with it {failures[0].told(names)}{where}"
        failures = remaining
        if not failures:
            return reasons
    return None


def _parts(units: Sequence[Unit], look: Look, words: str, reasons: Mapping[str, str]) -> dict[str, str] | None:
    """Reasons for releasing all but the longest part, from the front or the back, that holds; None if none does."""
    rest = [unit for unit in units if unit.key not in reasons]
    backward = rest[::-1]
    front, back = _longest(rest, look, reasons), _longest(backward, look, reasons)
    if not front and not back:
        return None
    released = rest[front:] if front >= back else backward[back:]
    return {**reasons, **{unit.key: f"with more layers on integers {words}" for unit in released}}


def _longest(units: Sequence[Unit], look: Look, reasons: Mapping[str, str]) -> int:
    """How many of the first units hold on integers, the others in float; all of them together are known to fail."""
    low, high = 0, len(units)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if look(_released(reasons, units[middle:])) else (middle, high)
    return low


def _released(reasons: Mapping[str, str], more: Sequence[Unit]) -> Released:
    return frozenset((*reasons, *(unit.key for unit in more)))


def _weight(failures: Sequence[Fault]) -> float:
    """Weight of all faults, in decibels below the thresholds."""
    return sum(WEIGHTS.get(fault.kind, fault.short) for fault in failures)


def _named(unit: Unit) -> str:
    return f"{unit.operation} of {unit.layer}" if unit.operation and unit.operation != unit.layer else unit.layer


def graph_of(model: QuantizedModule) -> GraphModule:
    """The converted graph."""
    assert isinstance(model.program, GraphModule)
    return model.program


def _gather(prepared: Prepared, checks: Checks) -> Evidence:
    """The samples of a prepared model, and its outputs in float and as trained."""
    program = prepared.program
    assert isinstance(program, GraphModule)
    stored = prepared.reference
    runs = prepared.samples.runs(checks.samples if stored is None else Checks().samples) or [list(prepared.example)]
    reference = float_outputs(program, runs) if stored is None else stored
    trained = reference
    if prepared.qat:
        prepared.observe(False)
        trained = outputs(program, runs, False, False)
    return Evidence(
        prepared=prepared, checks=checks, runs=runs, reference=reference, trained=trained, units=units_of(program)
    )


def _kept(prepared: Prepared) -> Prepared:
    """A copy of `prepared` that can be converted again, whatever happens to the original.

    Weights that cannot be trained are shared with the original; ranges are not.
    """
    program = prepared.program
    assert isinstance(program, GraphModule)
    if prepared.qat or device_of(program).type != "cpu":
        moved = copy_model(prepared)[0].cpu()
        assert isinstance(moved, Prepared)
        return moved
    ranges = {str(node.target) for node in program.graph.nodes if observes(program, node)}
    stored = (*program.named_parameters(), *program.named_buffers())
    memo: dict[int, Any] = {id(tensor): tensor for name, tensor in stored if name.rpartition(".")[0] not in ranges}
    return copy.deepcopy(prepared, memo)
