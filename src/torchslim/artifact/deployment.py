"""Deploy a model and compare it with its graph; layers that the runtime computes wrongly go back to float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.artifact.assembled import AnyDeployed, DeployedParts
from torchslim.core.arguments import checks_arguments
from torchslim.core.isolation import warn
from torchslim.core.part_calls import recorded_calls
from torchslim.core.parts import WHOLE, part_views, parts_of, select_parts
from torchslim.core.program_names import first_programs, split_name
from torchslim.core.step import Inputs, LayerRecord
from torchslim.core.tensor_objects import of_structure, structure_of
from torchslim.core.usable import usable
from torchslim.errors import DeployError, ExportError
from torchslim.graph.calling import examples_of
from torchslim.graph.capturable import examples_of_programs, parts_named
from torchslim.quantize import Checks, QuantizedModule
from torchslim.quantize.checks import Fault, apart, faults
from torchslim.quantize.conversion import integers
from torchslim.quantize.rollback import BROKEN, Evidence, Released, concluded, graph_of, search
from torchslim.quantize.samples import Run, float_outputs, outputs, part, samples_in
from torchslim.runtimes import Deployed, find_runtime

NOTE = 500  # characters
NEAR = 1e-3  # of the largest value: allowed difference between two runs of one program on one machine
Compile = Callable[[nn.Module], Deployed]
Outputs = Sequence[Sequence[Tensor]]


@checks_arguments(DeployError)
def deploy(
    model: nn.Module,
    example_inputs: Inputs | list[Inputs],
    *,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    dynamic_shapes: Any = "auto",
    checks: Checks | Mapping[str, float] | None = None,
    part: str | Sequence[str] | None = None,
) -> AnyDeployed:
    """Compile `model` for a runtime; the result is called like the model and returns like the model.

    A model that `ts.quantize` made is compared with its graph, on the samples of its own checks. Layers that the
    runtime computes differently go back to float, with a warning; `deployed.records` lists them with the reasons.

    Args:
        model: a module, quantized or not; never modified.
        example_inputs: a tuple of positional or a dict of keyword arguments, or for `dynamic_shapes="auto"` a list of
            these, whose sizes span those of later calls.
        runtime: one of `ts.runtimes.RUNTIMES`.
        threads: number of threads of this deployment only; None leaves it to the runtime.
        dynamic_shapes: "batch" leaves the batch dimension free, "auto" also every size that differs between the
            examples, such as the length of padded sentences; None fixes all sizes; or a torch.export spec.
        checks: thresholds; None takes those that the model was quantized with.
        part: names or globs of submodules to compile, while the code around them stays in Python: detectors'
            post-processing, loops that generate, branches on data. Their example inputs are recorded while the model
            runs on `example_inputs`. None compiles the whole model, or the quantized parts of a model that has some.

    Raises:
        ExportError: the model cannot be captured; names the line of its code.
        RuntimeUnavailable: a package or compiler is missing; says what to install.
        DeployError: the runtime computes something else than the model, whichever layers are in float.
    """
    model = usable(model, DeployError)
    paths = parts_of(model) if part is None else select_parts(model, part)
    calls: dict[str, list[Inputs]] = {}
    if paths == (WHOLE,):
        modules, examples = {WHOLE: model}, {WHOLE: example_inputs}
    else:
        calls = examples_of_programs(model, recorded_calls(model, paths, examples_of(example_inputs)))
        modules = part_views(model, calls)
        examples = {name: of_structure(own, own[0]) for name, own in calls.items()}

    def deployed_one(name: str, inner: nn.Module) -> Deployed:
        def compile_(module: nn.Module) -> Deployed:
            return find_runtime(runtime).compile(module, examples[name], dynamic_shapes, threads)

        with parts_named(model, example_inputs) if name == WHOLE else nullcontext():
            made = verified(inner, compile_, checks=Checks.of(checks))
        for note in new_notes(inner, made):
            warn(note)
        return made

    deployed = deploy_programs(modules, calls, deployed_one)
    if WHOLE in deployed:
        return deployed[WHOLE]
    return DeployedParts(model, deployed, examples_of(example_inputs)[0], calls)


def deploy_programs(
    programs: Mapping[str, nn.Module],
    examples: Mapping[str, Sequence[Inputs]],
    deploy_one: Callable[[str, nn.Module], Deployed],
) -> dict[str, Deployed]:
    """The programs of parts, deployed by `deploy_one`, with a note where calls of other structures run in Python.

    A part's first program must be deployed. A further one that the runtime does not take is left to Python.

    Args:
        programs: the modules or graphs by name; "" for a whole model.
        examples: the calls of the parts, of all structures, and of their further programs.
        deploy_one: called with a name and its module.
    """
    deployed: dict[str, Deployed] = {}
    failures: dict[str, str] = {}
    for name, program in programs.items():
        path, number = split_name(name)
        try:
            deployed[name] = deploy_one(name, program)
        except (DeployError, ExportError) as error:
            if number == 1:
                raise
            failures[path] = str(error)
    for path in first_programs(deployed):
        count = len({structure_of(inputs) for inputs in examples.get(path, ())})
        others = count - sum(split_name(name)[0] == path for name in deployed)
        if others > 0:
            why = f" ({failures[path]})" if path in failures else ""
            what = "another structure" if others == 1 else f"{others} other structures"
            deployed[path].spec.notes.append(f"calls with arguments of {what} run in PyTorch, in float{why}"[:NOTE])
    return deployed


def verified(
    model: nn.Module, compile_: Compile, *, checks: Checks | None = None, reload: Compile | None = None
) -> Deployed:
    """The deployed model, with as many layers in float as needed to compute what its graph computes.

    Args:
        model: checked if it carries its evidence.
        compile_: deploys a model.
        checks: thresholds; None takes those that the model was quantized with.
        reload: deploys a model, saves it, and reads it back; its result is checked in place of the deployed model.

    Raises:
        DeployError: the checks fail with every set of float layers that was tried.
    """
    deployed = compile_(model)
    if not isinstance(model, QuantizedModule):
        return deployed
    deployed.records = list(model.records)
    if model.evidence is None:
        return deployed
    evidence = model.evidence if checks is None else replace(model.evidence, checks=checks)
    basis = _Given.of(evidence, model, deployed)
    flaws = basis.off(basis.graph, deployed if reload is None else reload(model))
    return deployed if not flaws else _repaired(model, basis, compile_, reload or compile_, flaws, deployed.runtime)


def off(model: nn.Module, deployed: Deployed) -> list[Fault]:
    """Faults of a deployed model against the quantized model that it was made from."""
    if not isinstance(model, QuantizedModule) or model.evidence is None:
        return []
    basis = _Given.of(model.evidence, model, deployed)
    return basis.off(basis.graph, deployed)


def alike(deployed: Deployed, loaded: Deployed) -> bool:
    """Whether two deployed models give nearly the same outputs on the example of the first."""
    outputs, reloaded = deployed.run(list(deployed.example)), loaded.run(list(deployed.example))
    return len(outputs) == len(reloaded) and all(
        one.shape == other.shape
        and torch.allclose(
            one.double(),
            other.double(),
            rtol=0,
            equal_nan=True,
            atol=NEAR * float(one.double().nan_to_num(0, 0, 0).abs().max() if one.numel() else 0),
        )
        for one, other in zip(outputs, reloaded, strict=True)
    )


def new_notes(model: nn.Module, deployed: Deployed) -> list[str]:
    """Notes on the layers that went back to float when `model` was deployed."""
    made = deployed.made_from
    if not isinstance(made, QuantizedModule) or not isinstance(model, QuantizedModule):
        return []
    return [note for note in made.notes if note not in model.notes]


def merged(layers: Sequence[LayerRecord], deployed: AnyDeployed) -> list[LayerRecord]:
    """Records of a step, updated with the layers that went back to float when its model was deployed."""
    if deployed.made_from is None:
        return list(layers)
    latest = {record.layer: record for record in deployed.records if record.action == "refused"}
    updated = [latest.get(layer.layer, layer) if layer.action == "quantized" else layer for layer in layers]
    names = {layer.layer for layer in layers}
    return updated + [record for name, record in latest.items() if name not in names]


class UnverifiedDeployment(DeployError):
    """The deployed model fails its checks, which depend on the weights: another training may mend that."""


@dataclass(frozen=True, kw_only=True)
class _Given:
    """Inputs and reference outputs that a deployed model is compared on, from the evidence as far as sizes allow."""

    evidence: Evidence
    runs: Sequence[Run]
    reference: Outputs
    trained: Outputs
    graph: Outputs

    @classmethod
    def of(cls, evidence: Evidence, model: QuantizedModule, deployed: Deployed) -> _Given:
        """The evidence's runs if they fit a deployed model, else slices that fit, else its example."""
        if all(map(deployed.spec.fits, evidence.runs)):
            return cls(
                evidence=evidence,
                runs=evidence.runs,
                reference=evidence.reference,
                trained=evidence.trained,
                graph=evidence.graph,
            )
        if sliced := _sliced(evidence, deployed):
            return sliced
        runs = [list(deployed.example)]
        reference = float_outputs(evidence.program, runs)
        trained = outputs(evidence.program, runs, False, False) if evidence.prepared.qat else reference
        return cls(
            evidence=evidence, runs=runs, reference=reference, trained=trained, graph=outputs(graph_of(model), runs)
        )

    def off(self, graph: Outputs, deployed: Deployed) -> list[Fault]:
        """Faults of a deployed model against its graph."""
        answers = [deployed.run(list(run)) for run in self.runs]
        axes, checks = self.evidence.prepared.output_axes, self.evidence.checks
        already = {(fault.kind, fault.place) for fault in faults(self.reference, graph, axes, checks)}
        broken = [
            fault
            for fault in faults(self.reference, answers, axes, checks)
            if fault.kind in BROKEN and (fault.kind, fault.place) not in already
        ]
        return broken + apart(self.trained, graph, answers, axes, checks)


