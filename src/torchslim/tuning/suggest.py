"""Derive a recipe to search from the model's layers, the machine's integer kernels and the task's training data."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchslim.core.arguments import checks_arguments
from torchslim.core.batches import call, take_first
from torchslim.core.budget import Budget
from torchslim.core.isolation import untouched
from torchslim.core.parts import part_views, select_parts
from torchslim.core.program_names import first_programs
from torchslim.core.step import Inputs
from torchslim.core.task import Task
from torchslim.core.tensor_objects import of_structure
from torchslim.core.toml_writer import dumps
from torchslim.core.trees import device_of, to_device
from torchslim.core.usable import usable
from torchslim.errors import RecipeError, TaskError, TorchslimError
from torchslim.graph.capturable import parts_named
from torchslim.graph.export import capture
from torchslim.graph.layers import Layer, layers_of, multiplies
from torchslim.prune.structured.inspection import inspect
from torchslim.prune.structured.selection import Amount
from torchslim.quantize.backend_profiles import PROFILES
from torchslim.quantize.schemes import INTEGER_RUNTIMES, SCHEMES
from torchslim.runtimes import find_runtime
from torchslim.training.batch_norm import tracked
from torchslim.training.calibration import part_examples
from torchslim.training.loaders import first_batch
from torchslim.tuning.pilot import Pilot, pilot
from torchslim.tuning.proposals import Proposal, prune_step, quantize_step, training_step
from torchslim.tuning.suggestion_text import (
    SHOWN,
    Document,
    Mix,
    Schooling,
    about_machine,
    about_model,
    combined,
    therefore,
    tried,
    written,
)

NAMES: Mapping[str, str] = {"model": "your.package:model", "task": "your.package:task"}
PACKAGES: Mapping[str, tuple[str, ...]] = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}
LINEAR = ("addmm", "mm", "matmul", "bmm", "baddbmm")  # linear layers if one factor is a stored weight
UPDATES = 1000  # weight updates that a training should make, within the limits of `EPOCHS`
EPOCHS = (3, 10)  # fewest and most epochs of a training


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A recipe with ranges, and the reasons for it.

    Attributes:
        document: the recipe as `tomllib` parses it; `ts.search` and `torchslim search` take it.
        reasons: lines about the model's layers, the integer kernels of the runtimes, and the searched steps; then one
            for each pilot.
        pilots: what plain rounding gained and lost on each runtime; empty where it was not measured.
    """

    document: Document
    reasons: tuple[str, ...]
    pilots: tuple[Pilot, ...] = ()

    @property
    def toml(self) -> str:
        """The recipe as TOML, with the reasons as comments."""
        return "".join(f"# {line}\n" for line in self.reasons) + "\n" + dumps(self.document)

    def __str__(self) -> str:
        return self.toml


@checks_arguments(RecipeError)
def suggest(
    model: nn.Module,
    task: Task,
    budget: Budget | None = None,
    *,
    runtime: str | None = None,
    names: Mapping[str, str] | None = None,
    example_inputs: Inputs | None = None,
    part: str | Sequence[str] | None = None,
    measure: bool = True,
) -> Suggestion:
    """Derive a recipe with ranges: which steps can help a model on this machine, and how far each may go.

    The model is captured and its channels are analyzed; nothing is trained. If the latency counts, a pilot on every
    runtime measures what plain 8-bit rounding gains in time and loses in the metric, and the reasons say where no gain
    is to be expected. `docs/design/010-suggest.md` has the rules.

    Args:
        model: a trained module; it is never modified.
        task: training data and labels decide how the model can be trained after pruning.
        budget: bounds and objectives; default: `Budget()`.
        runtime: where the result will run; default: the installed runtimes are part of the search.
        names: the "model" and the "task" of the recipe file: "package.module:callable".
        example_inputs: default: the inputs of the first validation batch.
        part: names or globs of submodules, for a recipe that changes them alone, as for `compress`.
        measure: False leaves out the pilots, which take seconds to minutes.

    Raises:
        TorchslimError: the model cannot be captured, the task has no batches, or no step could help.
    """
    model = usable(model)
    budget = budget or Budget()
    runtimes = installed(speed="latency" in budget.figures) if runtime is None else (runtime,)
    for name in runtimes:
        find_runtime(name)
    if not any(True for _ in model.parameters()):
        raise TaskError(f"the model ({type(model).__name__}) has no parameters; there is nothing to compress")
    first_batch = take_first(task.val, "val")
    inputs: Any = task.inputs(first_batch) if example_inputs is None else example_inputs
    mix = _mix_of_parts(model, task, part, inputs, runtimes)
    schooling = _schooling(model, task, inputs)
    steps, lines, omissions = _steps(mix, schooling, budget, runtimes)
    pilots = pilots_of(model, task, steps, budget, runtimes, part, example_inputs) if measure else ()
    if pilots and not any(run.faster or run.failure for run in pilots) and len(steps) > 1:
        steps[-1]["skip"] = {"search": [False, True]}  # pruning alone may be faster
    document: Document = {
        **{key: {**NAMES, **dict(names or {})}[key] for key in NAMES},
        "runtime": runtimes[0] if len(runtimes) == 1 else {"search": list(runtimes)},
        **({} if part is None else {"part": part if isinstance(part, str) else list(part)}),
        "budget": written(budget),
        "step": steps,
    }
    reasons = (about_model(mix, schooling), about_machine(mix, runtimes), therefore(lines, omissions))
    lines_of_pilots = (tried(run, task.as_metric(), budget, steps[-1]) for run in pilots)
    return Suggestion(document=document, reasons=(*reasons, *lines_of_pilots), pilots=pilots)


