"""Models that compute activations again in the backward pass: every step does to them as to the model without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchslim as ts
from tests.support import toy
from torchslim.core.fingerprint import fingerprint

STEPS: dict[str, Any] = {
    "finetune": ts.Finetune(epochs=1, accumulate=3),
    "distill": ts.Distill(epochs=1, feature=ts.distill.Hint(), relation=ts.distill.RKD(), taps={"body.2": "body.2"}),
    "prune gradually": ts.Prune(sparsity=0.5, criterion="taylor", schedule="gradual", train=ts.Finetune(epochs=1)),
    "prune channels": ts.Prune(
        sparsity=0.5, pattern="channel", criterion="taylor_activation", round_to=1, min_channels=1,
        train=ts.Finetune(epochs=1),
    ),
    "train on the grid": ts.Quantize("int8", mode="qat", train=ts.Finetune(epochs=1)),
}  # fmt: skip


class Net(nn.Module):
    """A body with dropout, which must draw the same numbers again; batch norms would count their batches twice."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 1), nn.Dropout(0.1)
        )
        self.head = nn.Linear(8, toy.CLASSES)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head((torch.relu(y) + x).mean((2, 3)))


def taken(step: Any, reentrant: bool | None) -> ts.Outcome:
    """The outcome of a step on a model that checkpoints its body, or not, with None."""
    torch.manual_seed(0)
    model, task = Net(reentrant), toy.task()
    teacher = Net(None)
    ctx = ts.Context(task=task, teacher=teacher, model=model, example_inputs=task.inputs(next(iter(task.val))), seed=1)
    step.check(ctx)
    outcome: ts.Outcome = step(model, ctx)
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, in calls without gradients
def test_a_step_does_the_same_to_a_checkpointed_model(name: str) -> None:
    plain = taken(STEPS[name], None)
    for reentrant in (False, True):
        outcome = taken(STEPS[name], reentrant)
        assert fingerprint(outcome.model.state_dict()) == fingerprint(plain.model.state_dict()), reentrant
        assert outcome.history == plain.history


def bert(reentrant: bool | None) -> nn.Module:
    """A small text classifier of transformers, with its own switch for checkpoints."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    return model


def sentences() -> ts.Task:
    words = torch.randint(20, (32, 6), generator=torch.Generator().manual_seed(0))
    batches = [
        {"input_ids": words[:16], "labels": words[:16, 0] % 3},
        {"input_ids": words[16:], "labels": words[16:, 0] % 3},
    ]
    return ts.Task(train=batches, val=batches, metric="accuracy")


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["finetune", "distill", "prune channels", "train on the grid"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_step_does_the_same_to_a_model_of_transformers(name: str, reentrant: bool) -> None:
    step = ts.Distill(epochs=1, relation=ts.distill.RKD()) if name == "distill" else STEPS[name]
    outcomes = []
    for kind in (None, reentrant):
        model, task = bert(kind), sentences()
        inputs = task.inputs(next(iter(task.val)))
        outcomes.append(
            step(model, ts.Context(task=task, teacher=bert(None), model=model, example_inputs=inputs, seed=1))
        )
    assert fingerprint(outcomes[1].model.state_dict()) == fingerprint(outcomes[0].model.state_dict())
    assert outcomes[1].history == outcomes[0].history
