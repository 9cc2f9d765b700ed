"""What every criterion promises, run over every registered one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from tests.support.states import model_state
from torchslim.errors import PruneError
from torchslim.prune import CRITERIA, Statistic
from torchslim.prune.criteria.scoring import channel_scores, score
from torchslim.prune.criteria.statistics import Gathered, gather

NAMES = list(CRITERIA)
ELEMENTWISE = [name for name, each in CRITERIA.items() if each.weights is not None]
CHANNELS_ONLY = [name for name in NAMES if name not in ELEMENTWISE]
WITH_DATA = [name for name, each in CRITERIA.items() if each.needs]
SLICES = [name for name in NAMES if name != "bn_scale"]  # scales have no slices


def data() -> list[Any]:
    return [toy.images(16, seed) for seed in (1, 2)]


def statistics(gathered: Gathered, path: str, **more: Any) -> ts.prune.Statistics:
    return gathered.of(path, generator=torch.Generator().manual_seed(3), **more)


@pytest.fixture(scope="module")
def gathered() -> Gathered:
    return gather(toy.model(), Statistic, data())


def test_the_table_says_what_each_is() -> None:
    assert {"l1", "l2", "random", "bn_scale", "fpgm", "lamp", "taylor", "taylor_activation", "fisher", "activation", "apoz", "wanda"} == set(NAMES)  # fmt: skip
    for name, criterion in CRITERIA.items():
        assert criterion.name == name
        assert criterion.about.endswith(".")
        documented = criterion.weights or criterion.channels
        assert "Shapes:" in documented.__doc__
        assert "Source:" in documented.__doc__ or name == "random"


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_single_weights_get_a_finite_score_each(name: str, gathered: Gathered) -> None:
    model = toy.model()
    for path in ("conv1.weight", "conv2.weight", "head.weight"):
        weight = model.get_parameter(path)
        before = weight.clone()
        scores = score(CRITERIA[name], weight, statistics(gathered, path))
        assert scores.shape == weight.shape
        assert scores.dtype in (torch.float32, torch.float64)
        assert bool((scores >= 0).all())
        assert torch.equal(weight, before)
        assert not scores.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_channels_get_a_finite_score_each_or_the_criterion_says_nothing(name: str, gathered: Gathered) -> None:
    model, said = toy.model(), 0
    for path, weight in model.named_parameters():
        for dim, role in enumerate(("out", "in", "other", "other")[: weight.dim()]):
            norm = path == "bn1.weight"
            scores = channel_scores(name, weight, dim, statistics(gathered, path, role=role, norm_scale=norm))
            again = channel_scores(
                name, weight, dim - weight.dim(), statistics(gathered, path, role=role, norm_scale=norm)
            )
            if scores is None:
                assert again is None
                continue
            said += 1
            assert scores.shape == (weight.shape[dim],)
            assert bool((scores >= 0).all())
            assert torch.equal(scores, again)
            assert not scores.requires_grad
    assert said


@pytest.mark.parametrize("name", NAMES)
def test_permuting_channels_permutes_scores(name: str) -> None:
    def permuted(model: nn.Module, order: Tensor) -> nn.Module:
        with torch.no_grad():
            model.conv2.weight.copy_(model.conv2.weight[order][:, order])
            model.conv2.bias.copy_(model.conv2.bias[order])
            model.head.weight.copy_(model.head.weight[:, order])
            model.conv1.weight.copy_(model.conv1.weight[order])
            for each in (model.bn1.weight, model.bn1.bias):
                each.copy_(each[order])
        return model

    if name == "random":
        pytest.skip("its scores are drawn for places, not for weights")
    torch.manual_seed(5)
    order = torch.randperm(8)
    plain = toy.model().double()
    with torch.no_grad():
        plain.bn1.weight.uniform_(0.5, 1.5)
    other = permuted(toy.model().double(), order)
    with torch.no_grad():
        other.bn1.weight.copy_(plain.bn1.weight[order])
    batches = [(images.double(), labels) for images, labels in data()]
    one, two = (gather(model, CRITERIA[name].needs, batches) for model in (plain, other))
    for path, dim, role in (
        ("conv2.weight", 0, "out"),
        ("conv2.weight", 1, "in"),
        ("bn1.weight", 0, "out"),
        ("head.weight", 1, "in"),
    ):
        found = [
            channel_scores(
                name, model.get_parameter(path), dim, statistics(each, path, role=role, norm_scale=path == "bn1.weight")
            )
            for model, each in ((plain, one), (other, two))
        ]
        assert (found[0] is None) == (found[1] is None)
        if found[0] is not None:
            torch.testing.assert_close(found[1], found[0][order], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("pattern", ["unstructured", "slice", "2:4"])
def test_single_weights_can_be_pruned_in_every_pattern(name: str, pattern: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    batches = [(torch.randn(16, 8), torch.randint(8, (16,)))]
    pruned = ts.prune.weights(model, None if ":" in pattern else 0.5, criterion=name, pattern=pattern, batches=batches)
    assert int((pruned[0].weight == 0).sum()) == 32


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_can_be_pruned_where_the_criterion_ranks_them(name: str, dim: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [(torch.randn(16, 8), torch.randint(4, (16,)))]
    if name in CHANNELS_ONLY and dim == 1:
        with pytest.raises(PruneError, match=f"0.weight.*'{name}'.*no scores"):
            ts.prune.weights(model, 0.5, criterion=name, pattern="slice", dim=dim, include="0", batches=batches)
        return
    pruned = ts.prune.weights(model, 0.5, criterion=name, pattern="slice", dim=dim, include="0", batches=batches)
    assert sum(not row.any() for row in pruned[0].weight.unbind(dim)) == 4


@pytest.mark.parametrize("name", CHANNELS_ONLY)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_what_ranks_channels_only_is_refused_for_single_weights_with_those_that_can(name: str, pattern: str) -> None:
    with pytest.raises(PruneError, match=f"'{name}'.*whole channels.*{', '.join(ELEMENTWISE)}"):
        ts.Prune(sparsity=0.5, criterion=name, pattern=pattern)


@pytest.mark.parametrize("name", WITH_DATA)
def test_what_needs_data_says_so_and_what_needs_none(name: str) -> None:
    labels = ".*labels" if CRITERIA[name].needs_loss else "(?! with labels)"
    message = rf"'{name}' needs data.*batches=\.\.\.{labels}.*l1, l2, random, bn_scale, fpgm, lamp"
    with pytest.raises(PruneError, match=message):
        ts.prune.weights(toy.model(), 0.5, criterion=name, pattern="slice")
    with pytest.raises(PruneError, match=message):
        channel_scores(name, torch.ones(3, 3), 0, statistics(Gathered(), "weight"))


@pytest.mark.filterwarnings("ignore:emptied")
@pytest.mark.parametrize("name", SLICES)
def test_the_model_and_the_random_state_stay_as_they_were_and_seeds_decide(name: str) -> None:
    model = toy.model()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    before, state = model_state(model), torch.get_rng_state()
    results = [
        ts.prune.weights(model, 0.5, criterion=name, pattern="slice", batches=data(), seed=4).state_dict()
        for _ in range(2)
    ]
    assert model_state(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
