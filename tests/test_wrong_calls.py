"""Wrong calls of every public function and dataclass: each is a TorchslimError that names the argument.

The calls are made from the signatures: one argument at a time is replaced by values of other types, by a class in place
of an instance, by numbers that are none, and so on. What no signature says is in a table below.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import pytest
import torch
from torch import nn

import torchslim as ts
from tests.support import toy
from torchslim.core.checks import types_of
from torchslim.errors import DistillError, TorchslimError
from torchslim.runtimes import Deployed

INPUTS = (torch.zeros(2, 1, 8, 8),)
MODEL, TASK = toy.model(), toy.task()
CTX = ts.Context(task=TASK, teacher=MODEL, example_inputs=INPUTS)


def secret() -> Path:
    """A file with a token that only its owner can read."""
    handle, path = tempfile.mkstemp()
    os.write(handle, b"0" * 32)
    os.close(handle)
    return Path(path)


CALLS: Mapping[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "compress": (ts.compress, {"model": MODEL, "task": TASK, "steps": [ts.Prune(sparsity=0.5)]}),
    "deploy": (ts.deploy, {"model": MODEL, "example_inputs": INPUTS, "runtime": "eager"}),
    "fit": (ts.fit, {"model": MODEL, "objective": lambda *_: None, "batches": TASK.train, "epochs": 1}),
    "load": (ts.load, {"folder": "nowhere"}),
    "load_module": (ts.load_module, {"folder": "nowhere", "factory": toy.model}),
    "save": (ts.save, {"model": MODEL, "folder": "nowhere"}),
    "search": (ts.search, {"recipe": {}, "model": MODEL, "task": TASK, "workdir": "nowhere"}),
    "sensitivity": (ts.sensitivity, {"model": MODEL, "task": TASK}),
    "suggest": (ts.suggest, {"model": MODEL, "task": TASK}),
    "surgery": (ts.surgery, {"model": MODEL}),
    "prune.weights": (ts.prune.weights, {"model": MODEL, "sparsity": 0.5}),
    "prune.channels": (ts.prune.channels, {"model": MODEL, "example_inputs": INPUTS}),
    "prune.blocks": (ts.prune.blocks, {"model": MODEL, "example_inputs": INPUTS, "sparsity": 0.3}),
    "prune.apply_surgery": (ts.prune.apply_surgery, {"model": MODEL, "record": {}}),
    "prune.inspect": (ts.prune.inspect, {"model": MODEL, "example_inputs": INPUTS}),
    "prune.sparsity": (ts.prune.sparsity, {"model": MODEL}),
    "prune.hold_zeros": (ts.prune.hold_zeros, {"model": MODEL, "optimizer": torch.optim.SGD(MODEL.parameters(), 0.1)}),
    "quantize.static": (ts.quantize.static, {"model": MODEL, "batches": [INPUTS]}),
    "quantize.dynamic": (ts.quantize.dynamic, {"model": MODEL, "example_inputs": INPUTS}),
    "quantize.weights": (ts.quantize.weights, {"model": MODEL, "example_inputs": INPUTS}),
    "quantize.prepare": (ts.quantize.prepare, {"model": MODEL, "example_inputs": INPUTS}),
    "quantize.convert": (ts.quantize.convert, {"prepared": MODEL}),
    "quantize.sqnr": (ts.quantize.sqnr, {"reference": torch.ones(2, 3), "value": torch.ones(2, 3)}),
    "quantize.Checks": (ts.quantize.Checks, {}),
    "quantize.Helpers": (ts.quantize.Helpers, {}),
    "prune.Criterion": (ts.prune.Criterion, {"name": "own", "weights": len}),
    "distill.kl_divergence": (ts.distill.kl_divergence, {"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 3)}),
    "Prune": (ts.Prune, {"sparsity": 0.5}),
    "Finetune": (ts.Finetune, {}),
    "Distill": (ts.Distill, {}),
    "Quantize": (ts.Quantize, {}),
    "Budget": (ts.Budget, {}),
    "Engine": (ts.Engine, {}),
    "Target": (ts.Target, {}),
    "TimingWorker": (ts.TimingWorker, {"address": "127.0.0.1:1", "token": secret()}),
    "Metric": (ts.Metric, {"fn": len}),
    "Task": (ts.Task, {"val": TASK.val, "metric": "accuracy"}),
    "Context": (ts.Context, {"task": TASK, "teacher": MODEL, "example_inputs": INPUTS}),
    "Outcome": (ts.Outcome, {"model": MODEL}),
    "LayerRecord": (ts.LayerRecord, {"layer": "a", "action": "pruned"}),
    "Event": (ts.Event, {"step": "a", "phase": "b"}),
    "Bench": (ts.Bench, {"task": TASK, "example_inputs": INPUTS, "target": ts.Target(), "steps": ()}),
    **{kind.__name__: (kind, {}) for kind in ts.distill.LOSSES.values()},
}
NAMELESS = {"TorchslimError", "Form", "Step", "Deployed", "DeployedParts", "Result", "SearchResult", "Suggestion", "Sensitivity",
            "distill", "prune", "quantize", "quantize.Prepared", "quantize.QuantizedModule", "prune.ChannelGroup",
            "prune.HeldZeros", "prune.Inspection", "prune.ResidualBlock", "prune.Sparsity", "prune.Statistic",
            "prune.Statistics"}  # not made by users, or without arguments to check  # fmt: skip


FREE = {("Outcome", "history"), ("Outcome", "evidence"), ("LayerRecord", "sqnr_db"), ("Event", "values"),
        ("Context", "masks"), ("Context", "priors"), ("Context", "workbench")}  # ours: steps fill them  # fmt: skip


class Strange:
    """Of no type that anything takes."""

    __slots__ = ()


WRONG: Mapping[Any, Sequence[Any]] = {
    bool: ["yes", 1, 0.0],
    int: ["3", 1.5, True, math.nan, 10**30, [1], torch.zeros(())],
    float: ["0.5", True, math.nan, 10**400, [0.5], torch.zeros(2)],
    str: [3, b"text", ["a", 3], "a\0b"],
    Path: [3, b"path"],
    nn.Module: [toy.Net, "resnet", 3, {}, INPUTS[0]],
}


def wrong_values(kind: Any, name: str, holder: str) -> list[Any]:
    """Values that a declared type does not have."""
    if name == "example_inputs" and holder[0].isupper():
        return [INPUTS[0], 3, "1x1x8x8", Strange()]
    if name == "example_inputs":
        return [INPUTS[0], 3, "1x1x8x8", (torch.zeros(0, 1, 8, 8),), (torch.zeros(2, 1, 8, 8, device="meta"),),
                {"x": torch.zeros(2, 0)}]  # fmt: skip
    if kind is Any or kind is object:
        return []
    members = list(flat(kind))
    if Any in members:
        return []
    pool: list[Any] = [Strange(), Strange, {1, 2}, lambda: (_ for _ in ())]
    if not any(callable_kind(each) for each in members):
        pool += [len]
    for each in members:
        pool += WRONG.get(each, [])
    return [value for value in pool if not any(takes(each, value) for each in members)]


def flat(kind: Any) -> Iterable[Any]:
    """The members of a union, without annotations."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        yield from flat(typing.get_args(kind)[0])
    elif origin in (Union, types.UnionType):
        for each in typing.get_args(kind):
            yield from flat(each)
    else:
        yield kind