def pilots_of(
    model: nn.Module,
    task: Task,
    steps: Sequence[Document],
    budget: Budget,
    runtimes: Sequence[str],
    part: str | Sequence[str] | None,
    example_inputs: Inputs | None,
) -> tuple[Pilot, ...]:
    """A pilot of the first scheme of the recipe on every runtime; none where no scheme computes on integers."""
    last = steps[-1]
    if last["do"] != "quantize" or "latency" not in budget.figures:
        return ()
    scheme = last["scheme"] if isinstance(last["scheme"], str) else last["scheme"]["search"][0]
    if SCHEMES[scheme].activations == "float":
        return ()  # the recipe's line says that it saves no time
    layers = {} if last.get("layers") == "auto" else last.get("layers", {})
    return tuple(
        pilot(model, task, scheme, layers, name, part=part, example_inputs=example_inputs) for name in runtimes
    )


def _steps(
    mix: Mix, schooling: Schooling, budget: Budget, runtimes: Sequence[str]
) -> tuple[list[Document], list[str], list[str]]:
    """Steps of the recipe, their lines in the reasons, and the reasons for the steps that are left out.

    Raises:
        RecipeError: no step could help.
    """
    pruning = prune_step(mix, schooling, budget)
    training = training_step(mix, schooling)
    if pruning.table is None and training.table is not None:
        training = Proposal()  # training only repairs the damage of pruning; it needs no mention without it
    proposals = [pruning, training, quantize_step(mix, schooling, budget, runtimes)]
    chosen = [proposal for proposal in proposals if proposal.table]
    omissions = [proposal.omission for proposal in proposals if not proposal.table and proposal.omission]
    if not chosen:
        raise RecipeError(f"no step could help this model within this budget: {'; '.join(omissions)}")
    return [proposal.table for proposal in chosen if proposal.table], [proposal.line for proposal in chosen], omissions


def installed(*, speed: bool = True) -> tuple[str, ...]:
    """Installed runtimes that can save an artifact; only the first of them if `speed` is False.

    Nothing is imported. Without ONNX Runtime and OpenVINO: "aoti" if there is a C++ compiler, or else "eager".
    """
    runtimes = tuple(
        name for name, packages in PACKAGES.items() if all(importlib.util.find_spec(package) for package in packages)
    )
    if not runtimes:
        runtimes = ("aoti",) if any(map(shutil.which, ("g++", "clang++"))) else ("eager",)
    return runtimes if speed else runtimes[:1]


def _mix_of_parts(
    model: nn.Module, task: Task, part: str | Sequence[str] | None, inputs: Inputs, runtimes: Sequence[str]
) -> Mix:
    """Composition of the model, or of its parts as the task's metric calls them."""
    if part is None:
        with parts_named(model, inputs):
            return _mix(model, inputs, runtimes)
    examples = part_examples(model, task, select_parts(model, part))
    views = part_views(model, {path: examples[path] for path in first_programs(examples)})
    return combined(
        [_mix(view, of_structure(examples[path][:1], examples[path][0])[0], runtimes) for path, view in views.items()]
    )


def _mix(model: nn.Module, inputs: Inputs, runtimes: Sequence[str]) -> Mix:
    """Composition of the model, from one capture and one trace of its channels."""
    captured = capture(model, inputs)
    layers = layers_of(captured.program, captured.batch_axis)
    nodes = [node for node in captured.program.graph.nodes if multiplies(node)]
    kinds = [_kind(layer, node) for layer, node in zip(layers, nodes, strict=True)]
    macs = sum(layer.macs for layer in layers)
    if not macs:
        raise RecipeError("the model has no layer that multiplies by weights: there is nothing to compress")
    weights = {id(parameter): parameter for parameter in model.parameters()}.values()
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = sum(weight.numel() for weight in weights)
    removable, smallest, stays = _removable(model, inputs)
    return Mix(
        shares={
            name: sum(layer.macs for layer, kind in zip(layers, kinds, strict=True) if kind == name) / macs
            for name in SHOWN
        },
        counts=Counter(kinds),
        operations=frozenset(layer.operation for layer in layers),
        macs=macs,
        parameters=parameters,
        size_mb=sum(weight.numel() * weight.element_size() for weight in weights) / 1e6,
        runs={
            name: {
                scheme: sum(layer.macs for layer in layers if _on_integers(layer, name, scheme)) / macs
                for scheme in SCHEMES
            }
            for name in runtimes
        },
        removable=removable,
        smallest=smallest,
        stays=stays,
        tables=sum(table.numel() for table in tables.values()) / parameters,
        recalibrates=bool(tracked(model)),
    )