def _sliced(evidence: Evidence, deployed: Deployed) -> _Given | None:
    """Two slices of the evidence's runs, of the fixed batch size and different samples; None if sizes do not fit."""
    input_axes, output_axes = evidence.prepared.samples.axes, evidence.prepared.output_axes
    pairs = zip(deployed.spec.sizes, input_axes, strict=True)
    counts = {sizes[axis] for sizes, axis in pairs if axis is not None and len(sizes) > axis}
    count = counts.pop() if len(counts) == 1 else None
    if count is None or None in output_axes:
        return None
    runs = evidence.runs
    starts = [(0, 0), (1, 0)] if len(runs) > 1 else [(0, 0), (0, samples_in(runs[0], input_axes) // 2)]

    def cut(several: Outputs, axes: Sequence[int | None]) -> list[list[Tensor]]:
        return [part(list(several[run]), axes, start, count) for run, start in starts]

    chosen = cut(runs, input_axes)
    if not all(map(deployed.spec.fits, chosen)):
        return None
    return _Given(
        evidence=evidence,
        runs=chosen,
        reference=cut(evidence.reference, output_axes),
        trained=cut(evidence.trained, output_axes),
        graph=cut(evidence.graph, output_axes),
    )


def _repaired(
    model: QuantizedModule, basis: _Given, compile_: Compile, check: Compile, failures: Sequence[Fault], runtime: str
) -> Deployed:
    """The model, deployed with the layers in float that the checks need."""
    evidence = basis.evidence

    def look(released: Released) -> Sequence[Fault]:
        made = integers(evidence.prepared, released)
        graph = outputs(graph_of(made), basis.runs)
        axes, checks = evidence.prepared.output_axes, evidence.checks
        lost = [fault for fault in faults(basis.reference, graph, axes, checks) if fault.kind in BROKEN]
        return lost or basis.off(graph, check(made))

    if everything := look(frozenset(unit.key for unit in evidence.units)):
        raise DeployError(
            f"runtime {runtime!r} computes something else than the model, with all layers in float: "
            f"{everything[0].told(evidence.names)}; use another runtime"
        )
    reasons = search(evidence.units, look, failures, evidence.names, known=evidence.released, where=f" on {runtime}")
    if reasons is None:
        raise UnverifiedDeployment(
            f"the model deployed on {runtime!r} cannot be verified: {failures[0].told(evidence.names)}, "
            "whichever layers stay in float; use another runtime, or pass checks with other thresholds"
        )
    made = integers(evidence.prepared, frozenset(reasons))
    concluded(made, evidence, outputs(graph_of(made), evidence.runs), reasons)
    deployed = compile_(made)
    deployed.made_from, deployed.records = made, list(made.records)
    deployed.spec.notes.extend(new_notes(model, deployed))
    return deployed
