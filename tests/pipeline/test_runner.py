"""The run as a whole: what it measures, what it refuses, what it keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests.support import toy
from tests.support.varying import VARYING, image
from torchslim.core.batches import call
from torchslim.errors import (
    ExportError,
    PruneError,
    QuantizeError,
    RecipeError,
    SelectError,
    TaskError,
    TorchslimError,
    TrainError,
)

STEPS = [ts.Prune(sparsity=0.5), ts.Distill(epochs=2, lr=1e-2), ts.Quantize("int8")]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ts.Result:
    work = tmp_path_factory.mktemp("run") / "work"
    return ts.compress(toy.model(), toy.task(), STEPS, runtime="onnxruntime", threads=1, workdir=work)


def rows(result: ts.Result) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result.run["rows"]}


@pytest.mark.slow
def test_a_row_for_each_step_and_one_for_the_artifact(result: ts.Result) -> None:
    assert list(rows(result)) == ["baseline", "prune", "distill", "quantize", "artifact"]


def test_numbers_are_those_of_the_model_and_of_the_file(result: ts.Result, tmp_path: Path) -> None:
    table = rows(result)
    model = toy.model()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert table["baseline"]["parameters"]["value"] == count
    convolutions = 8 * 9 * 64 + 8 * 8 * 9 * 64
    assert table["baseline"]["macs"]["value"] == convolutions + 8 * toy.CLASSES
    saved = result.save(tmp_path / "out")
    assert (saved / "model.onnx").stat().st_size == table["artifact"]["size_bytes"]["value"]
    zeros = sum(int((parameter == 0).sum()) for parameter in result.module.parameters())
    assert table["distill"]["nonzero"]["value"] == count - zeros


def test_the_artifacts_metric_is_that_of_what_ships(result: ts.Result) -> None:
    images, labels = toy.images(64, 3)
    right = (result.deployed(images).argmax(1) == labels).float().mean().item() * 100
    assert rows(result)["artifact"]["metric"]["test"]["value"] == pytest.approx(right)


def test_pruned_weights_stay_zero_through_training_and_quantization(result: ts.Result) -> None:
    for name, mask in result.masks.items():
        assert bool((result.module.get_parameter(name)[~mask] == 0).all())
    dropped = sum(int((~mask).sum()) for mask in result.masks.values())
    total = sum(mask.numel() for mask in result.masks.values())
    assert dropped == round(0.5 * total)


def test_every_measured_number_has_unit_repeats_spread_and_machine(result: ts.Result) -> None:
    for row in result.run["rows"]:
        for number in (*row["latency_ms"].values(), *row["speedup"].values()):
            assert {"value", "unit", "repeats", "low", "high", "machine"} <= set(number)
            assert number["low"] <= number["value"] <= number["high"]
            assert number["machine"] in result.run["machines"]
    json.dumps(result.run, allow_nan=False)


def test_the_saved_folder_loads_as_what_was_returned(result: ts.Result, tmp_path: Path) -> None:
    saved = result.save(tmp_path / "out")
    images, _ = toy.images(5, 9)
    assert torch.equal(ts.load(saved)(images), result.deployed(images))
    rebuilt = ts.load_module(saved, toy.Net)
    for name, value in result.module.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], value)
    for name in ("run.json", "report.html", "bench.py", "artifact.json", "model.pt2", "masks.safetensors"):
        assert (saved / name).is_file()


def test_the_table_shows_every_row(result: ts.Result) -> None:
    printed = str(result)
    for name in rows(result):
        assert name in printed


@pytest.mark.slow
def test_a_finished_run_is_picked_up_whole(result: ts.Result) -> None:
    phases: list[tuple[str, str]] = []
    again = ts.compress(
        toy.model(), toy.task(), STEPS, runtime="onnxruntime", threads=1, workdir=result.folder,
        progress=lambda event: phases.append((event.step, event.phase)),
    )  # fmt: skip
    assert [step for step, phase in phases if phase == "resumed"] == ["prune", "distill", "quantize"]
    assert not any(phase in ("train", "deploy") for _, phase in phases)
    images, _ = toy.images(5, 9)
    assert torch.equal(again.deployed(images), result.deployed(images))
    assert torch.equal(again.model(images), result.model(images))
    for a, b in zip(again.run["rows"], result.run["rows"], strict=True):
        assert (a["metric"], a["size_bytes"]) == (b["metric"], b["size_bytes"])


def test_another_recipe_does_not_take_the_folder(result: ts.Result) -> None:
    other = [replace(STEPS[0], sparsity=0.75), *STEPS[1:]]
    with pytest.raises(RecipeError, match=r"another recipe.*step 1, sparsity: 0.5 there, 0.75 here"):
        ts.compress(toy.model(), toy.task(), other, runtime="onnxruntime", threads=1, workdir=result.folder)
    with pytest.raises(RecipeError, match="3 steps there, 1 here"):
        ts.compress(toy.model(), toy.task(), STEPS[:1], threads=1, workdir=result.folder)
    with pytest.raises(RecipeError, match="seed: 0 there, 1 here"):
        ts.compress(toy.model(), toy.task(), STEPS, threads=1, seed=1, workdir=result.folder)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="files.*no run"):
        ts.compress(toy.model(), toy.task(), STEPS, workdir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_overwrite_keeps_the_steps_that_are_the_same(tmp_path: Path) -> None:
    first = [ts.Prune(sparsity=0.5), ts.Finetune(epochs=1)]
    second = [ts.Prune(sparsity=0.5), ts.Finetune(epochs=2)]
    ts.compress(toy.model(), toy.task(), first, runtime="eager", workdir=tmp_path)
    resumed: list[str] = []
    ts.compress(
        toy.model(), toy.task(), second, runtime="eager", workdir=tmp_path, overwrite=True,
        progress=lambda event: resumed.append(event.step) if event.phase == "resumed" else None,
    )  # fmt: skip
    assert resumed == ["prune"]


@pytest.mark.slow
def test_other_weights_or_data_are_not_taken_for_a_finished_run(tmp_path: Path) -> None:
    steps = [ts.Prune(sparsity=0.5)]
    ts.compress(toy.model(), toy.task(), steps, runtime="eager", workdir=tmp_path)
    for change in ("weights", "data"):
        model, task = toy.model(), toy.task()
        if change == "weights":
            with torch.no_grad():
                model.head.weight[0, 0] += 1
        else:
            task = replace(task, val=[toy.images(64, 99)])
        resumed: list[str] = []
        ts.compress(
            model, task, steps, runtime="eager", workdir=tmp_path,
            progress=lambda event, seen=resumed: seen.append(event.step) if event.phase == "resumed" else None,
        )  # fmt: skip
        assert resumed == []


@dataclass(frozen=True)
class Widen:
    """A step of the user's own that changes the architecture."""

    accepts: ClassVar[ts.Form] = ts.Form.MODULE
    produces: ClassVar[ts.Form] = ts.Form.MODULE

    def check(self, ctx: ts.Context) -> None: ...

    def __call__(self, model: nn.Module, ctx: ts.Context) -> ts.Outcome:
        return ts.Outcome(model=nn.Sequential(model, nn.Linear(toy.CLASSES, toy.CLASSES)), masks={})


