"""The quantization step of a recipe."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from torch import nn

from torchslim.core.batches import take_first
from torchslim.core.checks import check_fields
from torchslim.core.imports import resolve
from torchslim.core.isolation import copy_model, quiet
from torchslim.core.parts import inside, mounted, part_views, under
from torchslim.core.reason import Reason
from torchslim.core.step import Context, Form, Inputs, LayerRecord, Outcome
from torchslim.errors import QuantizeError
from torchslim.graph.export import WRAPPED
from torchslim.quantize.accuracy_options import Accuracy, Helpers, Rounding, chosen_helpers
from torchslim.quantize.checks import Checks
from torchslim.quantize.functional import converted, decibels
from torchslim.quantize.latency_search import MOST_PROGRAMS
from torchslim.quantize.modules import Prepared, QuantizedModule
from torchslim.quantize.parts import check_layers, layers_inside, share_weights, take_back
from torchslim.quantize.preparation import Layers, chooser, prepare
from torchslim.quantize.schemes import FLOAT, OBSERVERS, find_scheme
from torchslim.training.calibration import PartCalibration
from torchslim.training.finetune import Training
from torchslim.training.loop import Hook, Loop

T = TypeVar("T")
Choose = Callable[[Mapping[str, Prepared]], Mapping[str, Mapping[str, str]]]

ANY_DROP = 1e9  # of the metric, in a rehearsal: the first choice of layers holds
ANY_OUTPUTS = Checks(channel_db=-300.0, apart_db=300.0, apart_share=0.999)  # in a rehearsal, too
LOUD_DB = 15.0  # signal over noise of the quantized output, below which the step warns


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Turn weights and activations into integers.

    Args:
        scheme: a name of `SCHEMES`, for every layer that `layers` does not name.
        layers: schemes, or "float", by glob over layers or "type:NAME"; the last pattern that matches counts. "auto":
            leave as few layers in float (of "int4-weights": in "int8-weights") as keep the metric within `metric_drop`,
            by bisection over the most sensitive layers, each choice measured as the artifact; see `by`.
        by: what "auto" judges layers by. "latency": layers that are faster in float on the target stay there, so that
            the artifact is at least as fast as in float and as all on integers; at most 16 programs are made from one
            calibration and timed. With `metric_drop`, the metric chooses first.
        metric_drop: with "auto", how much worse the metric on val may become, in its own unit, than that of the model
            that the step receives.
        mode: "ptq": post-training, calibrated on the task's calibration batches; "qat": then trained on the grid.
        observer: observer of static activations, a name of `OBSERVERS`.
        accuracy: "plain": none of the four options below; "best": GPTQ and bias correction, which brought the outputs
            of the models of `benchmarks/accuracy.md` nearer to float. An option that is set wins over it; with "qat",
            training replaces both. Layers that an option does not fit stay as they are.
        equalize: even out the ranges of channels between layers (Nagel 2019).
        smooth: strength, 0 to 1, with which outliers behind norms move into weights (SmoothQuant), or "off".
        rounding: with "ptq", how weights are rounded: to "nearest", by "gptq" or "adaround".
        correct_biases: with "ptq", correct biases by the mean error of the outputs (Nagel 2019).
        train: with "qat", the training; by default it distills the context's teacher for three epochs.
        learned_step: with "qat", whether to learn the scales of weights, too (LSQ).
        norms_until: the fraction of the training after which batch norms keep their statistics.
        ranges_until: the fraction of the training after which the grids stay as they are.
        checks: thresholds for the result, here and deployed; layers that keep it from meeting them go back to float.
            Values that differ from the defaults may be given as a mapping. None: no checks.
    """

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.QUANTIZED

    scheme: str = field(default="int8", kw_only=False)
    layers: Mapping[str, str] | Literal["auto"] = field(default_factory=dict, hash=False)
    by: Literal["metric", "latency"] = "metric"
    metric_drop: float | None = None
    mode: Literal["ptq", "qat"] = "ptq"
    observer: str = "mse"
    accuracy: Accuracy = "plain"
    equalize: bool | None = None
    smooth: float | Literal["off"] | None = None
    rounding: Rounding | None = None
    correct_biases: bool | None = None
    train: Training | None = None
    learned_step: bool = False
    norms_until: float = 0.5
    ranges_until: float = 0.7
    checks: Checks | Mapping[str, float] | None = field(default=Checks(), hash=False)

    def __post_init__(self) -> None:
        check_fields(self, QuantizeError)
        object.__setattr__(self, "checks", Checks.of(self.checks))
        find_scheme(self.scheme)
        self._check_auto()
        for name in self.exceptions().values():
            if name != FLOAT:
                find_scheme(name)
        if self.mode not in ("ptq", "qat"):
            raise QuantizeError(f"mode must be 'ptq' or 'qat', got {self.mode!r}")
        if self.mode == "ptq" and (self.train is not None or self.learned_step):
            raise QuantizeError("train and learned_step belong to mode='qat'; set it, or leave them out")
        if self.helpers().afterwards and self.mode == "qat":
            raise QuantizeError("rounding and correct_biases belong to mode='ptq': training does their work")
        if self.observer not in OBSERVERS:
            raise QuantizeError(f"observer {self.observer!r} is not known; one of {', '.join(OBSERVERS)}")
        if wrong := [name for name in ("norms_until", "ranges_until") if not 0 < getattr(self, name) <= 1]:
            raise QuantizeError(f"{wrong[0]} must be in (0, 1], got {getattr(self, wrong[0])}")

    def _check_auto(self) -> None:
        """Raise QuantizeError where `layers`, `by` and `metric_drop` do not fit each other."""
        if isinstance(self.layers, str) and self.layers != "auto":
            raise QuantizeError(f"layers must be a mapping of patterns to schemes, or 'auto', got {self.layers!r}")
        if self.by not in ("metric", "latency"):
            raise QuantizeError(f"by must be 'metric' or 'latency', got {self.by!r}")
        if self.layers == "auto" and self.metric_drop is None and self.by == "metric":
            raise QuantizeError(
                "layers='auto' needs metric_drop, the largest allowed loss in the metric's unit, or by='latency'"
            )
        if self.layers != "auto" and self.by == "latency":
            raise QuantizeError("by='latency' belongs to layers='auto'; set it, or leave by out")
        if self.layers != "auto" and self.metric_drop is not None:
            raise QuantizeError("metric_drop belongs to layers='auto'; set it, or leave metric_drop out")
        if self.metric_drop is not None and not 0 <= self.metric_drop < math.inf:
            raise QuantizeError(f"metric_drop must be a finite number of at least 0, got {self.metric_drop}")

    def check(self, ctx: Context) -> None:
        """Check that there is data to calibrate on, that the patterns name layers, and that training can start."""
        if self.calibrates():
            split = ctx.task.calibration_split
            take_first(getattr(ctx.task, split), split)
        if self.metric_drop is not None:
            take_first(ctx.task.val, "val")
        if self.by == "latency" and ctx.workbench is None:
            raise QuantizeError(
                "by='latency' needs a workbench to measure latency: run the step by ts.compress or `torchslim run`, or "
                "give a Context with workbench=ts.Bench(...)"
            )
        model = ctx.model if ctx.model is not None else ctx.teacher
        chooser(model, self.scheme, self.exceptions())
        check_layers(model, ctx.paths, self.exceptions())
        if self.mode == "qat":
            self.training().check_training(ctx)

    def trainings(self) -> list[int]:
        """Epochs of the training on the grid; empty with "ptq"."""
        return [self.training().epochs] if self.mode == "qat" else []

    def timed_programs(self, model: nn.Module, ctx: Context) -> Mapping[str, int]:
        """How many programs are made and timed at most to choose layers by latency, by the path of the part."""
        return dict.fromkeys(ctx.parts or ("",), MOST_PROGRAMS) if self.by == "latency" else {}

    def rehearsed(self, folder: Path) -> Self:
        """Return the same quantization with one epoch of training, and one choice of layers, which holds.

        Layers are not chosen by latency: all stay on integers.

        The outputs of an untrained model say little: they are compared, but nearly all differences pass. GPTQ replaces
        AdaRound: it needs the same statistics, and a fraction of the time.
        """
        checks = self.checks
        return replace(
            self,
            checks=replace(ANY_OUTPUTS, samples=checks.samples) if isinstance(checks, Checks) else checks,
            layers={} if self.layers == "auto" and self.metric_drop is None else self.layers,
            by="metric",
            metric_drop=None if self.metric_drop is None else ANY_DROP,
            rounding="gptq" if self.rounding == "adaround" else self.rounding,
            train=self.training().rehearsed(folder) if self.mode == "qat" else None,
        )

    def calibrates(self) -> bool:
        """Whether a layer or an option for accuracy needs calibration data."""
        names = {self.scheme, *self.exceptions().values()} - {FLOAT}
        return self.helpers().needs_data or any(find_scheme(name).activations == "static" for name in names)

    def exceptions(self) -> Layers:
        """Schemes of `layers` by pattern; empty with "auto", which finds them."""
        return self.layers if isinstance(self.layers, Mapping) else {}

    def helpers(self) -> Helpers:
        """The options for accuracy."""
        names = ("equalize", "smooth", "rounding", "correct_biases")
        options = {name: getattr(self, name) for name in names}
        return chosen_helpers(self.accuracy, options, trained=self.mode == "qat")

    def training(self) -> Training:
        """The training on the grid; by default, distillation from a teacher."""
        if self.train is not None:
            return self.train
        default: Training = resolve("torchslim.distill:Distill", "the default training")(epochs=3, lr=1e-4)
        return default

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        if self.layers != "auto":
            return self.outcome(model, ctx)
        from torchslim.quantize.auto_layers import by_latency, by_metric

        return by_latency(self, {}, model, ctx) if self.metric_drop is None else by_metric(self, model, ctx)

    def outcome(self, model: nn.Module, ctx: Context, choose: Choose | None = None) -> Outcome:
        """Quantize with the layers of the step.

        Args:
            model: changed by a training.
            ctx: of the step.
            choose: called with the calibrated parts, returns units of each that stay in float, with the reasons.
        """
        prepared = self.prepared_parts(model, ctx, self.exceptions(), PartCalibration(model, ctx, ctx.paths))
        whole = mounted(copy_model(model)[0] if ctx.parts else model, prepared)
        history: Sequence[Mapping[str, float]] = ()
        training_records: Sequence[LayerRecord] = ()
        if self.mode == "qat":
            share_weights(whole, prepared)
            masks = _by_first_name(whole, {inside_graph(ctx.paths, name): mask for name, mask in ctx.masks.items()})
            freeze = Freeze(list(prepared.values()), self.norms_until, self.ranges_until)
            training = _inside_training(self.training(), model, ctx.paths, whole)
            report = training.fit(whole, ctx, hooks=[freeze], masks=masks)
            take_back(whole, prepared)
            history, training_records = report.history, report.layers
        checks = self.checks
        assert not isinstance(checks, Mapping)
        left = {} if choose is None else choose(prepared)
        quantized = {path: converted(part, checks, left.get(path)) for path, part in prepared.items()}
        records: list[LayerRecord] = []
        messages: list[str] = []
        worst: list[dict[str, Any]] = []
        for path, part in quantized.items():
            own = _measured(prepared[path], part, ctx.within(path).example_inputs)
            named = [replace(record, layer=under(path, record.layer)) for record in own]
            named = _further(records, named, path)
            messages += [f"not quantized: {record.layer}: {record.reason}" for record in named if _surprising(record)]
            messages += self._noise(part, path)
            figure = None if part.evidence is None else _worst(part.evidence, own)
            if figure is not None:
                worst.append({**figure, "layer": figure["layer"] and under(path, figure["layer"])})
            records += named
        evidence = any(part.evidence is not None for part in quantized.values())
        figures = min(worst, key=lambda figure: float(figure["sqnr_db"]), default=None)
        return Outcome(
            model=mounted(whole, quantized),
            masks=ctx.masks,
            layers=[*records, *training_records],
            warnings=messages,
            history=history,
            evidence={"worst_channel": figures} if evidence else {},
        )

    def _noise(self, quantized: QuantizedModule, path: str) -> list[str]:
        """A warning if the noise of post-training quantization is loud."""
        evidence = quantized.evidence
        if evidence is None or self.mode != "ptq":
            return []
        ratio = decibels(chain(*evidence.reference), chain(*evidence.graph))
        of = f" of {path}" if path else ""
        if ratio >= LOUD_DB:
            return []
        return [f"the quantized output{of} is only {ratio:.1f} dB from the float one; expect a loss"]

    def prepared(self, model: nn.Module, ctx: Context, layers: Layers, data: PartCalibration) -> dict[str, Prepared]:
        """Calibrated parts for post-training quantization, with `layers` in place of the step's."""
        step = replace(self, layers=layers, by="metric", metric_drop=None, mode="ptq", train=None, learned_step=False)
        return step.prepared_parts(model, ctx, layers, data)

    def prepared_parts(
        self, model: nn.Module, ctx: Context, layers: Layers, data: PartCalibration
    ) -> dict[str, Prepared]:
        """The parts of the model, prepared and calibrated, by path."""
        prepared = {}
        for path, part in part_views(model, ctx.parts).items():
            named = layers_inside(model, path, layers)
            prepared[path] = self._prepared(part, ctx.within(path), named, self._batches(data, path))
        return prepared

    def _batches(self, data: PartCalibration, path: str) -> list[Inputs]:
        """Batches for the observers, or as many samples as the checks take, or none."""
        if self.calibrates():
            return data.inputs(path)
        return data.first(path, self.checks.samples) if isinstance(self.checks, Checks) else []

    def _prepared(self, model: nn.Module, ctx: Context, layers: Layers, batches: list[Inputs]) -> Prepared:
        prepared = prepare(
            model,
            ctx.captured_with,
            runtime=ctx.target.runtime,
            scheme=self.scheme,
            layers=layers,
            observer=self.observer,
            qat=self.mode == "qat",
            learned_step=self.learned_step,
            helpers=self.helpers(),
            batches=batches,
            dynamic_shapes=ctx.dynamic_shapes,
        )
        if self.calibrates():
            prepared.calibrate(batches)
        prepared.show(batches)
        return prepared


