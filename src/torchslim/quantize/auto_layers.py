"""`Quantize(layers="auto")`: finds the layers to leave out for the metric, for the latency, or for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import GraphModule

from torchslim.core.layer_patterns import class_names, matches
from torchslim.core.reason import Reason
from torchslim.core.step import Context, LayerRecord, Outcome
from torchslim.quantize.latency_trials import LatencyTrials, evidence_of, layer_reasons, unit_reasons
from torchslim.quantize.mixed_precision import KEPT, WIDENINGS, Trials, fallback, fewest
from torchslim.quantize.modules import Prepared
from torchslim.quantize.schemes import FLOAT
from torchslim.quantize.stored_rows import StoredRows
from torchslim.quantize.units import units_of
from torchslim.training.calibration import PartCalibration

if TYPE_CHECKING:
    from torchslim.quantize.step import Quantize

FAST_ENOUGH = "faster_in_float"
"""Key of an outcome's evidence: the choices by latency, by part."""


def by_metric(step: Quantize, model: nn.Module, ctx: Context) -> Outcome:
    """Find the layers to leave out, then quantize; after training, measure again and leave out more if needed."""
    assert step.metric_drop is not None
    trials = Trials(model, ctx, step)
    choice = fewest(trials.layers, trials.drop, step.metric_drop, most=trials.most)
    layers, drop, held = choice.layers, choice.drop, choice.held
    outcome = _with(step, trials.exceptions(layers), model, ctx)
    if step.by == "latency" or step.mode == "qat":
        attempts = [(trials.lost_by(outcome.model), layers, outcome)]
        for number in range(1, WIDENINGS + 1):
            if step.mode != "qat" or attempts[-1][0] <= step.metric_drop or len(layers) >= trials.most:
                break
            layers = trials.layers[: min(max(2 * len(layers), 1), trials.most)]
            state = None if ctx.state is None else ctx.state / f"wider-{number}"
            if state is not None:
                state.mkdir(parents=True, exist_ok=True)
            outcome = _with(step, trials.exceptions(layers), model, replace(ctx, state=state))
            attempts.append((trials.lost_by(outcome.model), layers, outcome))
        drop, layers, outcome = min(attempts, key=lambda attempt: attempt[0])
        held = drop <= step.metric_drop
    messages = list(outcome.warnings)
    if not held:
        unit = ctx.task.as_metric().unit
        fallback_name = "float" if fallback(step.scheme) == FLOAT else "8 bits"
        messages.append(
            f"no choice of layers that was measured keeps the metric within {step.metric_drop:g} {unit}: the "
            f"nearest loses {drop:.4g} {unit} with {len(layers)} of {len(trials.layers)} layers in {fallback_name}"
        )
    return replace(outcome, warnings=messages)


def _with(step: Quantize, layers: dict[str, str], model: nn.Module, ctx: Context) -> Outcome:
    """The step's outcome with layers left out, which their records explain."""
    instead = fallback(step.scheme)
    chosen = by_latency if step.by == "latency" else quantized
    outcome = chosen(step, layers, model, ctx)
    types = class_names(model)

    def explained(record: LayerRecord) -> LayerRecord:
        left_out = record.reason == Reason.AS_ASKED or (
            record.action == "quantized" and not record.reason and instead != FLOAT
        )
        match = next((layers[layer] for layer in reversed(layers) if matches(layer, record.layer, types)), None)
        return replace(record, reason=KEPT[instead]) if left_out and match == instead else record

    return replace(outcome, layers=[explained(record) for record in outcome.layers])


def quantized(step: Quantize, layers: Mapping[str, str], model: nn.Module, ctx: Context) -> Outcome:
    """The step's outcome with these layers in place of "auto"."""
    return replace(step, layers=layers, metric_drop=None, by="metric")(model, ctx)


