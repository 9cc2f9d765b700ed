"""The training loop: what it does to weights, what it keeps, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import models, toy
from torchslim.core.batches import predictor
from torchslim.core.fingerprint import fingerprint
from torchslim.errors import TaskError, TrainError
from torchslim.training.loop import Hook, LabelLoss, Loop
from torchslim.training.optimizer import OptimizerSettings


def train(model: nn.Module, task: ts.Task, **options: Any) -> Any:
    settings = OptimizerSettings(optimizer="sgd", lr=0.05)
    return ts.fit(model, task.train, LabelLoss(task), **{"epochs": 3, "settings": settings, "evaluate": task} | options)


def plain_loop(model: nn.Module, batches: list[Any], epochs: int, settings: OptimizerSettings) -> None:
    """What `fit` must equal, written down as in a textbook."""
    optimizer, steps = settings.build(model), len(batches) * epochs
    model.train()
    for number, (x, y) in enumerate(batches * epochs):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * settings.factor((number + 0.5) / steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fit_is_the_textbook_loop(optimizer: str, schedule: Any, clip_norm: float | None) -> None:
    settings = OptimizerSettings(
        optimizer=optimizer, lr=0.02, weight_decay=0.1, schedule=schedule, warmup=0.3, clip_norm=clip_norm
    )
    batches = [toy.images(16, seed) for seed in range(4)]
    expected, model = toy.model(), toy.model()
    plain_loop(expected, batches, 3, settings)
    task = replace(toy.task(), train=batches)
    report = train(model, task, settings=settings, evaluate=None)
    for name, value in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name
    assert [row["epoch"] for row in report.history] == [1, 2, 3]
    assert [row["lr"] for row in report.history] == pytest.approx(
        [settings.lr * settings.factor((4 * epoch - 0.5) / 12) for epoch in (1, 2, 3)]
    )


def test_a_rows_loss_is_the_mean_over_its_batches() -> None:
    batches = [toy.images(16, seed) for seed in range(3)]
    task, model = replace(toy.task(), train=batches), toy.model()
    settings = OptimizerSettings(lr=1e-12)
    with torch.no_grad():
        expected = [nn.functional.cross_entropy(toy.model().train()(x), y).item() for x, y in batches]
    row = train(model, task, epochs=1, settings=settings).history[0]
    assert row["loss_label"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert row["val"] == task.evaluate(predictor(model))


def test_a_caller_who_switched_gradients_off_can_train() -> None:
    model, expected = toy.model(), toy.model()
    train(expected, toy.task())
    with torch.no_grad():
        train(model, toy.task())
        assert not torch.is_grad_enabled()
    assert fingerprint(model.state_dict()) == fingerprint(expected.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_training_follows_the_models_dtype(dtype: torch.dtype) -> None:
    x, y = torch.randn(32, 4, dtype=dtype), torch.randint(3, (32,))
    task = ts.Task(val=[(x, y)], train=[(x, y)] * 5, metric="accuracy")
    model = nn.Linear(4, 3, dtype=dtype)
    report = train(model, task, evaluate=None)
    assert model.weight.dtype == dtype
    assert report.history[-1]["loss_label"] < report.history[0]["loss_label"]


@pytest.mark.parametrize("make", [models.Recurrent, models.Encoder, models.CrossAttention])
def test_every_family_of_models_trains(make: Any) -> None:
    model = make()
    inputs = {
        models.Recurrent: (torch.randn(4, 6, 5),),
        models.Encoder: (torch.randint(models.WORDS, (4, 6)),),
        models.CrossAttention: (torch.randn(4, 3, 8), torch.randn(4, 5, 6), torch.randn(4, 5, 4)),
    }[make]
    outputs = predictor(model)(*inputs)
    target = torch.randn(4, 3, 8) if make is models.CrossAttention else torch.randint(3, outputs.shape[:-1])
    task = ts.Task(val=[(*inputs, target)], train=[(*inputs, target)] * 10, metric=lambda predict, data: 0.0)
    report = train(model, task, evaluate=None)
    assert report.history[-1]["loss_label"] < report.history[0]["loss_label"]


def test_a_single_step_learns_something() -> None:
    task, model = replace(toy.task(), train=[toy.images(16, 0)]), toy.model()
    train(model, task, epochs=1)
    assert (model.head.weight - toy.model().head.weight).abs().max() > 1e-4


def test_the_best_epoch_is_kept_or_the_last() -> None:
    values = iter([0.2, 0.9, 0.5])
    seen: list[Tensor] = []

    def metric(predict: Any, batches: Any) -> float:
        seen.append(model.head.weight.detach().clone())
        return next(values)

    task, model = replace(toy.task(), metric=metric), toy.model()
    report = train(model, task)
    assert (report.best_epoch, report.best_value) == (2, 0.9)
    assert torch.equal(model.head.weight, seen[1])
    other = toy.model()
    train(other, toy.task(), evaluate=None)
    assert not torch.equal(other.head.weight, model.head.weight)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, batch: outputs.square(), r"loss 'label'.*one number.*\(16, 4\).*mean"),
        (lambda outputs, batch: 1.0, "loss 'label'.*one number.*got float"),
        (lambda outputs, batch: outputs.detach().sum(), r"no loss.*trainable.*label"),
        (lambda outputs, batch: outputs.sum() * math.inf, r"'fit', epoch 1, batch 1.*no finite loss.*lr.*0.05"),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_be_trained_on_says_why(loss: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        train(toy.model(), replace(toy.task(), loss=loss))


def test_a_gradient_that_is_not_finite_is_found_before_it_is_clipped() -> None:
    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs * 0).abs().sqrt().sum()  # finite, with an infinite slope

    settings = OptimizerSettings(clip_norm=1.0)
    with pytest.raises(TrainError, match="gradient.*norm.*nan.*'fit', epoch 1, batch 1"):
        train(toy.model(), replace(toy.task(), loss=loss), settings=settings)


@pytest.mark.parametrize("engine", [ts.Engine(accelerator="abacus"), ts.Engine(precision="7"), ts.Engine(strategy="x")])
def test_an_engine_that_is_not_there_is_an_error(engine: ts.Engine) -> None:
    with pytest.raises(TrainError, match=r"Engine\(.*cannot be used here: "):
        train(toy.model(), toy.task(), engine=engine)


def test_no_data_and_no_labels_are_errors_before_any_work() -> None:
    ctx = ts.Context(task=replace(toy.task(), train=None), teacher=toy.model(), example_inputs=())
    unlabeled = replace(ctx, task=replace(toy.task(), train=[(torch.randn(4, 1, 8, 8),)]))
    for step in (ts.Finetune(), ts.Distill(), ts.Prune(sparsity=0.5, train=ts.Finetune())):
        with pytest.raises(TaskError, match=r"no train batches; give Task\(train=...\)"):
            step.check(ctx)
    for step in (ts.Finetune(), ts.Prune(sparsity=0.5, train=ts.Finetune())):
        with pytest.raises(TrainError, match="Finetune.*labels.*Task.target.*None"):
            step.check(unlabeled)
        step.check(replace(ctx, task=replace(unlabeled.task, loss=lambda outputs, batch: outputs.mean())))
    with pytest.raises(TaskError, match="train gave no batch"):
        train(toy.model(), replace(toy.task(), train=[]))


def test_lower_may_be_better_and_ties_keep_the_earlier_epoch() -> None:
    values = iter([3.0, 1.0, 1.0])
    metric = ts.Metric(fn=lambda predict, batches: next(values), higher_is_better=False)
    report = train(toy.model(), replace(toy.task(), metric=metric))
    assert (report.best_epoch, report.best_value) == (2, 1.0)


def test_only_a_settled_epoch_is_kept_with_its_own_masks() -> None:
    values, scores = iter([9.0, 5.0, 7.0, 1.0]), torch.rand(8, 8, 3, 3)
    masks = [scores < level for level in (0.9, 0.7, 0.5, 0.3)]

    class Moves(Hook):
        def on_epoch(self, loop: Loop) -> None:
            loop.masks["conv2.weight"] = masks[loop.epoch - 1]

        def settled(self, loop: Loop) -> bool:
            return loop.epoch >= 2

    model, task = toy.model(), replace(toy.task(), metric=lambda predict, batches: next(values))
    report = train(model, task, epochs=4, hooks=[Moves()])
    assert (report.best_epoch, report.best_value) == (3, 7.0)
    assert torch.equal(report.masks["conv2.weight"], masks[2])
    assert torch.equal(model.conv2.weight != 0, masks[2])


def test_the_last_epoch_is_kept_where_it_is_asked_for() -> None:
    model, expected = toy.model(), toy.model()
    ctx = ts.Context(task=toy.task(), teacher=model, example_inputs=())
    outcome = ts.Finetune(epochs=2, keep="last")(model, ctx)
    train(expected, toy.task(), epochs=2, evaluate=None, settings=OptimizerSettings())
    assert fingerprint(model.state_dict()) == fingerprint(expected.state_dict())
    assert [record.reason for record in outcome.layers] == ["last epoch"]
    assert "val" not in outcome.history[0]


def test_a_penalty_is_trained_on_and_logged_by_itself() -> None:
    class Shrink(Hook):
        def __init__(self, strength: float) -> None:
            self.strength = strength

        def penalty(self, loop: Loop) -> Tensor:
            return self.strength * loop.model.conv2.weight.abs().sum()

    free, held = toy.model(), toy.model()
    train(free, toy.task(), evaluate=None)
    report = train(held, toy.task(), hooks=[Shrink(0.05), Shrink(0.0)], evaluate=None)
    assert held.conv2.weight.abs().sum() < 0.5 * free.conv2.weight.abs().sum()
    row = report.history[-1]
    assert row.keys() == {"epoch", "loss_label", "loss_penalty", "loss_penalty_1", "lr"}
    assert row["loss_penalty"] > 0
    assert row["loss_penalty_1"] == 0


def test_progress_counts_every_step_and_says_which_step_it_is() -> None:
    events: list[ts.Event] = []
    train(toy.model(), toy.task(), epochs=2, progress=events.append, step_name="mine", phase="again")
    assert [event.current for event in events] == list(range(1, 17))
    assert {(event.step, event.phase, event.total) for event in events} == {("mine", "again", 16)}
    assert [event.values["epoch"] for event in events] == [1] * 8 + [2] * 8


# accumulated gradients ------------------------------------------------------------------------------------------------


class Unsized:
    """A loader that does not know its length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