class Freeze(Hook):
    """Freezes batch-norm statistics late in training and ranges later, so that the weights adapt to the final ones."""

    def __init__(self, prepared: Sequence[Prepared], norms_until: float, ranges_until: float) -> None:
        self.prepared, self.norms_until, self.ranges_until = prepared, norms_until, ranges_until

    def on_start(self, loop: Loop) -> None:
        """Freeze again what was frozen before an interruption."""
        self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        """Freeze statistics and ranges when their fraction of the training is over."""
        for prepared in self.prepared:
            if loop.progress >= self.norms_until:
                prepared.freeze_norms()
            if loop.progress >= self.ranges_until:
                prepared.freeze_ranges()

    def settled(self, loop: Loop) -> bool:
        """Whether the grids are final: only such an epoch may be kept as the best."""
        return loop.progress >= min(self.ranges_until, 1.0)


def _further(records: Sequence[LayerRecord], own: Sequence[LayerRecord], program: str) -> list[LayerRecord]:
    """The records of a program without those that the part's programs before it gave its layers, too."""
    known = {(record.layer, record.action) for record in records}
    of = f" ({program})"
    return [
        replace(record, reason=f"{record.reason}{of}") if any(record.layer == layer for layer, _ in known) else record
        for record in own
        if (record.layer, record.action) not in known
    ]


