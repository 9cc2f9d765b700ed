"""Each criterion's numbers against a reference in NumPy, how scores are combined, and pruning by data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from torchslim.errors import PruneError, TaskError
from torchslim.prune import CRITERIA, Criterion, Statistic, Statistics
from torchslim.prune.criteria.registry import find_criterion, needs
from torchslim.prune.criteria.scoring import channel_scores, combine, score
from torchslim.prune.criteria.statistics import gather

EVERYTHING = frozenset(Statistic)
# few distinct values: ties and zeros are the rule
VALUES = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0, -3.0, 0.125])
WEIGHTS = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)), elements=VALUES)
DIMS = st.integers(0, 2)


def known(**fields: Any) -> Statistics:
    return Statistics(name=fields.pop("name", "layer.weight"), generator=torch.Generator().manual_seed(0), gathered=EVERYTHING, **fields)  # fmt: skip


def single(name: str, weight: np.ndarray, **fields: Any) -> np.ndarray:
    return score(CRITERIA[name], torch.from_numpy(weight), known(**fields)).numpy()


def channels(name: str, weight: np.ndarray, dim: int, **fields: Any) -> np.ndarray:
    found = channel_scores(name, torch.from_numpy(weight), dim, known(**fields))
    assert found is not None
    return found.numpy()


def rows(weight: np.ndarray, dim: int) -> list[np.ndarray]:
    return [np.take(weight, index, dim).flatten() for index in range(weight.shape[dim])]


@given(WEIGHTS, DIMS)
def test_norms_are_sums_of_magnitudes_and_of_squares(weight: np.ndarray, dim: int) -> None:
    assert np.array_equal(single("l1", weight), np.abs(weight))
    assert np.array_equal(single("l2", weight), np.abs(weight))
    assert channels("l1", weight, dim) == pytest.approx([sum(map(abs, row)) for row in rows(weight, dim)])
    assert channels("l2", weight, dim) == pytest.approx([sum(x * x for x in row) ** 0.5 for row in rows(weight, dim)])


@given(WEIGHTS, DIMS)
def test_geometric_median_scores_are_explicit_sums_of_distances(weight: np.ndarray, dim: int) -> None:
    expected = [sum(np.sqrt(((a - b) ** 2).sum()) for b in rows(weight, dim)) for a in rows(weight, dim)]
    assert channels("fpgm", weight, dim) == pytest.approx(expected, abs=1e-6)


def test_of_many_filters_the_one_at_the_center_goes_first() -> None:
    angles = torch.arange(40) * 2 * torch.pi / 40
    filters = torch.cat([torch.stack([angles.cos(), angles.sin()], 1), torch.zeros(1, 2)]) + 1000  # far from the origin
    scores = channel_scores("fpgm", filters, 0, known())
    assert int(scores.argmin()) == 40
    expected = [sum(float(np.hypot(*(a - b))) for b in filters.double().numpy()) for a in filters.double().numpy()]
    assert scores.numpy() == pytest.approx(expected, rel=1e-6)
    assert channel_scores("fpgm", filters, 0, known(role="in")) is None
    assert channel_scores("fpgm", filters[:, 0], 0, known()) is None


def lamp_reference(squares: list[float]) -> list[float]:
    """Over all that come no earlier when sorted, the earlier of equals first."""
    place = {index: rank for rank, index in enumerate(sorted(range(len(squares)), key=lambda each: squares[each]))}
    scores = []
    for u, own in enumerate(squares):
        below = sum(other for v, other in enumerate(squares) if place[v] >= place[u])
        scores.append(own / below if below else 0.0)
    return scores


@given(WEIGHTS, DIMS)
def test_lamp_is_its_formula_by_a_double_loop(weight: np.ndarray, dim: int) -> None:
    assert single("lamp", weight).flatten() == pytest.approx(lamp_reference([x * x for x in weight.flatten()]))
    squares = [float((row**2).sum()) for row in rows(weight, dim)]
    assert channels("lamp", weight, dim) == pytest.approx(lamp_reference(squares))


@given(WEIGHTS)
def test_lamp_ranks_like_magnitude_within_a_layer_scales_with_none_and_keeps_one_weight(weight: np.ndarray) -> None:
    scores = single("lamp", weight).flatten()
    order = np.argsort(scores, kind="stable")
    assert np.all(np.diff(np.abs(weight).flatten()[order]) >= 0)
    assert single("lamp", 1e-30 * weight).flatten() == pytest.approx(scores)
    assert not weight.any() or scores.max() == 1.0  # the largest weight of every layer outlives all others


@given(WEIGHTS, DIMS, st.integers(0, 99))
def test_taylor_fisher_and_wanda_are_their_formulas(weight: np.ndarray, dim: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    gradients = draw.normal(size=(3, *weight.shape))
    norm = np.abs(draw.normal(size=(1, *weight.shape[1:])))
    taylor = torch.from_numpy(np.mean([(g * weight) ** 2 for g in gradients], 0))
    slices = tuple(
        torch.tensor(np.mean([[sum(row) ** 2 for row in rows(g * weight, each)] for g in gradients], 0))
        for each in range(3)
    )
    squares = np.mean(gradients**2, 0)
    assert np.array_equal(single("taylor", weight, taylor=taylor, slice_taylor=slices), taylor)
    assert np.array_equal(channels("taylor", weight, dim, taylor=taylor, slice_taylor=slices), slices[dim])
    fisher = weight**2 * squares / 2
    assert single("fisher", weight, squared_gradient=torch.from_numpy(squares)) == pytest.approx(fisher)
    assert channels("fisher", weight, dim, squared_gradient=torch.from_numpy(squares)) == pytest.approx(
        [row.sum() for row in rows(fisher, dim)]
    )
    wanda = np.abs(weight) * norm
    assert single("wanda", weight, input_norm=torch.from_numpy(norm)) == pytest.approx(wanda)
    assert channels("wanda", weight, dim, input_norm=torch.from_numpy(norm)) == pytest.approx(
        [row.sum() for row in rows(wanda, dim)]
    )


@pytest.mark.slow
def test_fisher_predicts_what_removing_a_weight_of_a_quadratic_loss_costs() -> None:
    # squared error of a linear model at its optimum: the loss rises by w**2 E[x**2], and Fisher's diagonal is the
    # Hessian's where the noise has variance 1/2 (Gaussian likelihood of the same loss)
    torch.manual_seed(0)
    given = torch.randn(4000, 3, dtype=torch.float64) * torch.tensor([0.5, 1.0, 2.0])
    weight = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    target = given @ weight.T + 0.5**0.5 * torch.randn(4000, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 1, bias=False).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(given, target).solution.T)
    found = gather(model, needs("fisher"), zip(given.split(1), target.split(1), strict=True))
    scores = score(CRITERIA["fisher"], model[0].weight, found.of("0.weight", generator=torch.Generator()))
    for index in range(3):
        pruned = model[0].weight.detach().clone()
        pruned[0, index] = 0
        rise = (((given @ pruned.T - target) ** 2).mean() - ((model(given) - target) ** 2).mean()).detach()
        assert float(scores[0, index]) == pytest.approx(float(rise), rel=0.15)


def test_scales_are_those_of_batch_norms() -> None:
    scale = np.array([0.5, -2.0, 0.0])
    assert np.array_equal(channels("bn_scale", scale, 0, norm_scale=True), [0.5, 2.0, 0.0])
    assert channel_scores("bn_scale", torch.from_numpy(scale), 0, known()) is None
    assert channel_scores("bn_scale", torch.ones(3, 3), 0, known(norm_scale=True)) is None


@pytest.mark.parametrize("name", ["activation", "apoz", "taylor_activation"])
def test_outputs_are_scored_where_a_weight_makes_them_and_nowhere_else(name: str) -> None:
    values = torch.tensor([0.25, 0.0, 1.0])
    fields: dict[str, Any] = dict.fromkeys(("activation", "zeros", "activation_taylor"), values)
    weight, expected = torch.ones(3, 3, 2), 1 - values if name == "apoz" else values
    assert torch.equal(channel_scores(name, weight, 0, known(role="out", **fields)), expected)
    assert torch.equal(channel_scores(name, weight, 1, known(role="out", **fields)), expected)  # transposed
    for dim, more in ((0, {"role": "in"}), (0, {"role": "other"}), (2, {"role": "out"})):
        assert channel_scores(name, weight, dim, known(**more, **fields)) is None
    assert channel_scores(name, values, 0, known(role="out", name="layer.bias", **fields)) is None
    assert channel_scores(name, weight, 0, known(role="out")) is None  # the data did not reach it


def test_apoz_counts_exactly() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))
    batches = [(torch.tensor([[1.0, 5.0], [2.0, 5.0], [-3.0, 5.0]]),), (torch.tensor([[4.0, 5.0]]),)]
    found = gather(model, needs("apoz"), batches).of("0.weight", generator=torch.Generator(), role="out")
    assert channel_scores("apoz", model[0].weight, 0, found).tolist() == [0.75, 0.25, 0.0]


@given(WEIGHTS, DIMS, st.floats(0.1, 10))
def test_scaling_a_weight_scales_its_scores(weight: np.ndarray, dim: int, factor: float) -> None:
    for name in ("l1", "l2", "fpgm"):
        assert channels(name, factor * weight, dim) == pytest.approx(factor * channels(name, weight, dim), abs=1e-6)


def by_place(weight: Tensor, statistics: Statistics) -> Tensor:
    return torch.arange(weight.numel(), dtype=torch.int64).reshape(weight.shape)


def test_a_users_function_scores_channels_by_the_sum_of_its_scores() -> None:
    scores = channel_scores(by_place, torch.ones(2, 3), 1, known())
    assert scores.tolist() == [3, 5, 7]
    assert scores.dtype == torch.float64


def sensitivity(weight: Tensor, statistics: Statistics) -> Tensor:
    assert statistics.squared_gradient is not None
    return weight.abs() * statistics.squared_gradient.sqrt()


SENSITIVITY = Criterion(name="sensitivity", weights=sensitivity, needs=frozenset({Statistic.SQUARED_GRADIENT}))


@pytest.mark.slow
@pytest.mark.parametrize("criterion", [SENSITIVITY, "tests.prune.test_criteria:SENSITIVITY"])
def test_a_users_criterion_says_what_it_needs_and_gets_it(criterion: Any) -> None:
    assert needs(criterion) == {Statistic.SQUARED_GRADIENT}
    batches = [toy.images(16, 0)]
    pruned = ts.prune.weights(toy.model(), 0.5, criterion=criterion, batches=batches)
    assert ts.prune.sparsity(pruned).total == pytest.approx(0.5)
    result = ts.compress(toy.model(), toy.task(), [ts.Prune(sparsity=0.5, criterion=criterion)], runtime="eager")
    assert ts.prune.sparsity(result.module).total == pytest.approx(0.5)
    with pytest.raises(PruneError, match=r"'sensitivity' needs data.*batches=\.\.\..*labels"):
        ts.prune.weights(toy.model(), 0.5, criterion=criterion)


def test_criteria_that_are_none_are_refused() -> None:
    with pytest.raises(PruneError, match="criterion 'empty' scores nothing"):
        Criterion(name="empty")
    with pytest.raises(PruneError, match="function.*Criterion.*frozenset"):
        find_criterion("tests.prune.test_criteria:EVERYTHING")
    bad = Criterion(name="bad", channels=lambda weight, dim, statistics: weight)
    with pytest.raises(PruneError, match=r"'bad'.*scores of shape \(2,\).*\(2, 3\)"):
        channel_scores(bad, torch.ones(2, 3), 0, known())
    nan = Criterion(name="nan", channels=lambda weight, dim, statistics: weight[:, 0] / 0)
    with pytest.raises(PruneError, match="'nan'.*not finite.*'layer.weight'"):
        channel_scores(nan, torch.ones(2, 3), 0, known())


# --- combining ------------------------------------------------------------------------------------------------------

MEMBERS = st.lists(
    st.lists(st.tuples(st.integers(-1, 4), st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0])), min_size=1, max_size=8),
    min_size=1, max_size=4,
)  # fmt: skip


def tensors(members: list[list[tuple[int, float]]]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensor([c for c, _ in each]), torch.tensor([s for _, s in each])) for each in members]


@given(MEMBERS, st.sampled_from(["mean", "sum", "max", "first"]))
def test_members_are_combined_class_by_class(members: list[list[tuple[int, float]]], reduction: Any) -> None:
    said: dict[int, list[float]] = {index: [] for index in range(5)}
    for member in members:
        for index in range(5):
            own = [value for place, value in member if place == index]
            if own:
                said[index].append(sum(own))
    how = {"mean": np.mean, "sum": sum, "max": max, "first": lambda values: values[0]}[reduction]
    expected = [how(values) if values else None for values in said.values()]
    spoken = [each for each in expected if each is not None]
    found = combine(tensors(members), 5, reduction=reduction, normalization="none")
    assert found.dtype == torch.float64
    average = np.mean(spoken) if spoken else 0.0
    assert found.numpy() == pytest.approx([average if each is None else each for each in expected])


@given(arrays(np.float64, st.integers(1, 9), elements=st.sampled_from([0.0, 1.0, 1.5, 1e-160, 1e160, -2.0])))
def test_groups_are_normalized_without_losing_their_order(scores: np.ndarray) -> None:
    member = [(torch.arange(len(scores)), torch.from_numpy(scores))]
    found = {
        how: combine(member, len(scores), normalization=how).numpy() for how in ("none", "mean", "max", "gaussian")
    }
    assert np.array_equal(found["none"], scores)
    order = np.argsort(scores, kind="stable")
    for values in found.values():
        assert np.isfinite(values).all()
        assert np.all(np.diff(values[order]) >= 0)
    if scores.any():
        assert np.abs(found["mean"]).mean() == pytest.approx(1)
        assert np.abs(found["max"]).max() == pytest.approx(1)
    else:
        assert not any(values.any() for values in found.values())
    if found["gaussian"].any():
        assert found["gaussian"].mean() == pytest.approx(0, abs=1e-9)
        assert found["gaussian"].std() == pytest.approx(1)


@pytest.mark.parametrize("how", ["mean", "max", "gaussian"])
@given(st.floats(1e-30, 1e30), st.integers(1, 7))
def test_equal_scores_stay_equal(how: Any, value: float, size: int) -> None:
    rounded = torch.full((size,), value, dtype=torch.float64) * (1 + 1e-15 * torch.rand(size))
    found = combine([(torch.arange(size), rounded)], size, normalization=how)
    assert found.tolist() == pytest.approx([0.0 if how == "gaussian" else 1.0] * size, abs=1e-9)


def test_what_cannot_be_combined_is_refused_clearly() -> None:
    member = [(torch.tensor([0]), torch.tensor([1.0]))]
    with pytest.raises(PruneError, match="reduction.*'mean', 'sum', 'max', 'first'.*'median'"):
        combine(member, 1, reduction="median")  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="normalization.*'none', 'mean', 'max', 'gaussian'.*'l2'"):
        combine(member, 1, normalization="l2")  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="no member.*scores"):
        combine([], 3)


# --- pruning by data ------------------------------------------------------------------------------------------------


def test_weights_are_pruned_by_what_the_batches_say() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    given = torch.tensor([[9.0, 0.1, 2.0, 0.0], [9.0, 0.1, 2.0, 0.0]])
    pruned = ts.prune.weights(model, 0.5, criterion="wanda", batches=[(given,)])
    assert pruned[0].weight.tolist() == [[1.0, 0.0, 3.0, 0.0]]
    own = ts.prune.weights(
        model, 0.25, criterion="taylor", batches=[given], loss=lambda outputs, batch: outputs.sum() / len(batch)
    )  # (w g): 9, 0.2, 6, 0
    assert own[0].weight.tolist() == [[1.0, 2.0, 3.0, 0.0]]
    with pytest.raises(TaskError, match="no labels"):
        ts.prune.weights(model, 0.5, criterion="taylor", batches=[(given,)])
    with pytest.raises(TaskError, match="batches gave no batch"):
        ts.prune.weights(model, 0.5, criterion="wanda", batches=[])


class Idle(nn.Module):
    """One of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_the_data_does_not_reach_is_left_alone_and_said_so() -> None:
    with pytest.warns(UserWarning, match="not pruned.*unused.weight.*no input_norm"):
        pruned = ts.prune.weights(Idle(), 0.5, criterion="wanda", batches=[torch.randn(8, 4)])
    assert ts.prune.sparsity(pruned).layers == {"used.weight": 0.5, "unused.weight": 0.0}