class Norm(Hook):
    """A penalty, and the progress that hooks see after every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def penalty(self, loop: Loop) -> Tensor:
        return 0.1 * sum(parameter.square().sum() for parameter in loop.model.parameters())

    def on_step(self, loop: Loop) -> None:
        self.seen.append((loop.step, loop.step_in_epoch, loop.progress if loop.steps_per_epoch else 0.0))


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(["sgd", "adamw"]), st.booleans())
def test_a_step_on_several_batches_is_a_step_on_their_union(
    count: int, accumulate: int, name: str, sized: bool
) -> None:
    """The last step of an epoch may have fewer batches, and follows the mean of those."""
    generator = torch.Generator().manual_seed(count)
    batches = [
        (torch.randn(4, 3, generator=generator, dtype=torch.float64), torch.randint(3, (4,), generator=generator))
        for _ in range(count)
    ]
    groups = [batches[start : start + accumulate] for start in range(0, count, accumulate)]
    unions = [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]
    results = []
    for data, size in ((batches, accumulate), (unions, 1)):
        torch.manual_seed(0)
        model, hook, events = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double(), Norm(), []
        task = ts.Task(train=data if sized else Unsized(data), val=batches, metric="accuracy")
        settings = OptimizerSettings(optimizer=name, lr=0.1, warmup=0.3, clip_norm=0.5, accumulate=size)
        mask = {"0.weight": torch.arange(15).view(5, 3) % 2 == 0}
        report = train(
            model, task, epochs=2, settings=settings, hooks=[hook], evaluate=None, masks=mask, progress=events.append
        )
        steps = [(event.current, event.total, event.values["epoch"]) for event in events]
        results.append((model.state_dict(), hook.seen, steps, report.history))
    (weights, seen, steps, history), (expected, *others) = results
    assert all(torch.allclose(weights[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)
    assert [seen, steps] == others[:2]
    assert [row["lr"] for row in history] == [row["lr"] for row in others[2]]
    if count % accumulate == 0:  # else the batches of the last step count less in the mean over unions
        for row, other in zip(history, others[2], strict=True):
            assert row == pytest.approx(other)


def test_a_rows_loss_is_the_mean_over_its_batches_whatever_a_step_takes() -> None:
    batches, settings = [toy.images(16, seed) for seed in range(5)], OptimizerSettings(lr=1e-12)
    task = replace(toy.task(), train=batches)
    rows = [
        train(toy.model(), task, epochs=1, settings=replace(settings, accumulate=size)).history[0] for size in (1, 3, 9)
    ]
    assert [row["loss_label"] for row in rows] == pytest.approx([rows[0]["loss_label"]] * 3, rel=1e-5)


def test_a_broken_loss_names_its_batch_inside_of_a_step() -> None:
    batches = [toy.images(16, seed) for seed in range(5)]
    batches[3][0].fill_(math.nan)
    settings = OptimizerSettings(accumulate=2)
    with pytest.raises(TrainError, match=r"nan.*'fit', epoch 1, batch 4"):
        train(toy.model(), replace(toy.task(), train=batches), settings=settings)


# early stopping -------------------------------------------------------------------------------------------------------


class SettledFrom(Hook):
    """A schedule that runs in the first epochs."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def settled(self, loop: Loop) -> bool:
        return loop.epoch >= self.epoch