def _measured(prepared: Prepared, quantized: QuantizedModule, inputs: Inputs) -> list[LayerRecord]:
    """Records with the SQNR of their layers, the worst first, then those of layers in float."""
    with quiet():
        from torchslim.quantize.layer_sqnr import layer_sqnr

    ratios = layer_sqnr(prepared, quantized, prepared.leaves(inputs))
    records = [
        replace(
            record,
            sqnr_db=round(ratios[record.layer], 2) if math.isfinite(ratios.get(record.layer, math.inf)) else None,
        )
        for record in quantized.records
    ]
    return sorted(
        records, key=lambda record: (record.action != "quantized", record.sqnr_db is None, record.sqnr_db or 0.0)
    )


def _worst(evidence: Any, records: Sequence[LayerRecord]) -> dict[str, Any] | None:
    """The worst channel, and the layer with the lowest SQNR; None where no output was compared."""
    figure = evidence.worst
    if figure is None:
        return None
    layer = next((record.layer for record in records if record.sqnr_db is not None), None)
    return {
        "where": figure.place.named(evidence.names),
        "sqnr_db": round(min(figure.decibels, 200.0), 2),
        "layer": layer,
    }


def inside_graph(paths: Sequence[str], name: str) -> str:
    """Name of a parameter in a model whose parts are mounted graphs, from its name in the model before."""
    for path in paths:
        own = inside(path, name)
        if own is not None:
            return under(f"{path}.inner" if path else "", f"program.{WRAPPED}{own}")
    return name


def _inside_training(training: Training, model: nn.Module, paths: Sequence[str], whole: nn.Module) -> Training:
    """The training with `lr_scale` by the names of the prepared model, whose program has no classes of layers."""
    if not training.lr_scale:
        return training
    factors = {inside_graph(paths, name): factor for name, factor in training.settings().factors(model).items()}
    named = {glob.escape(name): factor for name, factor in _by_first_name(whole, factors).items()}
    return replace(training, lr_scale=named)


def _by_first_name(model: nn.Module, values: Mapping[str, T]) -> dict[str, T]:
    """The values of parameters that the model has, by the first name of each parameter."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {first[id(parameters[name])]: value for name, value in values.items() if name in parameters}


def _surprising(record: LayerRecord) -> bool:
    if Reason.FASTER_IN_FLOAT.given_in(record.reason):
        return False
    return record.action == "refused" and record.reason != Reason.AS_ASKED
