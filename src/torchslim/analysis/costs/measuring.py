"""Measure what every choice of widths, schemes and blocks costs on the target: `measure_costs`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch import nn

from torchslim._version import __version__
from torchslim.allocation.problem import LATENCY, MACS, MEMORY_BYTES, PARAMS, SIZE_BYTES, Term
from torchslim.analysis.costs.bytes import memory_terms, size_terms
from torchslim.analysis.costs.fit import Fit, corrected, fit, predicted
from torchslim.analysis.costs.layout import Layout, layout_of
from torchslim.analysis.costs.programs import Choice, Maker, spread_choices
from torchslim.analysis.costs.samples import Sample, observed, shares
from torchslim.analysis.costs.sizes import Sizes, Work
from torchslim.analysis.costs.tables import CostTables, Space, latency_terms, sum_terms
from torchslim.analysis.costs.whole import fit_whole
from torchslim.artifact.latency import interleave, resized
from torchslim.core.arguments import checks_arguments
from torchslim.core.files import digest, present
from torchslim.core.hardware import cache_folder, describe_machine
from torchslim.core.isolation import preserved_globals, warn
from torchslim.core.measurement import THIS_MACHINE, Measurement
from torchslim.core.seals import read_sealed, write_sealed
from torchslim.core.step import Event, Inputs, Target, log_progress
from torchslim.errors import SensitivityError, StorageError
from torchslim.graph.export import capture
from torchslim.graph.layers import structure_of
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.latency.table import even_widths, programs
from torchslim.prune.structured.plan import Plan, analyze
from torchslim.prune.structured.selection import Amount
from torchslim.quantize.schemes import FLOAT
from torchslim.runtimes import Deployed
from torchslim.runtimes.kernel_times import PROFILERS, kernel_times

PROGRAMS, UNSPLIT = 12, 18
"""Programs of joint choices that are timed for each scheme, float included, with a profiler and without."""

FOLDS = 5
"""Parts of the programs, each of which is left out once to measure the spread."""

WIDTHS = 7
"""Approximate number of widths below the full one that a unit may take."""

ROUNDS, SECONDS = 200, 1.5
"""Rounds of each program and the reference in turn at most, and the time after which they end."""

UNDISTURBED = 0.1
"""Quantile of the rounds that counts: other programs only ever make a round slower."""

FORMAT = 3
"""Number of the format of the samples on disk."""


@checks_arguments(SensitivityError)
def measure_costs(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    target: Target | None = None,
    schemes: Sequence[str] = ("int8",),
    blocks: Mapping[str, Collection[str]] | None = None,
    amount: Amount | None = None,
    plan: Plan | None = None,
    dynamic_shapes: Any = "auto",
    widths: int = WIDTHS,
    programs: int | None = None,
    workdir: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[Event], None] = log_progress,
) -> CostTables:
    """Tables of the latency, bytes, MACs, parameters and memory of every choice of widths, schemes and blocks.

    A few whole programs of joint choices are compiled for the target and timed in turn with the float model. Where the
    runtime has a profiler (ONNX Runtime and OpenVINO have), it splits the time of each among the modules: their times
    are fitted by their work (MACs, weights and activations) for each way of computing, and the times of whole programs
    correct the sum. On other runtimes all modules of a kind are fitted together to the times of whole programs.

    Args:
        model: a float module; it is never modified.
        example_inputs: one sample a call is timed where the batch is free.
        target: the runtime and its threads.
        schemes: names of schemes that layers may take besides float.
        blocks: paths of the modules that go with each block that may be dropped, by the block's name.
        amount: the steps in which units narrow; its sparsity does not matter.
        plan: an analysis of the model, if there is one already.
        dynamic_shapes: as for `torchslim.deploy`.
        widths: approximate number of narrower widths for each unit.
        programs: number of programs that are timed; default: 12 for each scheme, float included, and 18 without
            a profiler.
        workdir: folder where timings are kept once they are measured; default: the cache folder of this machine.
        seed: of the joint choices.
        progress: called with an `Event` after every program.

    Raises:
        SensitivityError: an argument is out of range.
        PruneError, QuantizeError, ExportError: the model cannot be analyzed, quantized or captured.
    """
    subject = costs_subject(
        model,
        example_inputs,
        target=target,
        schemes=schemes,
        blocks=blocks,
        amount=amount,
        plan=plan,
        dynamic_shapes=dynamic_shapes,
        widths=widths,
        seed=seed,
    )
    return measure_subject(subject, programs=programs, workdir=workdir, seed=seed, progress=progress)


def costs_subject(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    target: Target | None = None,
    schemes: Sequence[str] = ("int8",),
    blocks: Mapping[str, Collection[str]] | None = None,
    amount: Amount | None = None,
    plan: Plan | None = None,
    dynamic_shapes: Any = "auto",
    widths: int = WIDTHS,
    seed: int = 0,
) -> Subject:
    """The model with its decisions, before anything is measured; arguments and errors are those of `measure_costs`."""
    if widths < 1:
        raise SensitivityError(f"widths must be at least 1, got {widths}")
    target, amount = target or Target(), amount or Amount(of="latency")
    plan = plan or analyze(model, example_inputs)
    with preserved_globals(seed):
        return Subject.of(plan, example_inputs, target, amount, schemes, blocks or {}, dynamic_shapes, widths)


def measure_subject(
    subject: Subject,
    *,
    programs: int | None = None,
    workdir: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[Event], None] = log_progress,
) -> CostTables:
    """The tables of a subject's decisions; arguments and errors are those of `measure_costs`."""
    if programs is not None and programs < 1:
        raise SensitivityError(f"programs must be at least 1, got {programs}")
    with preserved_globals(seed):
        samples, reference = measured(subject, programs, seed, workdir, progress)
    return tables(subject, samples, reference)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its decisions, and how its programs are made.

    Attributes:
        maker: makes programs.
        space: the decisions.
        sizes: of the model under any widths.
        works: work of each module.
        layout: what decides how modules compute.
        structure: digest of the model's program.
    """

    maker: Maker
    space: Space
    sizes: Sizes
    works: Mapping[str, Work]
    layout: Layout
    structure: str
    elements: Mapping[str, float] = field(default_factory=dict)  # of values alive where most are, by module

    @classmethod
    def of(
        cls,
        plan: Plan,
        inputs: Inputs,
        target: Target,
        amount: Amount,
        schemes: Sequence[str],
        blocks: Mapping[str, Collection[str]],
        dynamic_shapes: Any,
        widths: int,
    ) -> Subject:
        """The subject of a plan."""
        selection, _ = programs(plan, amount)
        maker = Maker(plan=plan, selection=selection, inputs=inputs, target=target, dynamic_shapes=dynamic_shapes)
        kept = [(unit.width, *even_widths(unit, selection, widths)) for unit in selection.coupling.units]
        sizes = Sizes(selection)
        works = sizes.works()
        program = capture(plan.model, inputs, dynamic_shapes).program
        space = Space(coupling=selection.coupling, kept=kept, schemes=maker.schemes(schemes), blocks=blocks)
        layout = layout_of(program, works, space.schemes)
        return cls(
            maker=maker, space=space, sizes=sizes, works=works, layout=layout, structure=digest(structure_of(program))
        )

    @property
    def widths(self) -> list[int]:
        """Full widths of the units."""
        return [unit.width for unit in self.coupling.units]

    @property
    def coupling(self) -> Coupling:
        """The units of coupled channels."""
        return self.space.coupling

    def choices(self, count: int | None, seed: int) -> list[Choice]:
        """The choices to measure; the first is the reference's: full widths in float."""
        if count is None:
            each = PROGRAMS if self.maker.target.runtime in PROFILERS else UNSPLIT
            count = each * len({FLOAT}.union(*self.space.schemes.values()))
        spread = spread_choices(self.space.kept, self.space.schemes, count, seed, self.ways)
        return [Choice(kept=tuple(self.widths)), *spread]

    def ways(self, schemes: Mapping[str, str]) -> set[Hashable]:
        """How modules compute and pass their values on under the schemes of layers."""
        contexts = {(path, self.layout.context(path, schemes)) for path in self.works}
        passes = {(station, frozenset(self.layout.passes(station, schemes).items())) for station in self.layout.readers}
        return contexts | passes


