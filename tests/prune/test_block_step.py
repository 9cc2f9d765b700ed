"""The pruning step for residual blocks: rounds, masks, parts, latency, and a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support.residual_networks import PreNorm, Stack
from torchslim.core.parts import part_at
from torchslim.errors import PruneError


class Classifier(nn.Module):
    """Classes of sequences, with the layers in a part of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Stack(PreNorm)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(1)  # type: ignore[no-any-return]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Classifier()


def task() -> ts.Task:
    x = torch.randn(32, 6, 5, generator=torch.Generator().manual_seed(1))
    y = (x.mean((1, 2)) > 0).long()
    batches = [(x[:16], y[:16]), (x[16:], y[16:])]
    return ts.Task(train=batches, val=batches, metric="accuracy")


def context(**fields: Any) -> ts.Context:
    return ts.Context(**{"task": task(), "teacher": model(), "example_inputs": (torch.randn(2, 6, 5),)} | fields)


def step(**fields: Any) -> ts.Prune:
    return ts.Prune(**{"pattern": "block", **fields})


def blocks(outcome: Any) -> list[list[str]]:
    record = ts.surgery(outcome.model)
    assert record is not None
    return [round_["about"]["blocks"] for round_ in record["rounds"]]


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("criterion", [None, "influence"])
def test_rounds_reach_the_target_and_report_every_layer(criterion: str | None) -> None:
    outcome = step(sparsity=0.5, schedule="iterative", rounds=2, train=ts.Finetune(epochs=1), criterion=criterion)(
        model(), context()
    )
    assert len(blocks(outcome)) == 2
    assert size(outcome.model) <= 0.5 * size(model())
    lost = set(dict(model().named_parameters())) - set(dict(outcome.model.named_parameters()))
    gone = {record.layer for record in outcome.layers if record.reason == "removed with its block"}
    assert gone == {name.rpartition(".")[0] for name in lost}
    assert len(outcome.history) == 2


def test_masks_of_removed_weights_go_and_the_others_stay() -> None:
    first = ts.Prune(sparsity=0.4)(model(), context())
    outcome = step(blocks="body.layers.1*")(first.model, context(masks=first.masks))
    names = set(dict(outcome.model.named_parameters()))
    assert set(outcome.masks) == set(first.masks) & names
    assert set(first.masks) - names
    weights = dict(outcome.model.named_parameters())
    assert all(not weights[name][~mask].any() for name, mask in outcome.masks.items())


def test_a_part_loses_its_blocks_alone() -> None:
    whole = model()
    examples = (torch.randn(2, 6, 5),)
    outcome = step(sparsity=0.3)(whole, context(parts={"body": (examples,)}))
    record = ts.surgery(outcome.model)
    assert record is not None
    assert record["rounds"][0]["about"]["part"] == "body"
    assert size(part_at(outcome.model, "body")) <= 0.7 * size(part_at(model(), "body"))
    again = ts.prune.apply_surgery(model(), record)
    again.load_state_dict(outcome.model.state_dict())
    x = torch.randn(3, 6, 5)
    assert torch.equal(again.eval()(x), outcome.model.eval()(x))


class Bench:
    """Counts parameters in place of times."""

    def latency(
        self, models: Mapping[str, Callable[[], Any]], reference: nn.Module, *, again: bool = False
    ) -> dict[str, float]:
        return {name: size(make()) / size(reference) for name, make in models.items()}


def test_blocks_go_until_the_measured_latency_is_reached() -> None:
    outcome = step(sparsity=0.4, of="latency")(model(), context(workbench=Bench()))
    assert size(outcome.model) <= 0.6 * size(model())
    with pytest.raises(PruneError, match="needs a workbench"):
        step(sparsity=0.4, of="latency").check(context())


def test_a_resumed_step_gives_the_same_model(tmp_path: Path) -> None:
    fields = {"sparsity": 0.5, "schedule": "iterative", "rounds": 2, "train": ts.Finetune(epochs=1)}
    undisturbed = step(**fields)(model(), context(seed=3))

    class Killed(Exception):
        pass

    def kill(event: Any) -> None:
        if event.phase == "cut-2":
            raise Killed

    with pytest.raises(Killed):
        step(**fields)(model(), context(seed=3, state=tmp_path, key="k", progress=kill))
    resumed = step(**fields)(model(), context(seed=3, state=tmp_path, key="k"))
    assert blocks(resumed) == blocks(undisturbed)
    state = undisturbed.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either sparsity"),
        ({"sparsity": 0.3, "blocks": "a"}, "give either sparsity"),
        ({"sparsity": {"a": 0.3}}, "takes one sparsity"),
        ({"sparsity": 0.3, "of": "channels"}, "of must be one of.*'blocks'"),
        ({"sparsity": 0.3, "criterion": "lamp"}, "not known for blocks"),
        ({"sparsity": 0.3, "round_to": 8}, "round_to is for pattern 'channel'"),
        ({"sparsity": 0.3, "scope": "layer"}, "scope='layer'"),
        ({"sparsity": 0.3, "schedule": "gradual", "train": ts.Finetune(epochs=1)}, "'gradual' is not for"),
        ({"blocks": "a", "schedule": "iterative", "train": ts.Finetune(epochs=1)}, "named blocks go at once"),
        ({"pattern": "channel", "sparsity": 0.3, "blocks": "a"}, "blocks is for pattern 'block'"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        step(**fields)


def test_names_without_a_layer_are_refused_before_the_run() -> None:
    with pytest.raises(ts.errors.SelectError, match=r"near names: body.layers.1"):
        step(blocks="body.layer.1").check(context())
