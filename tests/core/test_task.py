"""What the user brings: batches and outputs of every kind, metrics, and what is refused."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests.support import toy
from torchslim.core.batches import checked, predictor, take_first
from torchslim.core.metrics import default_loss
from torchslim.core.trees import tensors, to_device
from torchslim.errors import TaskError


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


def test_batches_and_outputs_are_read_by_their_kind() -> None:
    x, mask, y = torch.randn(2, 3), torch.ones(2), torch.tensor([0, 1])
    task = ts.Task(val=[(x, y)], metric="accuracy")
    assert task.inputs((x, y))[0] is x
    assert task.inputs({"x": x, "attention_mask": mask, "labels": y}).keys() == {"x", "attention_mask"}
    assert task.target({"x": x, "labels": y}) is y
    assert task.target(x) is None
    assert task.mask({"attention_mask": mask}) is mask
    for outputs in (x, (x, y), {"logits": x}, Output(x), SimpleNamespace(logits=x)):
        assert task.logits(outputs) is x
    with pytest.raises(TaskError, match="no logits.*int"):
        task.logits(3)


def test_ready_metrics_equal_their_definition() -> None:
    logits, labels = torch.randn(40, 5), torch.randint(5, (40,))
    batches = [(logits[:30], labels[:30]), (logits[30:], labels[30:])]
    task = ts.Task(val=batches, metric="accuracy")
    assert task.evaluate(lambda x: x) == pytest.approx((logits.argmax(1) == labels).float().mean().item() * 100)
    tokens, words = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    words[:, 3:] = -100
    expected = (tokens.argmax(-1) == words)[:, :3].float().mean().item() * 100
    assert ts.Task(val=[(tokens, words)], metric="accuracy").evaluate(lambda x: x) == pytest.approx(expected)
    loss = ts.Task(val=[(tokens, words)], metric="accuracy").compute_loss(tokens, (tokens, words))
    assert loss.item() == pytest.approx(
        nn.functional.cross_entropy(tokens[:, :3].flatten(0, 1), words[:, :3].flatten()).item()
    )
    errors = ts.Task(val=[(logits[:, :1], labels.float())], metric="mae").evaluate(lambda x: x)
    assert errors == pytest.approx((logits[:, 0] - labels).abs().mean().item())
    assert not ts.Task(val=[1], metric="mae").as_metric().higher_is_better
    with pytest.raises(TaskError, match="do not fit real targets"):
        ts.Task(val=[(logits, labels.float())], metric="mae").evaluate(lambda x: x)


class Counting:
    """The three methods of a torchmetrics.Metric."""

    higher_is_better = False

    def reset(self) -> None:
        self.count = 0

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.count += len(target)

    def compute(self) -> Tensor:
        return torch.tensor(self.count)


def test_a_torchmetrics_metric_is_taken_as_it_is() -> None:
    task = replace(toy.task(), metric=Counting())
    assert task.evaluate(predictor(toy.model())) == 64
    assert not task.as_metric().higher_is_better


def test_a_task_that_cannot_work_says_so() -> None:
    with pytest.raises(TaskError, match="metric.*'acuracy'.*accuracy"):
        ts.Task(val=[1], metric="acuracy")
    with pytest.raises(TaskError, match="metric must be a name"):
        ts.Task(val=[1], metric=3)
    with pytest.raises(TaskError, match="val is None"):
        ts.Task(val=None, metric="accuracy")
    with pytest.raises(TaskError, match="train.*iterable.*got 3"):
        ts.Task(val=[1], train=3, metric="accuracy")
    with pytest.raises(TaskError, match="got str"):
        ts.Task(val=[1], metric=lambda predict, batches: "good").evaluate(len)
    with pytest.raises(TaskError, match="do not fit labels"):
        ts.Task(val=[1], metric="accuracy").compute_loss(torch.zeros(2, 3), (0, torch.zeros(2, 2).long()))
    assert len(toy.task().calibration_batches(samples=20)) == 2


def test_any_mapping_is_a_batch_and_the_model_gets_keywords() -> None:
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    batch = UserDict({"x": x, "labels": y})  # what Hugging Face tokenizers return
    task = ts.Task(val=[batch], metric="accuracy")
    assert task.target(batch) is y
    assert task.forward(lambda *, x: x, batch) is x
    several = (x, x + 1, y)
    assert len(task.inputs(several)) == 2
    assert torch.equal(task.forward(lambda a, b: b - a, several), torch.ones(2, 3))


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 1000))
def test_ignored_labels_change_neither_loss_nor_accuracy(count: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    more = torch.cat([logits, torch.randn(3, classes, generator=generator)])
    ignored = torch.cat([labels, torch.full((3,), -100)])
    assert default_loss(more, ignored).item() == pytest.approx(default_loss(logits, labels).item(), rel=1e-5)

    def accuracy(x: Tensor, y: Tensor) -> float:
        return ts.Task(val=[(x, y)], metric="accuracy").evaluate(lambda each: each)

    assert accuracy(more, ignored) == pytest.approx(accuracy(logits, labels))


def test_dense_labels_are_compared_by_position() -> None:
    maps, labels = torch.randn(2, 5, 4, 4), torch.randint(5, (2, 4, 4))
    task = ts.Task(val=[(maps, labels)], metric="accuracy")
    assert task.evaluate(lambda x: x) == pytest.approx((maps.argmax(1) == labels).float().mean().item() * 100)


@pytest.mark.parametrize("label", [-1, 3, 7])
def test_labels_out_of_range_are_named_with_the_range(label: int) -> None:
    with pytest.raises(TaskError, match=rf"labels.*\[0, 3\).*3 outputs.*got .*{label}.*-100"):
        default_loss(torch.randn(2, 3), torch.tensor([1, label]))


def test_real_targets_are_compared_by_their_square() -> None:
    outputs, targets = torch.randn(6, 1), torch.randn(6, dtype=torch.float64)
    expected = (outputs[:, 0] - targets.float()).square().mean()
    assert default_loss(outputs, targets).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "metric.*nan on val"),
        (float("inf"), "metric.*inf on val"),
        (torch.ones(2), r"one number.*tensor.*\(2,\)"),
        (None, "one number, got NoneType"),
        ({"accuracy": 1.0}, "one number, got dict"),
    ],
)
def test_a_metric_that_is_not_one_number_is_refused(value: Any, message: str) -> None:
    task = ts.Task(val=[1], metric=lambda predict, batches: value)
    with pytest.raises(TaskError, match=message):
        task.evaluate(lambda x: x)


@pytest.mark.parametrize("value", [3, 3.0, True, torch.tensor(3.0), torch.tensor([3])])
def test_whatever_is_one_number_will_do(value: Any) -> None:
    assert ts.Task(val=[1], metric=lambda predict, batches: value).evaluate(len) == float(value)


def test_a_metric_without_labels_says_so() -> None:
    with pytest.raises(TaskError, match="'accuracy'.*labels.*Task.target.*None"):
        ts.Task(val=[(torch.randn(2, 3),)], metric="accuracy").evaluate(lambda x: x)


@pytest.mark.parametrize("make", [iter, lambda batches: (each for each in batches), lambda b: map(tuple, b)])
def test_what_can_be_read_only_once_is_refused(make: Any) -> None:
    with pytest.raises(TaskError, match="val.*iterator"):
        ts.Task(val=make([1]), metric="accuracy")


class Exhausting:
    """Gives its batches on the first pass only, as a loader around a stream does."""

    def __init__(self) -> None:
        self.batches = [(torch.randn(2, 3), torch.tensor([0, 1]))]

    def __iter__(self) -> Any:
        while self.batches:
            yield self.batches.pop()


def test_empty_and_used_up_splits_are_named() -> None:
    task = ts.Task(val=Exhausting(), metric="accuracy")
    assert 0 <= task.evaluate(lambda x: x) <= 100
    with pytest.raises(TaskError, match="val.*no batch.*used up"):
        task.evaluate(lambda x: x)
    with pytest.raises(TaskError, match="train gave no batch"):
        take_first([], "train")
    with pytest.raises(TaskError, match=r"no test batches; give Task\(test=...\)"):
        list(checked(None, "test"))
    with pytest.raises(TaskError, match=r"no test batches"):
        ts.Task(val=[1], metric=lambda predict, batches: len(list(batches))).evaluate(len, "test")


@pytest.mark.parametrize(
    ("higher", "values", "better"),
    [(True, (1.0, 2.0), True), (False, (1.0, 2.0), False), (True, (1.0, 1.0), False)],
)
def test_better_is_strict_and_has_a_direction(higher: bool, values: tuple[float, float], better: bool) -> None:
    metric = ts.Metric(fn=lambda predict, batches: 0.0, higher_is_better=higher)
    assert metric.better(values[1], values[0]) is better
    assert metric.better(values[1], None)


def test_a_predictor_runs_in_eval_mode_and_puts_every_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[2].eval()
    x = torch.randn(8, 3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = predictor(model)(x), predictor(model)(x)
    assert torch.equal(first, second)  # no dropout
    assert not first.requires_grad
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(self.training)

    with pytest.raises(ValueError, match="False"):
        predictor(fails := Fails())(x)
    assert fails.training


def test_calibration_reads_its_own_split_or_the_first_samples_of_train() -> None:
    data = DataLoader(TensorDataset(torch.arange(20.0).reshape(20, 1), torch.zeros(20)), batch_size=4)
    task = ts.Task(val=data, train=data, metric="mae")
    assert [each[0].tolist() for each in task.calibration_batches(samples=6)] == [
        [[0.0], [1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0], [7.0]],
    ]  # fmt: skip
    own = replace(task, calibration=[(torch.ones(3, 1), torch.zeros(3))] * 5)
    assert len(own.calibration_batches(samples=6)) == 5
    assert len(replace(task, train=None).calibration_batches()) == 5


def test_labels_of_any_integer_type_and_batches_without_one_that_counts() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    assert torch.equal(default_loss(logits, labels.int()), default_loss(logits, labels))
    nothing = default_loss(logits, torch.full((4,), -100))
    nothing.backward()
    assert nothing.item() == 0
    with pytest.raises(TaskError, match="real targets.*shape"):
        default_loss(logits, torch.randn(5))


def test_a_metric_may_ask_for_the_length_and_pass_twice() -> None:
    def metric(predict: object, batches: Any) -> float:
        return len(batches) + len(list(batches)) + len(list(batches))

    assert ts.Task(val=[1, 2], metric=metric).evaluate(len) == 6


@dataclass(frozen=True)
class Frozen:
    """A dataclass with a tensor in it."""

    value: Tensor
    name: str = "x"


def test_tensors_are_found_and_moved_wherever_they_are() -> None:
    tree = {
        "a": [torch.zeros(1), 2],
        "b": (Frozen(torch.ones(1)), None),
        "c": UserDict({"d": torch.full((1,), 2.0)}),
    }
    assert [each.item() for each in tensors(tree)] == [0, 1, 2]
    moved = to_device(tree, "meta")
    assert all(each.is_meta for each in tensors(moved))
    assert moved["b"][0].name == "x"
    assert not tree["b"][0].value.is_meta


class Ragged(torch.utils.data.Dataset[Any]):
    """Series of different lengths, which the default collate function cannot stack."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return torch.ones(3 + index, 2), index % 2


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_do_not_fit_into_a_batch_are_named(workers: int) -> None:
    loader: Any = torch.utils.data.DataLoader(Ragged(), batch_size=2, num_workers=workers)
    task = ts.Task(train=loader, val=loader, metric="accuracy")
    with pytest.raises(TaskError, match=r"samples of val do not fit.*collate_fn"):
        ts.compress(torch.nn.Linear(2, 2), task, [ts.Quantize("int8-dynamic")], runtime="eager")


def test_an_error_of_a_data_set_stays_as_it_is() -> None:
    class Broken(Ragged):
        def __getitem__(self, index: int) -> Any:
            raise RuntimeError("the file is missing")

    loader: Any = torch.utils.data.DataLoader(Broken(), batch_size=2)
    with pytest.raises(RuntimeError, match="the file is missing"):
        take_first(loader, "val")
