"""Earlier masks, precision, patterns and refusals: the rules of pruning beyond one shot at a fresh model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as reference

import torchslim as ts
from tests.support import models, toy
from torchslim.core.fingerprint import fingerprint
from torchslim.core.layer_patterns import select_weights
from torchslim.errors import PruneError, TrainError
from torchslim.prune import Statistics

VALUES = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0]), st.booleans()), min_size=1, max_size=60)


FRACTIONS = st.floats(0, 0.999)
TIED = [(0.0, False), (1.0, False), (0.0, True), (2.0, False)]  # a zero that is masked, after one that is not


def line(weight: Any, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer with exactly these weights."""
    values = torch.as_tensor(weight, dtype=dtype)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(values)
    return layer


@example(TIED, 0.25, "layer", "l1")
@example(TIED, 0.25, "global", "l1")
@given(VALUES, FRACTIONS, st.sampled_from(["layer", "global"]), st.sampled_from(["l1", "random"]))
def test_masked_weights_go_first_and_never_come_back(
    values: list[tuple[float, bool]], sparsity: float, scope: Any, criterion: str
) -> None:
    layer, dead = line([[value for value, _ in values]]), np.array([masked for _, masked in values])
    before = {"weight": torch.tensor(~dead)[None]}
    step = ts.Prune(sparsity=sparsity, scope=scope, criterion=criterion)
    masks, (record,) = step.masks(layer, before, sparsity, 0)
    kept = masks["weight"].numpy()[0]
    assert not kept[dead].any()
    assert (~kept).sum() == max(round(sparsity * len(values)), dead.sum())
    assert record.sparsity == (~kept).sum() / len(values)
    if criterion == "l1":
        size = np.abs([value for value, _ in values])
        removed = ~kept & ~dead
        if removed.any() and kept.any():
            assert size[removed].max() <= size[kept].min()


@given(st.integers(0, 1000), FRACTIONS, FRACTIONS)
def test_pruning_twice_is_pruning_once_to_the_larger_sparsity(seed: int, first: float, second: float) -> None:
    torch.manual_seed(seed)
    layer, step = nn.Linear(7, 5), ts.Prune(sparsity=0.5)
    once, _ = step.masks(layer, {}, max(first, second), 0)
    before, _ = step.masks(layer, {}, first, 0)
    twice, _ = step.masks(layer, before, second, 0)
    assert torch.equal(once["weight"], twice["weight"])


LAYERS = {
    "linear": (lambda: nn.Linear(12, 3), 1),
    "conv1d": (lambda: nn.Conv1d(12, 3, 2), 1),
    "conv3d": (lambda: nn.Conv3d(12, 3, 2), 1),
    "transposed 1d": (lambda: nn.ConvTranspose1d(12, 3, 2), 0),
    "transposed 3d": (lambda: nn.ConvTranspose3d(12, 3, 2), 0),
    "grouped": (lambda: nn.Conv2d(24, 6, 2, groups=2), 1),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (5, 6)])
def test_n_of_m_keeps_the_largest_of_each_block_along_the_inputs(kind: str, n: int, m: int) -> None:
    make, dim = LAYERS[kind]
    layer = make()
    weight = np.moveaxis(layer.weight.detach().numpy(), dim, -1).reshape(-1, m)
    expected = np.zeros_like(weight)
    for row, values in enumerate(weight):
        best = np.argsort(-np.abs(values))[:n]
        expected[row, best] = values[best]
    pruned = ts.prune.weights(layer, pattern=f"{n}:{m}").weight.detach().numpy()
    assert np.array_equal(np.moveaxis(pruned, dim, -1).reshape(-1, m), expected)


def test_n_of_m_takes_earlier_zeros_into_its_blocks() -> None:
    layer = line([[9.0, 8.0, 7.0, 6.0], [4.0, 3.0, 2.0, 1.0]])
    before = torch.tensor([[False, True, True, True], [False, False, False, True]])
    masks, (record,) = ts.Prune(pattern="2:4").masks(layer, {"weight": before}, None, 0)
    assert masks["weight"].tolist() == [[False, True, True, False], [False, False, False, True]]
    assert record.sparsity == 5 / 8


