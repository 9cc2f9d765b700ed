"""Weight pruning: exact counts, torch's own pruning as the reference, zeros that stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as reference

import torchslim as ts
from tests.support import toy
from torchslim.core.fingerprint import fingerprint
from torchslim.core.isolation import copy_model
from torchslim.core.layer_patterns import select_weights
from torchslim.errors import PruneError, SelectError
from torchslim.prune.masking.patterns import NM
from torchslim.prune.masking.selection import keep_globally, keep_per_row
from torchslim.prune.schedule import cubic, rounds

# few distinct values: ties and zeros are the rule
VALUES = st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, -1.0, 2.0]), min_size=1, max_size=60)
FRACTIONS = st.floats(0, 0.999)


@given(VALUES, FRACTIONS)
def test_a_row_loses_exactly_what_was_asked_and_nothing_better_than_it_keeps(
    values: list[float], sparsity: float
) -> None:
    scores = torch.tensor([values]).abs()
    keep = keep_per_row(scores, sparsity)
    assert int((~keep).sum()) == round(sparsity * len(values))
    if keep.any() and not keep.all():
        assert scores[~keep].max() <= scores[keep].min()


@given(st.lists(VALUES, min_size=1, max_size=4), FRACTIONS)
def test_all_layers_together_lose_exactly_what_was_asked(layers: list[list[float]], sparsity: float) -> None:
    scores = [torch.tensor([values]).abs() for values in layers]
    keep = keep_globally(scores, [1] * len(scores), sparsity)
    flat, kept = torch.cat(scores, 1), torch.cat(keep, 1)
    assert int((~kept).sum()) == round(sparsity * flat.numel())
    if kept.any() and not kept.all():
        assert flat[~kept].max() <= flat[kept].min()


@given(FRACTIONS)
def test_whole_slices_of_many_sizes_come_as_near_as_one_slice(sparsity: float) -> None:
    scores, costs = [torch.arange(5.0)[None], torch.arange(7.0)[None] + 0.5], [3, 11]
    keep = keep_globally(scores, costs, sparsity)
    removed = sum(int((~each).sum()) * cost for each, cost in zip(keep, costs, strict=True))
    assert abs(removed - sparsity * (5 * 3 + 7 * 11)) <= 11 / 2 + 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:emptied")
@given(FRACTIONS, st.sampled_from(["layer", "global"]), st.sampled_from(["l1", "random"]))
def test_a_model_gets_exactly_the_zeros_that_were_asked_for(sparsity: float, scope: str, criterion: str) -> None:
    pruned = ts.prune.weights(toy.model(), sparsity, scope=scope, criterion=criterion)
    weights = select_weights(pruned)
    if scope == "global":
        assert sum(int((w == 0).sum()) for w in weights.values()) == round(
            sparsity * sum(w.numel() for w in weights.values())
        )
    else:
        assert all(int((w == 0).sum()) == round(sparsity * w.numel()) for w in weights.values())
    assert not any((value == 0).all() for name, value in pruned.named_parameters() if name == "bn1.weight")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:emptied")
@given(st.floats(0, 1))
def test_a_threshold_removes_exactly_what_is_below_it(threshold: float) -> None:
    model = toy.model()
    pruned = ts.prune.weights(model, threshold=threshold)
    for name, weight in select_weights(model).items():
        assert torch.equal(pruned.get_parameter(name) == 0, weight.abs() < threshold)


def test_an_all_zero_layer_is_counted_like_any_other() -> None:
    layer = nn.Linear(10, 10)
    nn.init.zeros_(layer.weight)
    model, masks = ts.prune.weights(layer, 0.3), ts.Prune(sparsity=0.3).masks(layer, {}, 0.3, 0)[0]
    assert int((~masks["weight"]).sum()) == 30
    assert ts.prune.sparsity(model).total == 1.0


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.77])
def test_per_layer_magnitude_is_torchs_l1_unstructured(amount: float) -> None:
    model = nn.Conv2d(5, 7, 3)
    expected = reference.l1_unstructured(copy_model(model)[0], "weight", amount).weight
    assert torch.equal(ts.prune.weights(model, amount, scope="layer").weight, expected)


def test_global_magnitude_is_torchs_global_unstructured() -> None:
    model, copy = toy.model(), toy.model()
    targets = [(copy.conv1, "weight"), (copy.conv2, "weight"), (copy.head, "weight")]
    reference.global_unstructured(targets, reference.L1Unstructured, amount=0.6)
    pruned = ts.prune.weights(model, 0.6)
    for name in ("conv1", "conv2", "head"):
        assert torch.equal(pruned.get_submodule(name).weight, copy.get_submodule(name).weight)


@pytest.mark.parametrize(("n", "dim"), [(1, 0), (2, 0), (2, 1), (float("inf"), 1), (2, -1)])
def test_slices_are_torchs_ln_structured(n: float, dim: int) -> None:
    model = nn.Conv2d(6, 8, 3)
    expected = reference.ln_structured(copy_model(model)[0], "weight", 0.5, n=n, dim=dim).weight
    pruned = ts.prune.weights(model, 0.5, pattern="slice", n=n, dim=dim, scope="layer")
    assert torch.equal(pruned.weight, expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
@pytest.mark.parametrize(
    ("layer", "dim"), [(nn.Linear(24, 5), 1), (nn.Conv2d(24, 4, 3), 1), (nn.ConvTranspose2d(24, 4, 3), 0)]
)
def test_of_every_m_inputs_n_are_kept(layer: nn.Module, dim: int, n: int, m: int) -> None:
    kept = (ts.prune.weights(layer, pattern=f"{n}:{m}").weight != 0).movedim(dim, -1).reshape(-1, m)
    assert bool((kept.sum(1) == n).all())
    rows = layer.weight.detach().abs().movedim(dim, -1).reshape(-1, m)
    assert torch.equal(torch.where(kept, rows, 0).sum(1), rows.topk(n, dim=1).values.sort(1).values.sum(1)) or bool(
        (torch.where(kept, torch.inf, rows).amin(1) <= torch.where(kept, rows, torch.inf).amin(1)).all()
    )


@pytest.mark.slow
def test_a_layer_that_cannot_follow_the_pattern_is_named_with_the_reason() -> None:
    with pytest.warns(UserWarning, match="not pruned.*conv1.weight.*input dimension 1 .*multiple of 4"):
        pruned = ts.prune.weights(toy.model(), pattern="2:4")
    assert ts.prune.sparsity(pruned).layers["conv2.weight"] == 0.5
    outcome = ts.compress(toy.model(), toy.task(), [ts.Prune(pattern="2:4")], runtime="eager")
    assert any("conv1.weight: input dimension 1" in each for each in outcome.run["rows"][1]["warnings"])


def test_sparsities_by_layer_with_later_patterns_overruling() -> None:
    pruned = ts.prune.weights(toy.model(), {"conv*": 0.25, "conv2": 0.5})
    zeros = {name: int((w == 0).sum()) for name, w in select_weights(pruned).items()}
    assert zeros == {"conv1.weight": round(0.25 * 72), "conv2.weight": round(0.5 * 576), "head.weight": 0}


class Everything(nn.Module):
    """One of each kind of layer with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.conv = nn.Embedding(9, 8), nn.LayerNorm((4, 8)), nn.Conv1d(8, 8, 3)
        self.lstm, self.gru, self.cell = nn.LSTM(8, 6, 2, bidirectional=True), nn.GRU(8, 6), nn.LSTMCell(8, 6)
        self.same, self.other = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.up, self.bi = nn.ConvTranspose1d(8, 8, 3), nn.Bilinear(3, 4, 5)