def callable_kind(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.get_origin(Callable[..., Any])


def takes(kind: Any, value: Any) -> bool:
    """Might a value be meant by a type? Only what surely is not makes a wrong call."""
    origin = typing.get_origin(kind) or kind
    if callable_kind(kind):
        return callable(value)
    if origin in (tuple, list, Sequence, Iterable):
        return isinstance(value, (tuple, list)) or (origin is Iterable and isinstance(value, Iterable))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is Literal:
        return value in typing.get_args(kind) if isinstance(value, str) else False
    if origin is float:
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and not (value != value or abs(value) > 1e300)
        )
    if origin is int:
        return type(value) is int and abs(value) < 10**20
    if origin is str:
        return isinstance(value, str) and "\0" not in value
    try:
        return isinstance(value, origin)
    except TypeError:
        return True


def arguments_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The declared types, by argument."""
    hints = types_of(function)
    if dataclasses.is_dataclass(function):
        return {each.name: hints[each.name] for each in dataclasses.fields(function) if each.init}
    return {name: hints[name] for name in inspect.signature(function).parameters if name in hints}


WRONG_CALLS = [
    (call, name, value)
    for call, (function, _) in CALLS.items()
    for name, kind in arguments_of(function).items()
    if (call, name) not in FREE
    for value in wrong_values(kind, name, call)
]


def test_every_public_name_is_called_wrongly() -> None:
    called = [function for function, _ in CALLS.values()]
    for room in (ts, ts.distill, ts.prune, ts.quantize):
        for name in room.__all__:
            path = name if room is ts else f"{room.__name__.removeprefix('torchslim.')}.{name}"
            if {path, name} & NAMELESS or not callable(getattr(room, name)):
                continue
            assert getattr(room, name) in called, f"{path} is not in the table"
    assert len(WRONG_CALLS) > 1_000


@pytest.mark.parametrize("call", sorted(CALLS))
def test_a_wrong_argument_is_named(call: str) -> None:
    function, good = CALLS[call]
    for _, name, value in (each for each in WRONG_CALLS if each[0] == call):
        with pytest.raises(TorchslimError) as caught:
            function(**{**good, name: value})
            pytest.fail(f"{call}({name}={value!r}) was accepted")
        assert name in str(caught.value), f"{call}({name}={value!r}): {caught.value}"


def broken(value: float = math.nan) -> nn.Module:
    model = toy.model()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = value
    return model


@pytest.mark.parametrize(
    "call", sorted(name for name, (_, good) in CALLS.items() if "model" in good and name[0].islower())
)
def test_weights_that_are_nan_are_refused(call: str) -> None:
    function, good = CALLS[call]
    with pytest.raises(TorchslimError, match="'conv2.weight'.*NaN"):
        function(**{**good, "model": broken()})


UNFIT: Mapping[str, tuple[Callable[[], Any], str]] = {
    "a class": (lambda: toy.Net, r"instance.*Net\(\.\.\.\)|entry 2.*class Net.*nn.Module"),
    "TorchScript": (lambda: torch.jit.trace(toy.model().eval(), INPUTS), "TorchScript.*original"),
    "TorchScript inside": (lambda: nn.Sequential(torch.jit.trace(toy.model().eval(), INPUTS)), "module '0'"),
    "on meta": (lambda: toy.model().to("meta"), "'conv1.weight'.*meta device.*real weights"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "'1.weight'.*no shape.*call"),
    "NaN": (broken, "'conv2.weight'.*NaN"),
    "exported": (lambda: torch.export.export(toy.model().eval(), INPUTS), "ExportedProgram|exported from"),
    "weights alone": (lambda: toy.model().state_dict(), "must be an nn.Module"),
}  # fmt: skip


def squares(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {"loss": model(batch[0]).square().mean()}


TAKERS: Mapping[str, Callable[[Any], Any]] = {
    "Distill, teacher": lambda model: ts.Distill(teacher=model, epochs=1).check(CTX),
    "Distill, teachers": lambda model: ts.Distill(teacher=[MODEL, model], epochs=1).check(CTX),
    "Distill, student": lambda model: ts.Distill(student=model, epochs=1).check(CTX),
    "compress, teacher": lambda model: ts.compress(MODEL, TASK, [ts.Distill(epochs=1)], teacher=model),
    "fit": lambda model: ts.fit(model, TASK.train or (), squares, epochs=1),
    "fit, companion": lambda model: ts.fit(toy.model(), TASK.train or (), squares, epochs=1, companion=model),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("unfit", UNFIT)
def test_models_that_cannot_teach_or_learn_are_refused(unfit: str, taker: str) -> None:
    made, says = UNFIT[unfit]
    with pytest.raises(TorchslimError, match=says):
        TAKERS[taker](made())


@pytest.mark.parametrize("wrapped", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_trained_without_its_wrapper(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    plain, other = toy.model(), toy.model()
    batches = [toy.images(16, 1)]
    ts.fit(plain, batches, squares, epochs=1)
    ts.fit(wrapped(other), batches, squares, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert not torch.equal(next(plain.parameters()), next(toy.model().parameters()))


LOGITS, LABELS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
NO_OUTPUTS: Mapping[str, Any] = {
    "nothing": None, "a model": MODEL, "a class": toy.Net, "text": "logits", "whole numbers": LOGITS.long(),
    "no values": LOGITS.to("meta"), "no samples": LOGITS[:0],
}  # fmt: skip


@pytest.mark.parametrize("wrong", NO_OUTPUTS)
@pytest.mark.parametrize("loss", [name for name, kind in ts.distill.LOSSES.items() if callable(kind())])
def test_losses_say_which_of_their_tensors_is_none(loss: str, wrong: str) -> None:
    made = ts.distill.LOSSES[loss]()
    rest = (LABELS,) if loss in ("kd", "dkd", "dist", "mse") else ()
    for name, given in (("student", (NO_OUTPUTS[wrong], LOGITS)), ("teacher", (LOGITS, NO_OUTPUTS[wrong]))):
        with pytest.raises(DistillError, match=f"^{name} (must be|is)"):
            made(*given, *rest)


@pytest.mark.parametrize("wrong", [LABELS[:2], LABELS.to("meta"), torch.tensor(1), "cat", torch.tensor([0, 1, 9])])
@pytest.mark.parametrize("loss", [ts.KD(), ts.DKD(), ts.DIST(), ts.distill.MSE()])
def test_losses_refuse_labels_that_do_not_fit(loss: Any, wrong: Any) -> None:
    with pytest.raises(TorchslimError, match=r"^target (must|is)|^labels must be in \[0, 4\)"):
        loss(LOGITS, LOGITS + 1, wrong)


@pytest.mark.parametrize("threads", [-1, 0, 1.5, True, "2", 10**9, math.nan, [1]])
@pytest.mark.parametrize("call", sorted(name for name, (each, _) in CALLS.items() if "threads" in arguments_of(each)))
def test_threads_that_cannot_be_are_refused(call: str, threads: Any) -> None:
    function, good = CALLS[call]
    with pytest.raises(TorchslimError, match="threads must be"):
        function(**{**good, "threads": threads})


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "0", True])
@pytest.mark.parametrize("call", sorted(name for name, (each, _) in CALLS.items() if "seed" in arguments_of(each)))
def test_seeds_that_cannot_be_are_refused(call: str, seed: Any) -> None:
    function, good = CALLS[call]
    with pytest.raises(TorchslimError, match="seed must be"):
        function(**{**good, "seed": seed})


MORE: Sequence[tuple[str, Callable[[], Any], str]] = (
    ("a generator that was used up", lambda: ts.quantize.static(MODEL, iter(())), "batch"),
    ("no batches", lambda: ts.quantize.static(MODEL, []), "batch"),
    ("batches of another kind", lambda: ts.quantize.static(MODEL, 3), "batches"),
    ("a task whose data is used up", lambda: ts.Task(val=iter([1]), metric="accuracy"), "val"),
    ("a class of a step", lambda: ts.compress(MODEL, TASK, [ts.Finetune]), "step"),
    ("one step without a list", lambda: ts.compress(MODEL, TASK, ts.Finetune()), "steps"),
    ("a loss as a step", lambda: ts.compress(MODEL, TASK, [ts.KD()]), "step"),
    ("another dataclass", lambda: ts.compress(MODEL, ts.Budget(), [ts.Finetune()]), "task"),
    ("a runtime that is none", lambda: ts.deploy(MODEL, INPUTS, runtime="tpu"), "runtime"),
    ("a folder that is a file", lambda: ts.load(__file__), "test_wrong_calls.py"),
    ("a folder that is not there", lambda: ts.load("no/such/folder"), "no/such/folder"),
    ("a factory that gives something else", lambda: ts.load_module("no/such/folder", lambda: 3), "no/such/folder"),
    ("a loss that gets other shapes", lambda: ts.KD(alpha=1.0)(torch.zeros(2, 3), torch.zeros(2, 4)), "shape"),
    ("inputs of another number", lambda: ts.deploy(MODEL, (*INPUTS, *INPUTS), runtime="eager"), ""),
    ("inputs by a wrong name", lambda: ts.deploy(MODEL, {"y": INPUTS[0]}, runtime="eager"), ""),
    ("a sparsity of one", lambda: ts.prune.weights(MODEL, 1.0), "sparsity"),
    ("a pattern that is none", lambda: ts.prune.weights(MODEL, 0.5, include="nothing"), "nothing"),
    ("what was not prepared", lambda: ts.quantize.convert(MODEL), "prepare"),
    ("inputs that are none", lambda: ts.deploy(MODEL, (None,), runtime="eager"), ""),
    ("outputs of other shapes", lambda: ts.quantize.sqnr(LOGITS, LOGITS[:2]), r"same shapes.*\[\(3, 4\)\]"),
    ("outputs of another number", lambda: ts.quantize.sqnr((LOGITS, LOGITS), (LOGITS,)), "same shapes"),
    ("outputs of other names", lambda: ts.quantize.sqnr({"a": LOGITS}, {"b": LOGITS}), "same keys"),
    ("a model as outputs", lambda: ts.quantize.sqnr(MODEL, LOGITS), "reference.*tensors.*module Net"),
    ("classes as outputs", lambda: ts.quantize.sqnr(LOGITS, LABELS), "value.*floating point"),
    ("outputs without values", lambda: ts.quantize.sqnr(LOGITS.to("meta"), LOGITS), "reference.*meta device"),
    ("outputs without samples", lambda: ts.quantize.sqnr(LOGITS[:0], LOGITS[:0]), "reference.*empty"),
    ("no objective", lambda: ts.fit(MODEL, TASK.train, None, epochs=1), r"function \(model, batch\)"),
    ("a class as objective", lambda: ts.fit(MODEL, TASK.train, ts.KD, epochs=1), r"function \(model, batch\)"),
    ("a task as objective", lambda: ts.fit(MODEL, TASK.train, TASK, epochs=1), r"function \(model, batch\)"),
    ("a criterion as objective", lambda: ts.fit(toy.model(), TASK.train, nn.CrossEntropyLoss(), epochs=1),
     "model.*batch.*dict.*losses"),
    ("a scalar of an objective", lambda: ts.fit(toy.model(), TASK.train, lambda m, b: m(b[0]).mean(), epochs=1),
     "dict.*losses"),
    ("an objective of one argument", lambda: ts.fit(toy.model(), TASK.train, lambda m: {}, epochs=1), "objective"),
    ("batches that the objective cannot take", lambda: ts.fit(toy.model(), [1, 2], squares, epochs=1), "batch 1"),
    ("a mask without values", lambda: ts.fit(toy.model(), TASK.train, squares, epochs=1, masks={
        "conv2.bias": torch.ones(8, dtype=torch.bool, device="meta")}), "'conv2.bias'.*meta device"),
    ("a task that is a class", lambda: ts.fit(MODEL, TASK.train, squares, epochs=1, evaluate=ts.Task), "evaluate"),
)  # fmt: skip


@pytest.mark.parametrize(("about", "call", "says"), MORE, ids=[about for about, _, _ in MORE])
def test_what_no_signature_says_is_refused_too(about: str, call: Callable[[], Any], says: str) -> None:
    with pytest.raises(TorchslimError) as caught:
        call()
    assert re.search(says, str(caught.value))


def test_what_is_deployed_can_be_saved_as_ever(tmp_path: Path) -> None:
    deployed = ts.deploy(MODEL, INPUTS, runtime="eager", threads=1)
    assert isinstance(ts.load(ts.save(deployed, tmp_path / "out")), Deployed)
