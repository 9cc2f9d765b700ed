"""Reconstruction after pruning: exact where it can be, never worse, within masks, parts and padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from tests.support.channel_steps import context, wide
from torchslim.core.batches import batch_inputs, call
from torchslim.errors import PruneError
from torchslim.pipeline.recipe import parse_recipe
from torchslim.prune.reconstruction.reconstruct import Calibration, Solved, reconstruct


def forward(model: nn.Module, batch: Any) -> Any:
    return call(model, batch_inputs(batch))


def batches(*shape: int, count: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, *shape, generator=generator), torch.zeros(8)) for _ in range(count)]


def error(model: nn.Module, original: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - original(x)).double().square().sum()) for x, _ in data)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make().double().float().eval()


def redundant(layer: nn.Module, dim: int = 0) -> nn.Module:
    """The layer, with the second half of its outputs linear combinations of the first half."""
    half = layer.weight.shape[dim] // 2
    mix = torch.randn(half, half) / half**0.5
    with torch.no_grad():
        for parameter, along in ((layer.weight, dim), (layer.bias, 0)):
            first, second = parameter.movedim(along, 0).split(half)
            second.copy_((mix @ first.flatten(1) if first.dim() > 1 else mix @ first).view_as(second))
    return layer


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


EXACT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(redundant(nn.Linear(9, 12)), nn.Linear(12, 4)), (9,)),
    "conv1d": (lambda: nn.Sequential(redundant(nn.Conv1d(3, 8, 3)), nn.Conv1d(8, 6, 3, stride=2)), (3, 12)),
    "conv2d": (lambda: nn.Sequential(redundant(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 6, 3, bias=False)), (3, 8, 8)),
    "conv3d": (lambda: nn.Sequential(redundant(nn.Conv3d(2, 6, 2)), nn.Conv3d(6, 4, 2)), (2, 5, 5, 5)),
    "transposed": (
        lambda: nn.Sequential(
            redundant(nn.ConvTranspose2d(3, 8, 2, stride=2), 1), nn.ConvTranspose2d(8, 4, 3, stride=2)
        ),
        (3, 5, 5),
    ),
    "flattened": (lambda: nn.Sequential(redundant(nn.Conv2d(2, 6, 1)), nn.Flatten(), nn.Linear(24, 3)), (2, 2, 2)),
}


@pytest.mark.parametrize("name", EXACT)
def test_channels_that_depend_linearly_on_others_cost_nothing(name: str) -> None:
    make, shape = EXACT[name]
    model, data = seeded(make), batches(*shape)
    options: dict[str, Any] = {"of": "channels", "round_to": 1, "min_channels": 1, "criterion": "random"}
    plain = ts.prune.channels(model, (data[0][0],), 0.5, **options)
    solved = ts.prune.channels(model, (data[0][0],), 0.5, **options, reconstruct=data)
    assert {name: value.shape for name, value in solved.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    fresh = batches(*shape, seed=5)
    assert error(solved, model, fresh) < 1e-4 * error(plain, model, fresh)


class Branches(nn.Module):
    """Grouped, depthwise and shared layers, a norm and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.norm = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.shared = nn.Conv2d(16, 16, 3, groups=4, padding=1), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.point(torch.relu(self.depth(x)))) + x)
        x = torch.relu(self.grouped(x)).mean((2, 3))
        return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 50), count=st.sampled_from([1, 3, 7]), sparsity=st.sampled_from([0.2, 0.5]))
def test_outputs_come_nearer(seed: int, count: int, sparsity: float) -> None:
    model, data = seeded(Branches), batches(3, 8, 8, count=count, seed=seed)
    options: dict[str, Any] = {"of": "params", "round_to": 2, "min_channels": 2, "criterion": "random", "seed": seed}
    plain = ts.prune.channels(model, (data[0][0],), sparsity, **options)
    solved = ts.prune.channels(model, (data[0][0],), sparsity, **options, reconstruct=data)
    again = ts.prune.channels(model, (data[0][0],), sparsity, **options, reconstruct=data)
    assert error(solved, model, data) < error(plain, model, data)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in solved.state_dict().items())
    assert torch.equal(solved.norm.running_mean, plain.norm.running_mean)  # the data pass leaves the state alone


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"pattern": "slice", "dim": 1, "sparsity": 0.5}]
)
def test_masked_weights_stay_zero(options: dict[str, Any]) -> None:
    model, data, layers = seeded(Branches), batches(3, 8, 8), ("point", "grouped", "shared")
    plain = ts.prune.weights(model, **options, include=layers, scope="layer")
    solved = ts.prune.weights(model, **options, include=layers, scope="layer", reconstruct=data)
    for name, weight in plain.named_parameters():
        assert bool((solved.get_parameter(name)[weight == 0] == 0).all()) or weight.dim() == 1, name
    assert error(solved, model, data) < 0.7 * error(plain, model, data)