def test_weights_are_touched_and_biases_norms_and_embeddings_are_not() -> None:
    chosen = set(select_weights(Everything()))
    assert {
        "conv.weight",
        "lstm.weight_hh_l1_reverse",
        "gru.weight_ih_l0",
        "cell.weight_hh",
        "up.weight",
    } <= chosen
    assert {
        "same.in_proj_weight",
        "same.out_proj.weight",
        "other.q_proj_weight",
        "other.v_proj_weight",
    } <= chosen
    assert not any("bias" in name or name.startswith(("embed", "norm")) for name in chosen)
    assert set(select_weights(Everything(), include=["norm.weight", "type:LSTM"])) == {
        "norm.weight", *(name for name in chosen if name.startswith("lstm")),
    }  # fmt: skip
    assert set(select_weights(Everything(), exclude=["type:RNNBase", "same", "other.*"])) == {
        "conv.weight", "cell.weight_ih", "cell.weight_hh", "up.weight", "bi.weight",
    }  # fmt: skip


def test_a_pattern_that_matches_nothing_lists_near_names() -> None:
    with pytest.raises(SelectError, match="'con2'.*conv2"):
        ts.prune.weights(toy.model(), 0.5, include="con2")
    with pytest.raises(SelectError, match="'bn1'.*no weight.*default.*bn1.weight"):
        ts.prune.weights(toy.model(), 0.5, include="bn1")
    with pytest.raises(SelectError, match="near names: head"):
        ts.prune.weights(toy.model(), {"haed": 0.5})


def test_the_callers_model_is_unchanged_and_random_pruning_is_seeded() -> None:
    model = toy.model()
    before, state = fingerprint(model.state_dict()), torch.get_rng_state()
    first = ts.prune.weights(model, 0.5, criterion="random", seed=1)
    second = ts.prune.weights(model, 0.5, criterion="random", seed=1)
    third = ts.prune.weights(model, 0.5, criterion="random", seed=2)
    assert fingerprint(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.conv2.weight, second.conv2.weight)
    assert not torch.equal(first.conv2.weight, third.conv2.weight)


