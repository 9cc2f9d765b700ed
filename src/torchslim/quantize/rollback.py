"""Verify, else roll back: a converted graph is compared with float, and layers that lose an output go back to float."""

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

ROUNDS = 12  # culprits that are looked for, one after the other
PROGRESS = 0.8  # of what is off may be left once a culprit is in float; else it is none
WEIGHTS = {"not finite": 1e6, "constant": 60.0, "steps": 20.0}  # what counts for more than decibels that are missing
BROKEN = ("not finite", "constant")

Released = frozenset[str]
"""Keys of the units that are in float."""
Look = Callable[[Released], Sequence[Fault]]
"""What is off where these units are in float."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What a quantized model was checked on, and what it takes to leave more of its layers in float.

    A copy of the model shares it; a pickle leaves it out.

    Attributes:
        prepared: what was converted.
        checks: what must hold.
        runs: flat inputs of each call.
        reference: outputs of the float model.
        trained: outputs of the model that was trained on the grid; those of the float model where none was.
        units: of the prepared graph.
        graph: outputs of the converted graph.
        released: units in float, with the reason.
        worst: the channel that is least like float; None where no output varies enough to tell.
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

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def program(self) -> GraphModule:
        """The prepared graph."""
        program = self.prepared.program
        assert isinstance(program, GraphModule)
        return program

    @property
    def names(self) -> list[str]:
        """Of the outputs."""
        return leaf_names(self.prepared.outputs)

    def off(self, graph: Sequence[Sequence[Tensor]]) -> list[Fault]:
        """What of a converted graph's outputs is off."""
        axes, checks = self.prepared.output_axes, self.checks
        found = faults(self.reference, graph, axes, checks)
        if self.trained is not self.reference:
            found = [each for each in found if each.kind in BROKEN]
            found += [fault for fault in faults(self.trained, graph, axes, checks) if fault.kind not in BROKEN]
        return found


def verified(prepared: Prepared, checks: Checks) -> QuantizedModule:
    """A prepared model converted, with as many layers in float as it takes for the checks to hold.

    Raises:
        QuantizeError: nothing that was tried holds.
    """
    evidence = _gather(prepared, checks)
    last: dict[Released, tuple[QuantizedModule, list[list[Tensor]]]] = {}

    def make(released: Released) -> tuple[QuantizedModule, list[list[Tensor]]]:
        if released not in last:
            last.clear()  # large models: one at a time
            model = integers(prepared, released)
            last[released] = model, outputs(graph_of(model), evidence.runs)
        return last[released]

    def look(released: Released) -> list[Fault]:
        return evidence.off(make(released)[1])

    found = look(frozenset())
    reasons = search(evidence.units, look, found, evidence.names) if found else {}
    if reasons is None:
        raise QuantizeError(
            f"the quantized model cannot be verified: {found[0].told(evidence.names)}, whichever layers stay in float; "
            "look at the calibration data, leave layers in float yourself, or pass checks with other thresholds"
        )
    model, graph = make(frozenset(reasons))
    return concluded(model, replace(evidence, prepared=_kept(prepared)), graph, reasons)


def concluded(
    model: QuantizedModule, evidence: Evidence, graph: Sequence[Sequence[Tensor]], reasons: Mapping[str, str]
) -> QuantizedModule:
    """A converted model with its evidence and its records.

    Args:
        model: with the units of `reasons` in float.
        evidence: what it was checked on.
        graph: its outputs on the runs of the evidence.
        reasons: why units went back to float, by their keys.
    """
    lowest = worst(evidence.trained, graph, evidence.prepared.output_axes)
    model.evidence = replace(evidence, graph=graph, released=dict(reasons), worst=lowest)
    model.records = rolled_back(evidence.prepared.records, evidence.units, reasons)
    model.notes = told(evidence.units, reasons)
    return model


def told(units: Sequence[Unit], reasons: Mapping[str, str]) -> list[str]:
    """A line for every unit that went back to float."""
    return [f"{_named(unit)} went back to float: {reasons[unit.key]}" for unit in units if unit.key in reasons]


def rolled_back(records: Sequence[LayerRecord], units: Sequence[Unit], reasons: Mapping[str, str]) -> list[LayerRecord]:
    """Records with the units that went back to float as such."""
    layers = {unit.layer: reasons[unit.key] for unit in units if unit.key in reasons and not unit.operation}
    found = [
        LayerRecord(layer=record.layer, action="refused", reason=Reason.BACK_IN_FLOAT.with_detail(layers[record.layer]))
        if record.layer in layers
        else record
        for record in records
    ]
    known = {record.layer for record in records}
    for unit in units:
        if unit.key in reasons and (unit.operation or unit.layer not in known):
            operation = f" ({unit.operation})" if unit.operation else ""
            reason = Reason.BACK_IN_FLOAT.with_detail(f"{operation}: {reasons[unit.key]}", "")
            found.append(LayerRecord(layer=unit.layer, action="refused", reason=reason))
    return found