@pytest.mark.slow
def test_a_step_of_the_users_own_may_change_the_architecture_and_run_again(tmp_path: Path) -> None:
    for _ in range(2):
        result = ts.compress(
            toy.model(), toy.task(), [Widen(), ts.Finetune(epochs=1)], runtime="eager", workdir=tmp_path
        )
        assert isinstance(result.model, nn.Sequential)


@dataclass(frozen=True)
class Bad:
    """A step that returns something else."""

    accepts: ClassVar[ts.Form] = ts.Form.MODULE
    produces: ClassVar[ts.Form] = ts.Form.MODULE
    what: str = "none"

    def check(self, ctx: ts.Context) -> None: ...

    def __call__(self, model: nn.Module, ctx: ts.Context) -> Any:
        if self.what == "nan":
            with torch.no_grad():
                model.head.bias.fill_(float("nan"))
            return ts.Outcome(model=model)
        return None


@pytest.mark.slow
def test_a_step_that_breaks_the_model_is_named() -> None:
    with pytest.raises(RecipeError, match=r"step 1 \('bad'\).*Outcome.*model.*NoneType"):
        ts.compress(toy.model(), toy.task(), [Bad()], runtime="eager")
    with pytest.raises(TorchslimError, match=r"step 'bad' .*\d+ values.*not finite"):
        ts.compress(toy.model(), toy.task(), [Bad("nan")], runtime="eager")