def test_what_torch_has_pruned_is_taken_over_masks_and_all() -> None:
    model = toy.model()
    reference.random_unstructured(model.conv2, "weight", 0.4)
    reference.ln_structured(model.head, "weight", 0.5, n=2, dim=0)
    model(torch.randn(2, 1, 8, 8))
    zero = model.conv2.weight == 0
    copied, masks = copy_model(model)
    assert set(masks) == {"conv2.weight", "head.weight"}
    assert not reference.is_pruned(copied)
    assert torch.equal(copied.conv2.weight, model.conv2.weight)
    pruned = ts.prune.weights(model, 0.6, scope="layer")
    assert bool((pruned.conv2.weight[zero] == 0).all())
    assert int((pruned.conv2.weight == 0).sum()) == round(0.6 * 576)
    assert bool((ts.prune.weights(model, 0.1).conv2.weight[zero] == 0).all())


def last_is_best(weight: Tensor, statistics: ts.prune.Statistics) -> Tensor:
    return torch.arange(weight.numel(), dtype=torch.float32).reshape(weight.shape)


@pytest.mark.parametrize("criterion", [last_is_best, "tests.prune.test_weights:last_is_best"])
def test_a_criterion_of_the_users_own(criterion: object) -> None:
    pruned = ts.prune.weights(nn.Linear(4, 4), 0.5, criterion=criterion)
    assert torch.equal(pruned.weight.flatten() == 0, torch.arange(16) < 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1}, r"sparsity.*\[0, 1\).*1.0.*whole layer"),
        ({"sparsity": 1.5}, "got 1.5"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsity": {}}, "sparsity names no layer"),
        ({}, "nothing to do"),
        ({"sparsity": 0.5, "threshold": 0.1}, "not both"),
        ({"threshold": float("inf")}, "threshold.*finite"),
        ({"sparsity": {"conv1": 0.5}, "scope": "global"}, "leave out scope='global'"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "'2:4' fixes.*sparsity at 0.5"),
        ({"pattern": "4:2"}, "0 < N < M, got 4:2"),
        ({"sparsity": 0.5, "pattern": "blobs"}, "pattern 'blobs'.*unstructured"),
        ({"sparsity": 0.5, "criterion": "l7"}, "criterion 'l7'.*l1, l2, random"),
        ({"sparsity": 0.5, "criterion": lambda weight, statistics: weight[0]}, "scores of shape"),
        ({"sparsity": 0.5, "criterion": lambda weight, statistics: weight / 0}, "scores.*not finite"),
    ],
)
def test_what_cannot_be_is_refused_clearly(arguments: dict, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        ts.prune.weights(toy.model(), **arguments)


def test_schedules_need_training_and_end_at_the_target() -> None:
    with pytest.raises(PruneError, match="schedule 'gradual' needs train="):
        ts.Prune(sparsity=0.5, schedule="gradual")
    steps = [cubic(i / 20) for i in range(21)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 1)
    assert rounds(0.875, 3) == pytest.approx([0.5, 0.75, 0.875])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["iterative", "gradual"])
def test_a_schedule_ends_at_exactly_the_sparsity(schedule: str) -> None:
    step = ts.Prune(sparsity=0.7, schedule=schedule, rounds=2, train=ts.Finetune(epochs=2, optimizer="sgd", lr=0.01))
    result = ts.compress(toy.model(), toy.task(), [step], runtime="eager")
    total = sum(mask.numel() for mask in result.masks.values())
    assert sum(int((~mask).sum()) for mask in result.masks.values()) == round(0.7 * total)
    zeros = sum(int((result.module.get_parameter(name) == 0).sum()) for name in result.masks)
    assert zeros == round(0.7 * total)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_are_held_in_the_users_own_loop_until_let_go(name: str) -> None:
    model = ts.prune.weights(toy.model(), 0.5)
    optimizer = OPTIMIZERS[name](model.parameters())
    zero = model.conv2.weight == 0
    images, labels = toy.images(16, 0)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    with ts.prune.hold_zeros(model, optimizer):
        for _ in range(3):
            step()
        assert torch.equal(model.conv2.weight == 0, zero)
        states = [v for v in optimizer.state[model.conv2.weight].values() if v.shape == zero.shape]
        assert states
        assert all(bool((each[zero] == 0).all()) for each in states)
    step()
    assert not bool((model.conv2.weight[zero] == 0).all())


def test_a_layer_of_zeros_is_not_held_by_accident() -> None:
    model = toy.model()
    nn.init.zeros_(model.head.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PruneError, match="head.weight is all zeros"):
        ts.prune.hold_zeros(model, optimizer)
    ts.prune.hold_zeros(model, optimizer, {"conv1.weight": torch.ones(8, 1, 3, 3, dtype=torch.bool)}).remove()


@given(st.integers(1, 5), st.integers(1, 4))
def test_blocks_return_to_their_places(rows: int, blocks: int) -> None:
    pattern = NM(2, 4)
    scores = torch.randn(rows, 4 * blocks, 3)
    assert torch.equal(pattern.spread(pattern.units(scores, 1), scores.shape, 1), scores)


def test_the_sparsity_report_prints_every_layer() -> None:
    printed = str(ts.prune.sparsity(ts.prune.weights(toy.model(), 0.5)))
    assert "conv2.weight" in printed
    assert "50.00%" in printed