def context(**changes: Any) -> ts.Context:
    return ts.Context(task=replace(toy.task(), **changes), teacher=toy.model(), example_inputs=())


def test_a_step_gathers_from_calibration_or_the_first_samples_of_train() -> None:
    chosen = [toy.images(8, 5)]
    for changes in ({}, {"calibration": chosen}):
        ctx = context(**changes)
        batches = chosen if changes else [toy.images(128, 1)]
        by_hand = gather(toy.model(), needs("wanda"), batches)
        step = ts.Prune(sparsity=0.5, criterion="wanda")
        found = step.gather(toy.model(), ctx)
        for path in ("conv1.weight", "head.weight"):
            one, other = (each.of(path, generator=torch.Generator()).input_norm for each in (found, by_hand))
            torch.testing.assert_close(one, other)


def test_labels_are_asked_for_before_any_work() -> None:
    step = ts.Prune(sparsity=0.5, criterion="taylor")
    with pytest.raises(PruneError, match="'taylor'.*labels.*Task.target.*None.*l1, l2.*wanda"):
        step.check(context(target=lambda batch: None))
    step.check(context(target=lambda batch: None, loss=lambda outputs, batch: outputs.sum()))
    ts.Prune(sparsity=0.5, criterion="wanda").check(context(target=lambda batch: None))
    with pytest.raises(TaskError, match="calibration gave no batch"):
        ts.Prune(sparsity=0.5, criterion="wanda").check(context(calibration=[]))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["iterative", "gradual"])