class Untraceable(toy.Net):
    def forward(self, x: Tensor) -> Tensor:
        if super().forward(x).sum().item() > 1e9:
            return x
        return super().forward(x)


def no_labels() -> ts.Task:
    return replace(toy.task(), target=lambda batch: None, metric=lambda predict, batches: 1.0)


def once() -> Iterator[Any]:
    yield toy.images(8, 0)


class Exhausted:
    """Gives its batches on the first pass only."""

    def __init__(self) -> None:
        self.batches = [toy.images(16, 0)]

    def __iter__(self) -> Iterator[Any]:
        while self.batches:
            yield self.batches.pop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "task", "steps", "error", "message"),
    [
        (toy.model, toy.task, lambda: [ts.Prune(sparsity=1.0)], PruneError, r"sparsity must be in \[0, 1\).*got 1.0"),
        (toy.model, toy.task, lambda: [ts.Prune(sparsity=0.5, include="con1")], SelectError, "'con1'.*near.*conv1"),
        (nn.ReLU, toy.task, lambda: [ts.Prune(sparsity=0.5)], TaskError, r"the model \(ReLU\) has no parameters"),
        (toy.model, lambda: replace(toy.task(), val=[]), lambda: STEPS, TaskError, "val.*no batch.*empty"),
        (toy.model, lambda: replace(toy.task(), val=Exhausted()), lambda: STEPS, TaskError, "val.*no batch.*used up"),
        (toy.model, lambda: replace(toy.task(), train=once()), lambda: STEPS, TaskError, "train.*iterator"),
        (toy.model, lambda: replace(toy.task(), train=None), lambda: STEPS, TaskError, r"no train batches.*Task\(train=\.\.\.\)"),
        (toy.model, lambda: replace(toy.task(), train=[(torch.randn(8, 1, 8, 8), torch.full((8,), 9))]), lambda: [ts.Finetune(epochs=1)], TaskError, r"labels.*\[0, 4\).*4 outputs.*9 to 9"),
        (toy.model, lambda: replace(toy.task(), calibration=[(torch.full((8, 1, 8, 8), float("nan")), torch.zeros(8))]), lambda: [ts.Quantize("int8")], TorchslimError, "calibration batch 1.*not finite.*input 0"),
        (Untraceable, toy.task, lambda: [ts.Prune(sparsity=0.5)], ExportError, r"test_runner\.py:\d+ in forward: if super"),
        (toy.model, lambda: replace(toy.task(), metric=lambda predict, batches: float("nan")), lambda: STEPS, TaskError, "metric.*nan on val"),
        (toy.model, lambda: replace(toy.task(), metric=lambda predict, batches: torch.ones(3)), lambda: STEPS, TaskError, r"metric.*one number.*tensor.*\(3,\)"),
        (toy.model, no_labels, lambda: [ts.Finetune(epochs=1)], TrainError, "Finetune.*labels.*Task.target.*None"),
        (toy.model, toy.task, lambda: [ts.Quantize("int8"), ts.Prune(sparsity=0.5)], RecipeError, "move step 2 before step 1"),
        (toy.model, toy.task, lambda: [ts.Finetune(epochs=1, lr=1e9, optimizer="sgd")], TrainError, r"loss.* (nan|inf) .*'finetune', epoch 1, batch \d+.*last finite loss"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_clear_error(model: Any, task: Any, steps: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ts.compress(model(), task(), steps(), runtime="eager")


@pytest.mark.slow
def test_distillation_needs_no_labels() -> None:
    step = ts.Distill(epochs=1, response=ts.KD(alpha=1.0))
    result = ts.compress(toy.model(), no_labels(), [step], runtime="eager")
    assert rows(result)["distill"]["history"][0]["loss_response"] >= 0


@pytest.mark.slow
def test_without_a_test_split_the_report_says_what_was_selected_on() -> None:
    result = ts.compress(toy.model(), replace(toy.task(), test=None), [ts.Prune(sparsity=0.5)], runtime="eager")
    assert result.run["reported_on"] == "val (selected on val)"
    assert "not_measured" in rows(result)["artifact"]["metric"]["test"]


@pytest.mark.slow
def test_the_callers_loaders_draw_on_as_if_nothing_had_run() -> None:
    loaders = [
        DataLoader(
            TensorDataset(*toy.images(64, seed)),
            16,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 2)
    ]
    before = [loader.generator.get_state() for loader in loaders]
    task = replace(toy.task(), train=loaders[0], val=loaders[1])
    ts.compress(toy.model(), task, [ts.Finetune(epochs=1), ts.Quantize("int8")], runtime="eager")
    assert all(torch.equal(a, b.generator.get_state()) for a, b in zip(before, loaders, strict=True))


@pytest.mark.slow
def test_layers_are_looked_up_in_the_student_not_in_the_teacher() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, toy.CLASSES))
    steps = [ts.Prune(sparsity=0.5, include="conv2"), ts.Distill(epochs=1)]
    result = ts.compress(toy.model(), toy.task(), steps, teacher=teacher, runtime="eager")
    assert list(result.masks) == ["conv2.weight"]


@pytest.mark.slow
def test_a_recipe_that_fails_its_check_claims_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SelectError):
        ts.compress(toy.model(), toy.task(), [ts.Prune(sparsity=0.5, include="con1")], workdir=tmp_path)
    ts.compress(toy.model(), toy.task(), [ts.Prune(sparsity=0.5, include="conv1")], runtime="eager", workdir=tmp_path)