class Sentences(nn.Module):
    """A transformer whose own layout is samples first, or positions first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.table, self.batch_first = nn.Embedding(30, 16), batch_first
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return self.head(x[:, 0] if self.batch_first else x[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_does_not_count(batch_first: bool) -> None:
    model = seeded(lambda: Sentences(batch_first))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 7, (6, 5, 1), generator=generator)
    masks = [(torch.arange(7) < each).long() for each in lengths]
    ids = torch.randint(0, 30, (6, 5, 7), generator=generator)
    data = [{"ids": each, "attention_mask": mask} for each, mask in zip(ids, masks, strict=True)]
    other = [{**batch, "ids": torch.where(batch["attention_mask"] == 1, batch["ids"], 3)} for batch in data]
    plain, *solved = (ts.prune.weights(model, 0.5, reconstruct=given_) for given_ in (False, data, other))
    for name, weight in solved[0].named_parameters():
        torch.testing.assert_close(weight, solved[1].get_parameter(name), rtol=1e-3, atol=1e-4)
    assert not torch.equal(plain.encoder.layers[0].linear1.weight, solved[0].encoder.layers[0].linear1.weight)
    unmasked = [{**batch, "attention_mask": torch.ones(5, 7)} for batch in data]
    everything = ts.prune.weights(model, 0.5, reconstruct=unmasked)
    assert not torch.allclose(everything.encoder.layers[0].linear1.weight, solved[0].encoder.layers[0].linear1.weight)


def test_weights_that_cannot_be_solved_for_are_left_and_said() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return self.normed(self.inner(self.table(ids))) @ self.table.weight.T

    model = seeded(Tied)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.inner.weight[:4] = 0
    before = copy.deepcopy(pruned.state_dict())
    data = Calibration(batches=[(torch.randint(0, 9, (16,)), torch.zeros(16)) for _ in range(5)], forward=forward)
    results = {result.weight: result for result in reconstruct(model, pruned, data)}
    assert results["table.weight"].reason == "embedding reads it"
    assert set(results) == {"table.weight", "inner.weight"}  # a parametrization computes the other one
    assert {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])} == {
        "inner.weight",
        "inner.bias",
    }


def test_too_few_samples_and_too_large_layers_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    pruned = ts.prune.weights(model, sparsity=0.5)
    one = Calibration(batches=[(torch.randn(1, 4), torch.zeros(1))], forward=forward)
    (result,) = reconstruct(model, pruned, one)
    assert result.reason == "too few samples to hold some out"
    monkeypatch.setattr("torchslim.prune.reconstruction.reconstruct.MOST_BYTES", 100)
    (result,) = reconstruct(model, pruned, Calibration(batches=batches(4), forward=forward))
    assert "too much memory" in result.reason


def step(**fields: Any) -> ts.Prune:
    return ts.Prune(pattern="channel", sparsity=0.5, round_to=4, min_channels=4, reconstruct=True, **fields)


@pytest.mark.slow
def test_the_step_records_what_it_solved_for() -> None:
    original, ctx = wide(), context()
    outcome = step()(wide(), ctx)
    plain = replace(step(), reconstruct=False)(wide(), ctx)
    x = toy.images(64, 1)[0]
    assert error(outcome.model, original, [(x, x)]) < error(plain.model, original, [(x, x)])
    reasons = {record.layer: record.reason for record in outcome.layers}
    assert "; reconstructed: the error of its output " in reasons["back"]
    assert "reconstructed" in reasons["head"]
    assert not any("reconstructed" in record.reason for record in plain.layers)


@pytest.mark.slow
def test_single_weights_in_a_step_and_the_recipe() -> None:
    text = 'model = "m:f"\ntask = "m:t"\n[[step]]\ndo = "prune"\nsparsity = 0.8\nreconstruct = true\n'
    (pruning,) = parse_recipe(text, "recipe.toml").steps
    original, ctx = wide(), context()
    outcome, plain = pruning(wide(), ctx), replace(pruning, reconstruct=False)(wide(), ctx)
    x = toy.images(64, 1)[0]
    assert error(outcome.model, original, [(x, x)]) < error(plain.model, original, [(x, x)])
    for name, mask in outcome.masks.items():
        assert torch.equal(mask, plain.masks[name])
        assert not outcome.model.get_parameter(name)[~mask].any()


@pytest.mark.slow
def test_only_the_part_changes() -> None:
    whole = seeded(lambda: nn.Sequential(wide(), nn.Linear(toy.CLASSES, 8), nn.Linear(8, toy.CLASSES)))
    ctx = context(teacher=whole, parts={"0": [(toy.images(4, 2)[0],)]})
    outcome = step()(copy.deepcopy(whole), ctx)
    assert all(torch.equal(value, outcome.model[1].state_dict()[name]) for name, value in whole[1].state_dict().items())
    assert any("reconstructed" in record.reason and record.layer.startswith("0.") for record in outcome.layers)


@pytest.mark.slow
def test_a_resumed_step_gives_the_same(tmp_path: Path) -> None:
    ctx = context(state=tmp_path, key="k")
    first, resumed = (step()(wide(), ctx) for _ in range(2))
    assert (tmp_path / "cut.ckpt").exists()
    assert first.layers == resumed.layers
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in first.model.state_dict().items())


def test_refused() -> None:
    with pytest.raises(PruneError, match="not for schedule 'gradual'"):
        ts.Prune(sparsity=0.5, schedule="gradual", train=ts.Finetune(epochs=1), reconstruct=True)
    with pytest.raises(PruneError, match="needs data"):
        ts.prune.weights(nn.Linear(2, 2), 0.5, reconstruct=True)
    assert str(Solved(weight="a", reason="why")) == "not reconstructed: why"


class Deep(nn.Module):
    """Three residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def test_layers_behind_removed_blocks_are_solved_for() -> None:
    model, data = seeded(Deep), batches(6)
    plain, solved = (
        ts.prune.blocks(model, (data[0][0],), blocks="branches.1", reconstruct=given_) for given_ in (False, data)
    )
    assert error(solved, model, data) < 0.5 * error(plain, model, data)
    assert ts.surgery(solved) == ts.surgery(plain)