def measured(
    subject: Subject,
    count: int | None,
    seed: int,
    workdir: str | Path | None = None,
    progress: Callable[[Event], None] = lambda event: None,
) -> tuple[list[Sample], Measurement]:
    """Samples of a subject's programs, from disk or measured, and the reference's milliseconds."""
    choices = subject.choices(count, seed)
    shelf = Shelf.of(subject, workdir)
    reference: Deployed | None = None
    for number, choice in enumerate(choices):
        if key_of(choice) not in shelf.samples:
            if reference is None:
                model = subject.maker.model(choices[0])
                assert model is not None, "full widths need no surgery"
                reference = subject.maker.compile(model)
            if (pair := timed(subject, choice, reference)) is not None:
                shelf.add(choice, *pair)
        progress(Event(step="costs", phase="programs", current=number + 1, total=len(choices)))
    samples = [shelf.samples[key_of(choice)] for choice in choices if key_of(choice) in shelf.samples]
    return samples, shelf.reference()


def timed(subject: Subject, choice: Choice, reference: Deployed) -> tuple[Sample, float] | None:
    """The sample of a choice and the reference's milliseconds beside it; None if its widths cannot be built."""
    model = subject.maker.model(choice)
    if model is None:
        return None
    deployed = subject.maker.compile(model)
    ratio, reference_ms = compared(deployed, reference, subject.maker.target)
    kernels = kernel_times(deployed, resized(deployed))
    split = shares(kernels or (), subject.layout.owner, ratio)
    sample = Sample(
        choice=choice,
        ratio=ratio,
        size_bytes=deployed.size_bytes or 0,
        own=split.own,
        moves=split.moves,
        integer=split.integer,
    )
    return sample, reference_ms


