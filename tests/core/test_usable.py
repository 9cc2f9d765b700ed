"""What is given for a model: wrappers come off, and what cannot work is an error that says what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from torchslim.core.usable import usable

X = (torch.zeros(2, 3),)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


UNUSABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "scripted": (lambda: torch.jit.script(net()), "TorchScript.*original module"),
    "traced": (lambda: torch.jit.trace(net(), X), "TorchScript.*original module"),
    "scripted inside": (lambda: nn.Sequential(net(), torch.jit.script(nn.ReLU())), "module '1'.*TorchScript"),
    "exported": (lambda: torch.export.export(net(), X), "ExportedProgram"),
    "a class": (lambda: nn.ReLU, r"class ReLU; make one: ReLU\(\.\.\.\)"),
    "nothing": (lambda: None, "NoneType"),
    "weights": (lambda: net().state_dict(), "load_state_dict"),
    "meta": (lambda: net().to("meta"), "meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2)), "no shape.*call"),
    "torch.ao": (lambda: nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(3, 4)), "quantized already, by torch.ao"),
    "parallel inside": (lambda: nn.Sequential(nn.DataParallel(net())), "wrapped by DataParallel"),
}
DATA = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]
TASK = ts.Task(val=DATA, train=DATA, metric="accuracy")
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "compress": lambda model: ts.compress(model, TASK, [ts.Prune(sparsity=0.5)]),
    "deploy": lambda model: ts.deploy(model, X),
    "static": lambda model: ts.quantize.static(model, [X]),
    "dynamic": lambda model: ts.quantize.dynamic(model, X),
    "quantize.weights": lambda model: ts.quantize.weights(model, X),
    "prepare": lambda model: ts.quantize.prepare(model, X),
    "prune.weights": lambda model: ts.prune.weights(model, 0.5),
    "channels": lambda model: ts.prune.channels(model, X),
    "inspect": lambda model: ts.prune.inspect(model, X),
    "sensitivity": lambda model: ts.sensitivity(model, TASK),
    "suggest": lambda model: ts.suggest(model, TASK),
    "save": lambda model: ts.save(model, "never-written"),
}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")  # of torch.jit and LazyLinear
@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_work_is_refused_by_name(kind: str) -> None:
    make, words = UNUSABLE[kind]
    with pytest.raises(ts.TorchslimError, match=words):
        usable(make())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_refuses_it(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ts.TorchslimError, match="model.*nn.Module.*got 3"):
        FUNCTIONS[function](3)
    assert not list(tmp_path.iterdir())


def test_searching_refuses_it(tmp_path: Path) -> None:
    recipe = {"step": [{"do": "prune", "sparsity": {"search": [0.3, 0.5]}}], "budget": {"metric_drop": 1.0}}
    with pytest.raises(ts.TorchslimError, match="model.*nn.Module.*got 3"):
        ts.search(3, TASK, recipe, workdir=tmp_path)  # type: ignore[arg-type]


def test_wrappers_come_off() -> None:
    model = net()
    assert usable(torch.compile(model, backend="eager")) is model
    assert usable(nn.DataParallel(torch.compile(model, backend="eager"))) is model  # type: ignore[arg-type]
    assert usable(model) is model


def test_a_teacher_is_named() -> None:
    with pytest.raises(ts.TorchslimError, match="teacher.*nn.Module.*'resnet'"):
        ts.compress(net(), TASK, [ts.Distill(epochs=1)], teacher="resnet")  # type: ignore[arg-type]