@pytest.mark.parametrize("n", [0, 1, 2, 3.5, float("inf"), -float("inf")])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(6, 8, 3), lambda: nn.Linear(9, 6), models.Recurrent])
def test_slices_are_torchs_for_every_norm_dimension_and_layer(
    n: float, dim: int, make: Callable[[], nn.Module]
) -> None:
    model = make()
    if n == 0:  # the count of what is not zero: give it something to count
        model = ts.prune.weights(model, 0.5, scope="layer", criterion="random")
    pruned = ts.prune.weights(model, 0.4, pattern="slice", n=n, dim=dim, scope="layer")
    for name, weight in select_weights(model).items():
        kept = [bool((each != 0).any()) for each in pruned.get_parameter(name).unbind(dim)]
        norms = [torch.linalg.vector_norm(each, n) for each in weight.unbind(dim)]
        assert kept.count(False) == round(0.4 * len(kept))
        worst = [norm for norm, keep in zip(norms, kept, strict=True) if not keep]
        assert max(worst) <= min(norm for norm, keep in zip(norms, kept, strict=True) if keep)
        if n != 0:  # counts tie, and torch does not say which of equals goes
            mask = reference.LnStructured(amount=0.4, n=n, dim=dim).compute_mask(weight, torch.ones_like(weight))
            assert torch.equal(pruned.get_parameter(name), weight * mask)


def test_a_slice_that_is_gone_goes_first_and_a_thinned_one_is_ranked_by_what_is_left() -> None:
    layer = line([[5.0, 5.0], [1.0, 1.0], [9.0, 2.0], [3.0, 3.0]])
    before = torch.tensor([[False, False], [True, True], [False, True], [True, True]])
    step = ts.Prune(sparsity=0.5, pattern="slice")
    for sparsity, kept in ((0.25, [1, 2, 3]), (0.5, [2, 3]), (0.75, [3])):  # what is left of row 2 weighs 2
        masks, _ = step.masks(layer, {"weight": before}, sparsity, 0)
        assert [row for row in range(4) if masks["weight"][row].any()] == kept
        assert not bool((masks["weight"] & ~before).any())


def test_what_has_no_slices_or_no_such_dimension_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="not pruned.*1.weight.*2 dimensions.*dim 2"):
        pruned = ts.prune.weights(model, 0.34, pattern="slice", dim=2)
    assert ts.prune.sparsity(pruned).layers == {"0.weight": 1 / 3, "1.weight": 0.0}
    with pytest.raises(PruneError, match="no chosen layer.*1.bias.*one dimension"):
        ts.prune.weights(model, 0.5, pattern="slice", include="1.bias")
    assert int((ts.prune.weights(model, pattern="2:4", include="1.bias")[1].bias == 0).sum()) == 2
    with pytest.raises(PruneError, match="no chosen layer.*0.weight.*input dimension 4.*multiple of 3"):
        ts.prune.weights(model, pattern="1:3")


def test_whole_slices_over_all_layers_are_ranked_by_norm_and_paid_by_size() -> None:
    model = nn.ModuleDict({"wide": line([[1.0] * 6, [4.0] * 6]), "slim": line([[3.0], [5.0]])})
    # norms: wide 2.4, 9.8; slim 3, 5; of 14 weights 7 should go: the wide row (6) and one slim row (1)
    pruned = ts.prune.weights(model, 0.5, pattern="slice")
    assert [bool(row.any()) for row in (*pruned["wide"].weight, *pruned["slim"].weight)] == [
        False,
        True,
        False,
        True,
    ]