@dataclass
class Chooser:
    """Chooses the layers of prepared programs that stay in float for speed.

    Attributes:
        evidence: the choices, by part.
        reasons: of the layers in float, by their names in the whole model.
    """

    ctx: Context
    rows: StoredRows
    evidence: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __call__(self, prepared: Mapping[str, Prepared]) -> dict[str, dict[str, str]]:
        """Reasons for the units of each program that stay in float."""
        released = {}
        for path, part in prepared.items():
            bench = self.ctx.within(path).workbench
            assert bench is not None, "the step has been checked"
            trials = LatencyTrials(prepared=part, bench=bench, ctx=self.ctx, path=path, rows=self.rows)
            choice = trials.fastest()
            released[path] = unit_reasons(trials, choice)
            self.reasons |= dict(layer_reasons(trials, choice))
            self.evidence[path] = evidence_of(choice)
        return released

    @property
    def all_float(self) -> list[str]:
        """Paths of the programs that stay in float as a whole."""
        return [path for path, found in self.evidence.items() if found["in_float"] == found["layers"]]

    def warnings(self, runtime: str) -> list[str]:
        """A warning for every program that stays in float."""
        return [
            f"{f'{path} stays' if path else 'the model stays'} in float, which is faster on {runtime}: "
            f"{found['float_ms']:.3g} ms, {_integers(found)}, and no choice of layers that was timed is as fast; for a "
            "smaller file quantize to int8-weights, or name the layers yourself"
            for path, found in self.evidence.items()
            if found["in_float"] == found["layers"]
        ]


def _integers(found: Mapping[str, Any]) -> str:
    ms = found["integer_ms"]
    return "all on integers it cannot be deployed" if ms is None else f"all on integers {ms:.3g} ms"


def by_latency(step: Quantize, layers: Mapping[str, str], model: nn.Module, ctx: Context) -> Outcome:
    """Quantize with as many layers in float as makes the program fastest, besides those that `layers` leaves out.

    Before a training, the choice is made with plain rounding: the kernels, and so the times, are the same. The training
    then leaves these layers in float.
    """
    choose = Chooser(ctx, StoredRows(ctx, "latency.rows"))
    plain = replace(step, layers=layers, metric_drop=None, by="metric")
    if step.mode == "ptq":
        outcome = plain.outcome(model, ctx, choose)
    else:
        trial = replace(plain, observer="min-max", accuracy="plain", rounding=None, correct_biases=None)
        prepared = trial.prepared(model, ctx, layers, PartCalibration(model, ctx, ctx.paths))
        known = choose(prepared)
        if len(choose.all_float) == len(prepared):  # nothing is left to train on a grid
            trial = replace(trial, mode="ptq", train=None, learned_step=False)
            outcome = trial.outcome(model, ctx, lambda _: known)
        else:
            outcome = _trained(plain, choose, model, ctx)
    return replace(
        outcome,
        warnings=[*outcome.warnings, *choose.warnings(ctx.target.runtime)],
        evidence={**outcome.evidence, FAST_ENOUGH: choose.evidence},
    )


def _trained(step: Quantize, choose: Chooser, model: nn.Module, ctx: Context) -> Outcome:
    """The step's outcome after training, without rounding in the layers of a choice."""
    whole = tuple(f"{path}." if path else "" for path in choose.all_float)  # a graph needs a layer with a grid to train
    layers = {name: FLOAT for name in choose.reasons if not (whole and name.startswith(whole))}
    step = replace(step, layers={**step.exceptions(), **layers})
    outcome = step.outcome(model, ctx, lambda prepared: {path: _released(prepared[path]) for path in choose.all_float})
    return replace(
        outcome,
        layers=[
            replace(record, reason=choose.reasons[record.layer])
            if record.reason == Reason.AS_ASKED and record.layer in layers
            else record
            for record in outcome.layers
        ],
    )


def _released(prepared: Prepared) -> dict[str, str]:
    """Reasons for all units of a graph."""
    assert isinstance(prepared.program, GraphModule)
    return dict.fromkeys((unit.key for unit in units_of(prepared.program)), Reason.FASTER_IN_FLOAT.value)