def compared(deployed: Deployed, reference: Deployed, target: Target) -> tuple[float, float]:
    """The time of a program over the reference's, and the reference's milliseconds, from undisturbed rounds."""
    leaves, whole = resized(deployed), resized(reference)
    timings = interleave(
        {"reference": lambda: reference.run(whole), "program": lambda: deployed.run(leaves)},
        rounds=ROUNDS,
        seconds=SECONDS,
        clock=time.process_time if target.threads == 1 else time.perf_counter,
        settle=True,
    )
    undisturbed = {name: float(np.quantile(rounds, UNDISTURBED)) for name, rounds in timings.rounds.items()}
    return undisturbed["program"] / undisturbed["reference"], timings.latency("reference").value


def tables(subject: Subject, samples: Sequence[Sample], reference: Measurement) -> CostTables:
    """The tables that samples give."""
    subject = replace(subject, layout=observed(subject.layout, samples))
    fitted = fitted_to(samples, subject)
    ratios = [
        sample.ratio / predicted_ratio(partly, sample, subject)
        for fold in range(min(FOLDS, len(samples)))
        for partly in [fitted_to([s for place, s in enumerate(samples) if place % FOLDS != fold] or samples, subject)]
        for sample in samples[fold::FOLDS]
    ]
    space, sizes = subject.space, subject.sizes
    times = {
        end: latency_terms(space, subject.layout, subject.works, fitted, unit_ms=reference.value, upper=end == "upper")
        for end in ("median", "upper")
    }
    costs: dict[str, tuple[Term, ...]] = {
        LATENCY: times["median"],
        SIZE_BYTES: size_terms(space, sizes, samples),
        MACS: sum_terms(space, {path: work.macs for path, work in subject.works.items()}),
        PARAMS: sum_terms(space, sizes.weights()),
        MEMORY_BYTES: memory_terms(space, sizes, subject.works),
    }
    low, high = (float(value) for value in np.quantile(ratios, (0.1, 0.9)))
    return CostTables(
        space=space,
        decisions=space.decisions(),
        costs=costs,
        upper=times["upper"],
        reference=reference,
        spread=(low, high),
        programs=len(samples),
    )


def fitted_to(samples: Sequence[Sample], subject: Subject) -> Fit:
    """The times of all modules; those of whole programs alone decide if no program was split."""
    arguments = (samples, subject.works, subject.layout, subject.widths)
    if not any(sample.own for sample in samples):
        return fit_whole(*arguments)
    return corrected(fit(*arguments), *arguments)


def predicted_ratio(fitted: Fit, sample: Sample, subject: Subject) -> float:
    """The predicted time of a sample's choice over the reference's."""
    parts = predicted(fitted, sample, subject.works, subject.layout, subject.widths)
    return fitted.constant + sum(parts.values())


def key_of(choice: Choice) -> str:
    """Digest of a choice."""
    return digest(list(choice.kept), dict(choice.schemes))


@dataclass
class Shelf:
    """Samples on disk, written after every measurement.

    Args:
        path: file of the samples.
        key: everything that they depend on; a file with another key is measured anew, with a warning.
    """

    path: Path
    key: str
    samples: dict[str, Sample] = field(default_factory=dict)
    references: list[float] = field(default_factory=list)  # milliseconds of the reference beside each sample

    @classmethod
    def of(cls, subject: Subject, workdir: str | Path | None) -> Shelf:
        """The shelf of a subject on this machine, with what it holds."""
        target = subject.maker.target
        machine = describe_machine(target.threads)
        key = digest(
            __version__,
            FORMAT,
            subject.structure,
            subject.widths,
            {"runtime": target.runtime, "threads": target.threads, "shapes": repr(subject.maker.dynamic_shapes)},
            {name: machine[name] for name in ("processor", "instruction_set", "cores", "versions")},
        )
        folder = cache_folder() / "costs" if workdir is None else Path(workdir)
        shelf = cls(folder / f"costs-{key[:16]}.rows", key)
        shelf._read()
        return shelf

    def reference(self) -> Measurement:
        """Milliseconds of the reference over all samples."""
        low, high = np.quantile(self.references, (0.1, 0.9))
        value, rounds = median(self.references), len(self.references)
        return Measurement(value=value, unit="ms", p10=float(low), p90=float(high), rounds=rounds, machine=THIS_MACHINE)

    def add(self, choice: Choice, sample: Sample, reference_ms: float) -> None:
        """Store a sample."""
        self.samples[key_of(choice)] = sample
        self.references.append(reference_ms)
        content = {"samples": [sample.to_dict() for sample in self.samples.values()], "references": self.references}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(self.path, json.dumps(content, allow_nan=False).encode(), self.key)

    def _read(self) -> None:
        if not present(self.path):
            return
        try:
            content = json.loads(read_sealed(self.path, self.key))
        except StorageError as error:
            warn(f"{error}; the costs are measured again")
            return
        stored: Iterator[Sample] = map(Sample.from_dict, content["samples"])
        self.samples = {key_of(sample.choice): sample for sample in stored}
        self.references = [float(value) for value in content["references"]]