@given(st.lists(st.floats(0.25, 4), min_size=1, max_size=40), st.floats(0.25, 4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_threshold_is_as_exact_as_the_weights(dtype: torch.dtype, values: list[float], cut: float) -> None:
    layer = line([[*values, cut, -cut]], dtype)
    pruned = ts.prune.weights(layer, threshold=cut)
    assert torch.equal(pruned.weight == 0, layer.weight.abs() < cut)
    assert bool((pruned.weight[0, -2:] != 0).all())  # what equals the threshold stays


def test_a_weight_that_is_computed_from_another_is_reported() -> None:
    model = nn.ModuleDict({"new": parametrizations.weight_norm(nn.Linear(4, 4)), "line": nn.Linear(4, 4)})
    model["table"] = parametrizations.spectral_norm(nn.Embedding(4, 4))  # would not be pruned anyway
    with pytest.warns(UserWarning, match="not pruned: new.weight") as found:
        pruned = ts.prune.weights(model, 0.5)
    (message,) = [str(each.message) for each in found]
    assert re.match("not pruned.*new.weight.*parametrization.*torch.nn.utils.parametrize.rem", message)
    assert ts.prune.sparsity(pruned).layers == {"line.weight": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ts.prune.weights(model, 0.5, exclude="new")
        ts.prune.weights(model, 0.5, include="line")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_as_the_numbers_that_it_holds(dtype: torch.dtype) -> None:
    weight = torch.linspace(-1, 1, 101, dtype=dtype)[None]
    pruned = ts.prune.weights(line(weight, dtype), threshold=0.7)
    assert torch.equal(pruned.weight == 0, weight.double().abs() < 0.7)
    assert pruned.weight.dtype == dtype


def test_double_precision_is_not_rounded_before_it_is_ranked() -> None:
    weight = 1 + 1e-12 * torch.randperm(100, dtype=torch.float64)[None]
    pruned = ts.prune.weights(line(weight, torch.float64), 0.3)
    assert torch.equal(pruned.weight == 0, weight < 1 + 29.5e-12)


def test_a_threshold_on_slices_is_one_on_their_norms() -> None:
    layer = line([[3.0, 4.0], [3.0, 3.9], [0.0, 5.0]])
    pruned = ts.prune.weights(layer, threshold=5.0, pattern="slice")
    assert [bool(row.any()) for row in pruned.weight] == [True, False, True]


def by_rank(weight: Tensor, statistics: Statistics) -> Tensor:
    """Whole numbers that float32 cannot tell apart."""
    return weight.abs().flatten().argsort().argsort().reshape(weight.shape) + 2**30


def test_scores_may_be_whole_numbers() -> None:
    layer = nn.Linear(10, 10)
    expected = ts.prune.weights(layer, 0.37)
    assert torch.equal(ts.prune.weights(layer, 0.37, criterion=by_rank).weight, expected.weight)


def test_a_criterion_that_works_in_place_changes_no_weight() -> None:
    def careless(weight: Tensor, statistics: Statistics) -> Tensor:
        return weight.abs_()

    layer = nn.Linear(10, 10)
    pruned = ts.prune.weights(layer, 0.5, criterion=careless)
    kept = pruned.weight != 0
    assert torch.equal(pruned.weight[kept], layer.weight[kept])


def test_a_criterion_is_told_the_name_and_shares_one_seeded_generator() -> None:
    names, draws = [], []

    def spy(weight: Tensor, statistics: Statistics) -> Tensor:
        names.append(statistics.name)
        draws.append(torch.rand(1, generator=statistics.generator).item())
        return weight.abs()

    for seed in (1, 1, 2):
        ts.prune.weights(toy.model(), 0.5, criterion=spy, seed=seed)
    assert names == ["conv1.weight", "conv2.weight", "head.weight"] * 3
    assert draws[:3] == draws[3:6]
    assert len(set(draws)) == 6


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(models.Recurrent, (torch.randn(2, 4, 5),)), (models.Encoder, (torch.randint(models.WORDS, (2, 5)),)),
     (models.CrossAttention, (torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 4)))],
)  # fmt: skip
def test_recurrent_and_attention_weights_are_pruned_and_held(make: Any, inputs: tuple[Tensor, ...]) -> None:
    model = make()
    before = fingerprint(model.state_dict())
    pruned = ts.prune.weights(model, 0.6)
    assert fingerprint(model.state_dict()) == before
    weights = select_weights(pruned)
    zeros = {name: weight == 0 for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int(each.sum()) for each in zeros.values()) == round(0.6 * total)
    assert not torch.equal(pruned(*inputs), model(*inputs))  # what runs are the pruned weights
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.1)
    with ts.prune.hold_zeros(pruned, optimizer):
        for _ in range(2):
            pruned(*inputs).square().sum().backward()
            optimizer.step()
    assert all(bool((weights[name][zero] == 0).all()) for name, zero in zeros.items())
    assert all(bool((weights[name][~zero] != 0).all()) for name, zero in zeros.items())


def test_masks_that_torch_left_on_any_layer_are_taken_over() -> None:
    model = models.Recurrent()
    reference.random_unstructured(model.lstm, "weight_hh_l0", 0.3)
    reference.random_unstructured(model.lstm, "bias_ih_l0", 0.3)
    model(torch.randn(2, 4, 5))
    zeros = {name: getattr(model.lstm, name) == 0 for name in ("weight_hh_l0", "bias_ih_l0")}
    assert ts.prune.sparsity(model).layers["lstm.weight_hh_l0"] == pytest.approx(0.3, abs=0.01)
    pruned = ts.prune.weights(model, 0.1, include="head")
    for name, zero in zeros.items():
        assert torch.equal(getattr(pruned.lstm, name) == 0, zero)
    assert reference.is_pruned(model)
    assert not reference.is_pruned(pruned)


def test_a_step_hands_on_the_masks_of_layers_that_it_does_not_touch() -> None:
    before = {"conv1.weight": torch.rand(8, 1, 3, 3) < 0.5}
    ctx = ts.Context(task=toy.task(), teacher=toy.model(), example_inputs=(), masks=before)
    outcome = ts.Prune(sparsity=0.5, include="head")(toy.model(), ctx)
    assert outcome.masks.keys() == {"conv1.weight", "head.weight"}
    assert outcome.masks["conv1.weight"] is before["conv1.weight"]
    assert bool((outcome.model.conv1.weight[~before["conv1.weight"]] == 0).all())
    assert [record.layer for record in outcome.layers] == ["head.weight"]