@pytest.mark.parametrize("workers", [0, 1])
def test_schedules_gather_again_from_the_model_as_it_is(schedule: Any, workers: int, monkeypatch: Any) -> None:
    from torchslim.prune.criteria import gathering as module

    seen: list[Tensor] = []

    def spy(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(model.head.weight.detach().clone())
        return gather(model, *args, **kwargs)

    monkeypatch.setattr(module, "gather", spy)
    train = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*toy.images(64, 1)), batch_size=16, shuffle=True, num_workers=workers,
        persistent_workers=bool(workers),
    )  # fmt: skip
    ctx = context(train=train)
    step = ts.Prune(
        sparsity=0.5, criterion="taylor", schedule=schedule, rounds=2, until=1.0,
        train=ts.Finetune(epochs=3, optimizer="sgd", lr=0.01),
    )  # fmt: skip
    outcome = step(ctx.teacher, ctx)
    assert ts.prune.sparsity(outcome.model).total == 0.5
    assert len(seen) == (2 if schedule == "iterative" else 4)  # each round; each epoch and the records
    assert not torch.equal(seen[0], seen[1])
    train._iterator = None  # ends the worker


@pytest.mark.slow
def test_a_gradual_run_that_resumes_gathers_the_same(tmp_path: Any) -> None:
    step = ts.Prune(
        sparsity=0.6, criterion="fisher", schedule="gradual", train=ts.Finetune(epochs=4, optimizer="sgd", keep="last")
    )
    whole = step(toy.model(), context())

    class Killed(Exception):
        pass

    def kill(event: ts.Event) -> None:
        if event.values["epoch"] == 3:
            raise Killed

    with pytest.raises(Killed):
        step(toy.model(), replace(context(), state=tmp_path, progress=kill))
    resumed = step(toy.model(), replace(context(), state=tmp_path))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