def _kind(layer: Layer, node: Any) -> str:
    """Kind of a layer, a key of `SHOWN`."""
    if layer.operation in ("lstm", "gru"):
        return "recurrent"
    if layer.operation.startswith("conv"):
        source, weight = (argument.meta["val"].shape for argument in node.args[:2])
        depthwise = "transpose" not in layer.operation and weight[1] == 1 and source[1] > 1
        return "depthwise" if depthwise else "convolution"
    return "linear" if layer.weight_bits else "attention"


def _on_integers(layer: Layer, runtime: str, scheme: str) -> bool:
    """Whether the runtime has an integer kernel for the layer, quantized with the scheme."""
    profile, activations = PROFILES[runtime], SCHEMES[scheme].activations
    if activations == "float":
        return False
    if not layer.weight_bits and layer.operation not in ("lstm", "gru"):
        return profile.products and activations == "static"
    operation = "linear" if layer.operation in LINEAR else layer.operation
    if activations == "static":  # eager computes static schemes on dequantized floats
        return runtime in INTEGER_RUNTIMES and operation in profile.static
    return operation in profile.dynamic


def _removable(model: nn.Module, inputs: Inputs) -> tuple[dict[str, float], dict[str, float], str]:
    """Fractions of MACs and parameters: of all removable channels, and of the fewest that a step removes.

    The text says why no channel is removable; it is empty if some are.
    """
    try:
        structure = inspect(model, inputs)
    except TorchslimError as error:
        return {"macs": 0.0, "params": 0.0}, {}, str(error)
    parts = {group: part for group in structure.groups if group.prunable and (part := _part(group.width))}
    macs = sum(part * group.macs for group, part in parts.items())
    parameters = sum(part * group.parameters for group, part in parts.items())
    shares = {  # upper limits: a weight between two groups counts for both
        "macs": min(1.0, macs / max(structure.macs, 1)),
        "params": min(1.0, parameters / max(structure.parameters, 1)),
    }
    if parts:
        fewest = {group: min(part, Amount().round_to / group.width) for group, part in parts.items()}
        smallest = {
            "macs": min(part * group.macs for group, part in fewest.items()) / max(structure.macs, 1),
            "params": min(part * group.parameters for group, part in fewest.items()) / max(structure.parameters, 1),
        }
        return shares, smallest, ""
    if any(group.prunable for group in structure.groups):
        return shares, {}, f"none is wider than the {Amount().min_channels} that must stay"
    reasons = Counter(group.reason for group in structure.groups if group.reason and not group.extent)
    return shares, {}, reasons.most_common(1)[0][0] if reasons else "it has none between layers"


def _part(width: int) -> float:
    """Fraction of a group's channels that can be removed, by the defaults of `Amount`."""
    min_channels = Amount().min_channels
    return 1 - (min_channels if width >= min_channels else 1) / width


def _schooling(model: nn.Module, task: Task, inputs: Inputs) -> Schooling:
    """How the task can train the model: by distillation if the outputs have logits, else on labels, or not at all."""
    if task.train is None:
        return Schooling(table=None, epochs=0, about="the task has no training data")
    batch = first_batch(task)
    with untouched(model):
        outputs = call(model, to_device(inputs, device_of(model)))
        try:
            logits = task.logits(outputs)
        except TaskError:
            logits = None
    target = task.target(batch)
    labeled = task.loss is not None or isinstance(target, Tensor)
    epochs = min(max(math.ceil(UPDATES / _length(task.train)), EPOCHS[0]), EPOCHS[1])
    if logits is not None:
        classes = isinstance(target, Tensor) and not target.is_floating_point() and logits.dim() == target.dim() + 1
        response = {"do": "kd", "temperature": 4.0, "alpha": 0.9} if classes else {"do": "mse"}
        table: Document = {"do": "distill", "response": response} | ({} if labeled else {"label_weight": 0.0})
        return Schooling(table=table, epochs=epochs, about=f"training data {'with' if labeled else 'without'} labels")
    if labeled:
        return Schooling(table={"do": "finetune"}, epochs=epochs, about="training data, outputs that only labels teach")
    return Schooling(table=None, epochs=0, about="training data without labels, and outputs that no teacher can teach")


def _length(batches: Any) -> int:
    """Number of batches; `UPDATES`, which gives the fewest epochs, for a loader without a length."""
    try:
        return max(len(batches), 1)
    except TypeError:
        return UPDATES