def test_a_layer_that_is_emptied_is_said_so() -> None:
    model = toy.model()
    with torch.no_grad():
        model.head.weight.mul_(1e-6)
    with pytest.warns(UserWarning, match="emptied.*head.weight"):
        ts.prune.weights(model, 0.5)
    ctx = ts.Context(task=toy.task(), teacher=model, example_inputs=())
    outcome = ts.Prune(sparsity=0.5)(model, ctx)
    (warning,) = outcome.warnings
    assert re.search("emptied.*head.weight", warning)
    assert {record.layer: record.sparsity for record in outcome.layers}["head.weight"] == 1.0


def test_held_zeros_need_masks_that_fit_and_can_be_let_go_twice() -> None:
    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainError, match="masks.*not have.*head.weights"):
        ts.prune.hold_zeros(model, optimizer, {"head.weights": torch.ones(4, 8, dtype=torch.bool)})
    with pytest.raises(TrainError, match=r"'head.weight'.*boolean.*\(4, 8\).*torch.uint8"):
        ts.prune.hold_zeros(model, optimizer, {"head.weight": torch.ones(4, 8, dtype=torch.uint8)})
    mask = torch.rand(4) < 0.5
    held = ts.prune.hold_zeros(model, optimizer, {"head.bias": mask})
    assert torch.equal(model.head.bias != 0, mask)  # from now on, not from the next step on
    held.remove()
    held.remove()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": True}, "sparsity.*table of numbers.*True"),
        ({"sparsity": "0.5"}, r"sparsity.*table of numbers.*'0\.5'"),
        ({"sparsity": {"conv1": 0.5, "head": 1.0}}, r"sparsity of 'head'.*\[0, 1\)"),
        ({"threshold": -1.0}, r"threshold.*finite.*at least 0.*-1\.0"),
        ({"threshold": float("nan")}, "threshold.*finite.*nan"),
        ({"sparsity": 0.5, "scope": "local"}, "scope.*'global', 'layer'.*'local'"),
        ({"sparsity": 0.5, "schedule": "cubic"}, "schedule.*'one-shot', 'iterative', 'gradual'.*'cubic'"),
        ({"sparsity": 0.5, "train": 3}, r"train.*Finetune\(\.\.\.\).*Distill\(\.\.\.\).*got 3"),
        ({"sparsity": 0.5, "pattern": "slice", "n": float("nan")}, "n must be a number.*nan"),
        ({"threshold": 0.1, "pattern": "2:4"}, r"'2:4' fixes.*sparsity at 0\.5.*leave sparsity and threshold out"),
        ({"sparsity": {"conv1": 0.5}, "pattern": "2:4"}, "'2:4' fixes.*sparsity"),
        ({"pattern": "0:4"}, "0 < N < M, got 0:4"),
        ({"pattern": "4:4"}, "0 < N < M, got 4:4"),
        ({"threshold": 0.1, "schedule": "gradual", "train": ts.Finetune()}, "'gradual'.*one number.*sparsity.*None"),
        ({"sparsity": {"a": 0.1}, "schedule": "iterative", "train": ts.Finetune()}, "'iterative'.*one number"),
        ({"pattern": "2:4", "schedule": "iterative", "train": ts.Finetune()}, "'iterative'.*one number"),
        ({"sparsity": 0.5, "rounds": 0}, "rounds.*whole number.*at least 1.*got 0"),
        ({"sparsity": 0.5, "until": 0.0}, r"until.*\(0, 1\].*training.*0\.0"),
        ({"sparsity": 0.5, "until": float("nan")}, "until.*finite.*nan"),
        ({"sparsity": 0.5, "criterion": "tailor"}, "criterion 'tailor'.*l1, l2, random"),
        ({"sparsity": 0.5, "criterion": "fpgm"}, "'fpgm'.*whole channels.*l1, l2, random, lamp, taylor, fisher, wanda"),
        ({"pattern": "2:4", "criterion": "apoz"}, "'apoz'.*whole channels"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_work_says_so_when_it_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        ts.Prune(**fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tests.prune.test_weight_rules:nothing", "has no 'nothing'"),
        ("tests.nowhere:x", "cannot be imported.*ModuleNotFound"),
    ],
)
def test_a_named_criterion_that_is_not_there_is_an_error_before_any_work(spec: str, message: str) -> None:
    ctx = ts.Context(task=toy.task(), teacher=toy.model(), example_inputs=())
    with pytest.raises(PruneError, match=message):
        ts.Prune(sparsity=0.5, criterion=spec).check(ctx)


def test_a_pattern_may_repeat_the_sparsity_that_it_fixes() -> None:
    assert ts.Prune(pattern="2:4", sparsity=0.5).sparsity == 0.5
    assert ts.Prune(pattern="1:3", sparsity=2 / 3).sparsity == 2 / 3
