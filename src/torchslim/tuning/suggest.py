"""A recipe to search, from what a model is made of, what this machine does fast, and what the task allows."""

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
from torchslim.core.hardware import saturates
from torchslim.core.isolation import untouched
from torchslim.core.step import Inputs
from torchslim.core.task import Task
from torchslim.core.toml_writer import dumps
from torchslim.core.trees import device_of, to_device
from torchslim.core.usable import usable
from torchslim.errors import RecipeError, TaskError, TorchslimError
from torchslim.graph.export import capture
from torchslim.graph.layers import Layer, layers_of, multiplies
from torchslim.prune.structured.inspection import inspect
from torchslim.prune.structured.selection import Amount
from torchslim.quantize.backend_profiles import PROFILES
from torchslim.quantize.schemes import INTEGER_RUNTIMES, SCHEMES
from torchslim.runtimes import find_runtime
from torchslim.training.batch_norm import tracked
from torchslim.training.loaders import first_batch
from torchslim.tuning.suggestion_text import (
    SHOWN,
    Document,
    Mix,
    Schooling,
    about_machine,
    about_model,
    down,
    therefore,
    words,
    written,
)

NAMES: Mapping[str, str] = {"model": "your.package:model", "task": "your.package:task"}
PACKAGES: Mapping[str, tuple[str, ...]] = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}
LINEAR = ("addmm", "mm", "matmul", "bmm", "baddbmm")  # with a stored weight they are linear layers
MOST = 0.5  # of the MACs must run on integers somewhere for a scheme to be worth a trial
WORTH_PRUNING = 0.15  # of the model must be in what may go
MANY_DEPTHWISE = 0.03  # of the MACs; their share of the time is several times as large
UPDATES = 1000  # of the weights that a training is worth, as far as its epochs go
EPOCHS = (3, 10)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A recipe with ranges, and why.

    Attributes:
        document: as `tomllib` gives it; `ts.search` and `torchslim search` take it.
        reasons: three lines: what the model is made of, what is fast here, and what is therefore searched.
    """

    document: Document
    reasons: tuple[str, str, str]

    @property
    def toml(self) -> str:
        """The recipe as text, the reasons as comments."""
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
) -> Suggestion:
    """A recipe with ranges for a model: which steps can help it here, and how far each may go.

    The model is captured and its channels are looked at; nothing is trained or timed. `docs/design/010-suggest.md` has
    the rules.

    Args:
        model: a trained module; it is left as it was.
        task: whether it has training data and labels decides what can be mended after a cut.
        budget: what is bounded and what is to be small.
        runtime: where the result will run; by default those that are installed are part of the search.
        names: how a recipe file names the "model" and the "task": "package.module:callable".
        example_inputs: by default the inputs of the first validation batch.

    Raises:
        TorchslimError: the model cannot be captured, the task has no batches, or nothing here could help.
    """
    model = usable(model)
    budget = budget or Budget()
    runtimes = installed(speed="latency" in budget.figures) if runtime is None else (runtime,)
    for each in runtimes:
        find_runtime(each)
    if not any(True for _ in model.parameters()):
        raise TaskError(f"the model ({type(model).__name__}) has no parameters; there is nothing to compress")
    first = take_first(task.val, "val")
    inputs: Any = task.inputs(first) if example_inputs is None else example_inputs
    mix = _mixed(model, inputs, runtimes)
    schooling = _schooling(model, task, inputs)
    steps: list[Document] = []
    told: list[str] = []
    left: list[str] = []
    for table, what, without in (
        _pruning(mix, schooling, budget),
        _teaching(mix, schooling),
        _quantization(mix, schooling, budget, runtimes),
    ):
        if table:
            if table["do"] == "distill" and not steps:  # it mends what a cut has broken, and nothing was cut
                continue
            if table["do"] == "finetune" and not steps:
                continue
            steps.append(table)
            told.append(what)
        elif without:
            left.append(without)
    if not steps:
        raise RecipeError(f"no step could help this model within this budget: {'; '.join(left)}")
    document: Document = {
        **{key: {**NAMES, **dict(names or {})}[key] for key in NAMES},
        "runtime": runtimes[0] if len(runtimes) == 1 else {"search": list(runtimes)},
        "budget": written(budget),
        "step": steps,
    }
    reasons = (about_model(mix, schooling), about_machine(mix, runtimes), therefore(told, left))
    return Suggestion(document=document, reasons=reasons)


def installed(*, speed: bool = True) -> tuple[str, ...]:
    """The runtimes of this environment that save what ships; without `speed` one of them is enough.

    Nothing is imported. Where neither ONNX Runtime nor OpenVINO is there, AOTInductor if there is a compiler, or eager.
    """
    found = tuple(name for name, needed in PACKAGES.items() if all(importlib.util.find_spec(each) for each in needed))
    if not found:
        found = ("aoti",) if any(map(shutil.which, ("g++", "clang++"))) else ("eager",)
    return found if speed else found[:1]


def _mixed(model: nn.Module, inputs: Inputs, runtimes: Sequence[str]) -> Mix:
    captured = capture(model, inputs)
    layers = layers_of(captured.program, captured.batch_axis)
    nodes = [node for node in captured.program.graph.nodes if multiplies(node)]
    kinds = [_kind(layer, node) for layer, node in zip(layers, nodes, strict=True)]
    macs = sum(layer.macs for layer in layers)
    if not macs:
        raise RecipeError("the model has no layer that multiplies by weights: there is nothing to compress")
    weights = {id(parameter): parameter for parameter in model.parameters()}.values()
    removable, stays = _removable(model, inputs)
    return Mix(
        shares={
            name: sum(layer.macs for layer, kind in zip(layers, kinds, strict=True) if kind == name) / macs
            for name in SHOWN
        },
        counts=Counter(kinds),
        operations=frozenset(layer.operation for layer in layers),
        macs=macs,
        parameters=sum(weight.numel() for weight in weights),
        size_mb=sum(weight.numel() * weight.element_size() for weight in weights) / 1e6,
        runs={
            name: {
                scheme: sum(layer.macs for layer in layers if _on_integers(layer, name, scheme)) / macs
                for scheme in SCHEMES
            }
            for name in runtimes
        },
        removable=removable,
        stays=stays,
        recalibrates=bool(tracked(model)),
    )


def _kind(layer: Layer, node: Any) -> str:
    if layer.operation in ("lstm", "gru"):
        return "recurrent"
    if layer.operation.startswith("conv"):
        source, weight = (argument.meta["val"].shape for argument in node.args[:2])
        alone = "transpose" not in layer.operation and weight[1] == 1 and source[1] > 1
        return "depthwise" if alone else "convolution"
    return "linear" if layer.weight_bits else "attention"


def _on_integers(layer: Layer, runtime: str, scheme: str) -> bool:
    """Has the runtime an integer kernel for a layer that is quantized so?"""
    profile, activations = PROFILES[runtime], SCHEMES[scheme].activations
    if activations == "float":
        return False
    if not layer.weight_bits and layer.operation not in ("lstm", "gru"):
        return profile.products and activations == "static"
    operation = "linear" if layer.operation in LINEAR else layer.operation
    if activations == "static":  # eager computes it on dequantized floats
        return runtime in INTEGER_RUNTIMES and operation in profile.static
    return operation in profile.dynamic


def _removable(model: nn.Module, inputs: Inputs) -> tuple[dict[str, float], str]:
    """The part of MACs and parameters that goes with all channels that may go, and why it is nothing."""
    try:
        found = inspect(model, inputs)
    except TorchslimError as error:
        return {"macs": 0.0, "params": 0.0}, str(error)
    groups = {group: part for group in found.groups if group.prunable and (part := _part(group.width))}
    shares = {  # a weight between two groups counts for both, so this is the most that it may come to
        "macs": min(1.0, sum(part * each.macs for each, part in groups.items()) / max(found.macs, 1)),
        "params": min(1.0, sum(part * each.parameters for each, part in groups.items()) / max(found.parameters, 1)),
    }
    if groups:
        return shares, ""
    if any(group.prunable for group in found.groups):
        return shares, f"none is wider than the {Amount().min_channels} that must stay"
    reasons = Counter(group.reason for group in found.groups if group.reason and not group.extent)
    return shares, reasons.most_common(1)[0][0] if reasons else "it has none between layers"


def _part(width: int) -> float:
    """How much of a group may go, by the defaults of the pruning step."""
    least = Amount().min_channels
    return 1 - (least if width >= least else 1) / width


def _schooling(model: nn.Module, task: Task, inputs: Inputs) -> Schooling:
    if task.train is None:
        return Schooling(table=None, epochs=0, about="the task has no training data")
    first = first_batch(task)
    with untouched(model):
        outputs = call(model, to_device(inputs, device_of(model)))
        try:
            logits = task.logits(outputs)
        except TaskError:
            logits = None
    target = task.target(first)
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
    """How many batches; of a loader that cannot tell, so many that the fewest epochs do."""
    try:
        return max(len(batches), 1)
    except TypeError:
        return UPDATES


def _training(schooling: Schooling, epochs: int, rates: tuple[float, float]) -> Document:
    assert schooling.table is not None
    head = {"do": schooling.table["do"], "epochs": epochs, "lr": {"search": list(rates), "log": True}}
    return head | schooling.table


def _pruning(mix: Mix, schooling: Schooling, budget: Budget) -> tuple[Document | None, str, str]:
    """The step, its line in the reasons, and why there is none."""
    of = "macs" if {"latency", "macs"} & set(budget.figures) else "params"
    if mix.stays:
        return None, "", f"pruning (no channels may go: {mix.stays})"
    share = mix.removable[of]
    if share < WORTH_PRUNING:
        return None, "", f"pruning (channels that may go hold {share:.0%} of the {words(of)})"
    table: Document = {"do": "prune", "pattern": "channel", "of": of}
    what = "channels" if mix.main != "attention" else "heads and neurons" if mix.shares["attention"] else "neurons"
    if mix.main == "recurrent":
        what = "units"
    if schooling.table is None:
        if not mix.recalibrates:
            return None, "", "pruning (nothing would mend the cut: no training, and no batch norm to recalibrate)"
        # first in the list is where a search begins: without data to train on, a cut is the exception
        table |= {"sparsity": {"search": [0.05, min(0.25, down(0.85 * share))]}, "skip": {"search": [True, False]}}
        return table, f"a few {what} may go, as only batch norms can be calibrated again", ""
    high = min(0.8, down(0.85 * share))
    low = 0.2 if high >= 0.4 else 0.05
    table |= {"sparsity": {"search": [low, high]}, "skip": {"search": [False, True]}}
    if mix.main == "convolution":
        table |= {"criterion": "lamp", "normalization": "max"}
    return table, f"remove {what} with {low:.0%} to {high:.0%} of the {words(of)}", ""


def _teaching(mix: Mix, schooling: Schooling) -> tuple[Document | None, str, str]:
    if schooling.table is None:
        return None, "", f"training ({schooling.about})"
    rates = (2e-5, 2e-4) if mix.shares["attention"] else (2e-4, 2e-3)
    by = "teach it by the original" if schooling.table["do"] == "distill" else "train it on the labels"
    return _training(schooling, schooling.epochs, rates), f"{by} for {schooling.epochs} epochs", ""


def _quantization(
    mix: Mix, schooling: Schooling, budget: Budget, runtimes: Sequence[str]
) -> tuple[Document | None, str, str]:
    wanted = set(budget.figures)
    if not wanted & {"latency", "size", "peak_memory"}:
        return None, "", "quantization (it changes neither MACs nor parameters)"
    schemes = _schemes(mix, budget, runtimes)
    table: Document = {"do": "quantize", "scheme": schemes[0] if len(schemes) == 1 else {"search": schemes}}
    told = f"quantize to {' or '.join(schemes)}"
    if mix.main == "convolution" and schooling.table is not None and "int8-dynamic" not in schemes:
        rates = (2e-5, 5e-4)
        table |= {"mode": "qat", "train": _training(schooling, max(1, schooling.epochs // 3), rates)}
        told += ", trained on its grid"
    else:
        table["accuracy"] = {"search": ["plain", "best"]}
        told += ", plainly or with GPTQ and corrected biases"
    if "latency" in wanted and not any(SCHEMES[scheme].activations != "float" for scheme in schemes):
        told += " (fewer bytes at the speed of float: nothing here computes it on integers)"
    elif "latency" in wanted and (saturates() or mix.shares["depthwise"] > MANY_DEPTHWISE):
        table["skip"] = {"search": [False, True]}
        told += ", or not at all: " + (
            "8 bits gain little without VNNI" if saturates() else "depthwise layers may lose more by conversions"
        )
    return table, told, ""


def _schemes(mix: Mix, budget: Budget, runtimes: Sequence[str]) -> list[str]:
    if "latency" not in budget.figures:  # in bytes weights alone count, and activations in float lose less
        return ["int8-weights", "int4-weights"]
    best = {scheme: max(mix.runs[name][scheme] for name in runtimes) for scheme in SCHEMES}
    found = [scheme for scheme in ("int8", "int8-dynamic") if best[scheme] >= MOST]
    if not found or mix.main == "recurrent":
        found.append("int8-weights")
    if "size" in budget.bounds and "latency" not in budget.bounds:
        found.append("int4-weights")
    return found