def expected_stop(values: list[int], patience: int, settled: int) -> tuple[int, int | None]:
    """The number of epochs and the best one, epoch by epoch as the documentation says."""
    best, waited = None, 0
    for epoch, value in enumerate(values, 1):
        if epoch >= settled:
            if best is None or value > values[best - 1]:
                best, waited = epoch, 0
            else:
                waited += 1
        if waited == patience:
            return epoch, best
    return len(values), best


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 4))
def test_training_stops_after_so_many_epochs_without_a_better_one(
    values: list[int], patience: int, settled: int
) -> None:
    given_values, events = iter(values), []
    batch = (torch.ones(2, 3), torch.tensor([0, 1]))
    task = ts.Task(train=[batch], val=[batch], metric=lambda predict, batches: float(next(given_values)))
    report = train(
        nn.Linear(3, 2), task, epochs=len(values), patience=patience, hooks=[SettledFrom(settled)],
        progress=events.append,
    )  # fmt: skip
    epochs, best = expected_stop(values, patience, settled)
    assert (len(report.history), report.best_epoch) == (epochs, best)
    early = epochs < len(values)
    assert bool(report.stopped) == early
    if early:
        assert all(str(number) in report.stopped for number in (epochs, len(values), patience))
        assert report.history[-1]["since_best"] == patience
    assert (events[-1].current, events[-1].total) == (epochs, epochs), "nothing is left to do"


def test_the_report_of_a_step_says_why_it_stopped() -> None:
    values = iter([3.0, 2.0, 1.0, 0.0])
    task = replace(toy.task(), metric=lambda predict, batches: next(values))
    ctx = ts.Context(task=task, teacher=toy.model(), example_inputs=())
    outcome = ts.Finetune(epochs=9, patience=2)(toy.model(), ctx)
    assert outcome.layers[0].reason == "best epoch 1"
    assert "after epoch 3 of 9" in outcome.layers[1].reason
    assert [row["since_best"] for row in outcome.history] == [0, 1, 2]


def test_patience_needs_a_metric() -> None:
    with pytest.raises(TrainError, match=r"patience=2.*evaluate=task"):
        train(toy.model(), toy.task(), evaluate=None, patience=2)
    with pytest.raises(TrainError, match=r"patience=2.*keep='best'"):
        ts.Finetune(patience=2, keep="last")