def search(
    units: Sequence[Unit],
    look: Look,
    found: Sequence[Fault],
    names: Sequence[str],
    *,
    known: Mapping[str, str] | None = None,
    where: str = "",
) -> dict[str, str] | None:
    """Which units go back to float so that nothing is off, with the reasons; None where that is not to be had.

    The first unit with which something is off, those before it on integers and those behind it in float, is found by
    bisection and left in float, then the next one. Where that does not help, all before the place from which on
    nothing holds stay on integers, or all behind it. Channels alone that are below the threshold, and that no few
    layers are to blame for, are the noise of the whole network: they stay as they are.

    Args:
        units: all of them, in the order of execution.
        look: what is off with some in float.
        found: what is off with the known ones in float.
        names: of the outputs.
        known: units that are in float already, with the reasons.
        where: what the reasons end with.
    """
    reasons = dict(known or {})
    hard = [each for each in found if each.kind != "channel"]
    if hard:

        def look_hard(released: Released) -> list[Fault]:
            return [each for each in look(released) if each.kind != "channel"]

        words = f"{hard[0].told(names)}{where}"
        more = _culprits(units, look_hard, hard, names, reasons, where)
        more = more if more is not None else _parts(units, look_hard, words, reasons)
        if more is None:
            return None
        reasons = more
        found = [each for each in look(frozenset(reasons)) if each.kind == "channel"]
    if found:
        more = _culprits(units, look, found, names, reasons, where)
        reasons = more if more is not None else reasons
    return reasons


def _culprits(
    units: Sequence[Unit],
    look: Look,
    found: Sequence[Fault],
    names: Sequence[str],
    known: Mapping[str, str],
    where: str,
) -> dict[str, str] | None:
    """Single units without which nothing is off, with reasons; None where taking them one by one does not get there."""
    reasons = dict(known)
    for _ in range(ROUNDS):
        rest = [unit for unit in units if unit.key not in reasons]
        if not rest:
            return None
        front = _longest(rest, look, reasons)
        culprit = rest[front]
        left = look(_released(reasons, [culprit]))
        if _weight(left) > PROGRESS * _weight(found):
            return None
        reasons[culprit.key] = f"with it {found[0].told(names)}{where}"
        found = left
        if not found:
            return reasons
    return None


def _parts(units: Sequence[Unit], look: Look, words: str, known: Mapping[str, str]) -> dict[str, str] | None:
    """The longest part from the front, or from the back, that holds on integers; None where there is none."""
    rest = [unit for unit in units if unit.key not in known]
    turned = rest[::-1]
    front, back = _longest(rest, look, known), _longest(turned, look, known)
    if not front and not back:
        return None
    released = rest[front:] if front >= back else turned[back:]
    return {**known, **{unit.key: f"with more layers on integers {words}" for unit in released}}


def _longest(units: Sequence[Unit], look: Look, known: Mapping[str, str]) -> int:
    """How many of the first units can be on integers, the others in float; all of them together are known not to."""
    low, high = 0, len(units)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if look(_released(known, units[middle:])) else (middle, high)
    return low


def _released(reasons: Mapping[str, str], more: Sequence[Unit]) -> Released:
    return frozenset((*reasons, *(unit.key for unit in more)))


def _weight(found: Sequence[Fault]) -> float:
    """How much is off, in decibels below the thresholds."""
    return sum(WEIGHTS.get(each.kind, each.short) for each in found)


def _named(unit: Unit) -> str:
    return f"{unit.operation} of {unit.layer}" if unit.operation and unit.operation != unit.layer else unit.layer


def graph_of(model: QuantizedModule) -> GraphModule:
    """The converted graph."""
    assert isinstance(model.program, GraphModule)
    return model.program


def _gather(prepared: Prepared, checks: Checks) -> Evidence:
    """The samples, and the answers in float and as trained."""
    program = prepared.program
    assert isinstance(program, GraphModule)
    known = prepared.reference
    runs = prepared.samples.runs(checks.samples if known is None else Checks().samples) or [list(prepared.example)]
    reference = float_outputs(program, runs) if known is None else known
    trained = reference
    if prepared.qat:
        prepared.observe(False)
        trained = outputs(program, runs, False, False)
    return Evidence(
        prepared=prepared, checks=checks, runs=runs, reference=reference, trained=trained, units=units_of(program)
    )


def _kept(prepared: Prepared) -> Prepared:
    """What can be converted again whatever happens to the original.

    Weights that nobody can train are shared with it; ranges are not.
    """
    program = prepared.program
    assert isinstance(program, GraphModule)
    if prepared.qat or device_of(program).type != "cpu":
        moved = copy_model(prepared)[0].cpu()
        assert isinstance(moved, Prepared)
        return moved
    ranges = {str(node.target) for node in program.graph.nodes if observes(program, node)}
    stored = (*program.named_parameters(), *program.named_buffers())
    memo: dict[int, Any] = {id(each): each for name, each in stored if name.rpartition(".")[0] not in ranges}
    return copy.deepcopy(prepared, memo)