@pytest.mark.slow
def test_a_changed_teacher_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        phases: list[str] = []
        ts.compress(
            toy.model(), toy.task(), [ts.Distill(epochs=1)], teacher=toy.Net(), runtime="eager", workdir=tmp_path,
            progress=lambda event, seen=phases: seen.append(event.phase),
        )  # fmt: skip
        assert "train" in phases


@dataclass
class Answer:
    """What a model of the user's own returns."""

    logits: Tensor
    hidden: Tensor | None = None


class Answering(toy.Net):
    def forward(self, x: Tensor) -> Answer:
        return Answer(super().forward(x))


@pytest.mark.slow
def test_a_model_that_returns_a_dataclass_does_so_after_every_step_and_after_a_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Answering()
    images, _ = toy.images(5, 9)
    for _ in range(2):
        result = ts.compress(model, toy.task(), [ts.Distill(epochs=1), ts.Quantize("int8")], workdir=tmp_path)
        for answer in (result.module(images), result.model(images), result.deployed(images)):
            assert type(answer) is Answer
            assert answer.hidden is None
    with pytest.raises(TorchslimError, match="not finite"):
        ts.compress(model, toy.task(), [Bad("nan")], runtime="eager")


def test_a_resumed_quantized_stage_takes_and_refuses_the_sizes_that_the_first_run_does(tmp_path: Path) -> None:
    """Costs 5 s: one quantization of a network whose sizes must be multiples of 4, and a resumption."""
    case = VARYING["u-net"]
    batches = [*case.examples(), case.inputs(2, 12, 20)]
    task = ts.Task(val=batches, calibration=batches, metric=size_of_outputs, inputs=lambda batch: batch)
    phases: list[str] = []
    first, resumed = (
        ts.compress(
            case.model(), task, [ts.Quantize("int8")], runtime="eager", threads=1, workdir=tmp_path,
            progress=lambda event: phases.append(event.phase),
        )
        for _ in range(2)
    )  # fmt: skip
    assert "resumed" in phases
    assert resumed.deployed.quantized
    for sizes in ((1, 8, 8), (3, 16, 4), (5, 12, 28)):
        torch.testing.assert_close(call(resumed.model, image(*sizes)), call(first.model, image(*sizes)))
    refused = [image(1, 18, 16), image(2, 16, 6), (torch.randn(2, 4, 16, 16),), (torch.randn(3, 16, 16),)]
    for inputs in refused:
        for result in (first, resumed):
            with pytest.raises(QuantizeError, match="list of example inputs"):
                result.model(*inputs)


def size_of_outputs(predict: Any, batches: Any) -> float:
    return float(sum(predict(*batch).numel() for batch in batches))
