"""What may not matter does not; what was asked for is what comes out; what is unknown stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import channel_networks as net
from tests.support import models
from tests.support.channel_laws import assert_equals_masked, assert_runs, remove, run, scramble
from torchslim.artifact import model_size
from torchslim.errors import PruneError, SelectError
from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.dependency.trace import named_weights
from torchslim.prune.structured.plan import analyze
from torchslim.prune.structured.record import replay


@torch.library.custom_op("torchslim_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


doubled.register_autograd(lambda ctx, grad: 2 * grad)


class Halved(torch.autograd.Function):
    """An operation of a user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() / 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


class Chain(nn.Module):
    """Three layers, something between the last two."""

    def __init__(self, between: Any = torch.relu, wide: int = 16, last: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, wide), nn.Linear(wide, last), nn.Linear(last, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.second(torch.relu(self.first(x)))))


def chain(**fields: Any) -> tuple[nn.Module, Any]:
    return scramble(Chain(**fields)), (torch.randn(2, 4),)


def about(model: nn.Module) -> dict[str, Any]:
    return ts.surgery(model)["rounds"][-1]["about"]  # type: ignore[index,no-any-return]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in named_weights(model).items()}


def test_an_operation_that_nobody_knows_freezes_what_goes_in_and_is_reported() -> None:
    model, inputs = chain(between=lambda x: doubled(x))  # noqa: PLW0108 - operations cannot be copied
    shrunk = ts.prune.channels(model, inputs, 0.4, round_to=1, min_channels=1)
    assert "torchslim_tests.doubled.default" in about(shrunk)["unruled"]
    assert shrunk.second.out_features == 16
    assert shrunk.first.out_features < 16
    assert "doubled" in about(shrunk)["stayed"]["second.weight[0]"]
    assert_runs(model, shrunk, inputs)


def test_a_function_that_leaves_torch_freezes_what_goes_in() -> None:
    model, inputs = chain(between=lambda x: Halved.apply(x))  # noqa: PLW0108
    shrunk = ts.prune.channels(model, inputs, 0.4, round_to=1, min_channels=1)
    assert shrunk.second.out_features == 16
    assert shrunk.first.out_features < 16


class Sliced(nn.Module):
    """The first twenty channels go one way, the others another, by numbers in the code."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(4, wide), nn.Linear(20, 3), nn.Linear(wide - 20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.one(x[:, :20]) + self.two(x[:, 20:])


@pytest.mark.parametrize("wide", [50, 60])
def test_what_a_number_in_the_code_cuts_off_stays_and_the_rest_may_go(wide: int) -> None:
    model, inputs = scramble(Sliced(wide)), (torch.randn(2, 4),)
    _, done = remove(model, inputs, 0, 0.4)
    assert shapes(done.model)["one.weight"] == (3, 20)
    assert done.model.two.weight.shape[1] < wide - 20
    assert_runs(model, done.model, inputs)


def test_halves_that_a_number_in_the_code_cuts_lose_equally_many() -> None:
    model, inputs = scramble(Sliced(40)), (torch.randn(2, 4),)
    _, done = remove(model, inputs, 0, 0.4)
    assert done.model.one.weight.shape == done.model.two.weight.shape
    assert done.model.one.weight.shape[1] < 20
    assert_equals_masked(model, done, inputs)
    assert_runs(model, done.model, inputs)


def test_a_size_in_a_division_follows_the_shape_that_it_comes_from() -> None:
    model, inputs = chain(between=lambda x: x * (x.square().sum(-1, keepdim=True) / x.shape[-1] + 1).rsqrt())
    _, done = remove(model, inputs, 0, 0.5)
    assert done.rollbacks == ()
    assert done.model.second.weight.shape[0] < 16


def test_a_number_that_only_looks_like_a_size_keeps_its_value() -> None:
    class Buckets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.buckets = 16
            self.first, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
            self.table = nn.Embedding(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(len(x), device=x.device) % self.buckets
            return self.head(torch.tanh(self.first(x))) + self.table(places * 7 % self.buckets)

    model, inputs = scramble(Buckets()), (torch.randn(5, 4),)
    _, done = remove(model, inputs, 0, 0.5)
    assert done.model.first.weight.shape[0] == 8
    assert done.model.buckets == 16


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept_and_running_statistics_are_those_of_the_original(training: bool) -> None:
    model = scramble(net.Flow(2, net.ConvAct(2, 2, 8), [net.ConvAct(2, 8, 8)], 8)).train(training)
    before = copy.deepcopy(model)
    shrunk = ts.prune.channels(model, (torch.randn(2, 2, 5, 5),), 0.5, round_to=1, min_channels=1)
    assert shrunk.training is training
    kept = {cut["weight"]: cut["kept"] for cut in ts.surgery(shrunk)["rounds"][0]["cuts"]}
    for name in ("stem.norm.running_mean", "blocks.0.norm.running_var"):
        expected = named_weights(before)[name][kept[name]] if name in kept else named_weights(before)[name]
        assert torch.equal(named_weights(shrunk)[name], expected)
    assert all(
        torch.equal(one, two)
        for one, two in zip(before.state_dict().values(), model.state_dict().values(), strict=True)
    )


# -- renamed, permuted --------------------------------------------------------------------------------------------------


def partition(coupling: Coupling) -> set[tuple[int, int, bool]]:
    """Groups as how many classes and members they have, whatever they are called."""
    return {(len(each.classes), len(each.members), bool(each.reason)) for each in coupling.groups}


@pytest.mark.slow
def test_names_of_attributes_and_layers_do_not_matter() -> None:
    class Renamed(nn.Module):
        def __init__(self, attention: net.Attention) -> None:
            super().__init__()
            self.zebra, self.apple = attention.num_heads, attention.head_dim
            self.w1, self.w2, self.w3, self.w4 = attention.q, attention.k, attention.v, attention.out

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                w(x).unflatten(-1, (self.zebra, self.apple)).transpose(1, 2) for w in (self.w1, self.w2, self.w3)
            )
            scores = (q * self.apple**-0.5) @ k.transpose(-2, -1)
            return self.w4((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    inputs = (torch.randint(11, (2, 5)),)
    plain = scramble(
        net.Tokens(12, [net.Normed(12, net.Attention(12, 3, 8, sdpa=False), "layer")], tied=False, norm="layer")
    )
    renamed = copy.deepcopy(plain)
    renamed.blocks[0].body = Renamed(renamed.blocks[0].body)
    found = []
    for model in (plain, renamed.eval()):
        shrunk = ts.prune.channels(model, inputs, 0.5, round_to=1, min_channels=1)
        found.append((partition(analyze(model, inputs).coupling()), model_size.parameters(shrunk)))
    assert found[0] == found[1]


@pytest.mark.slow
@given(st.permutations(range(8)), st.integers(0, 9))
@settings(max_examples=15)
def test_the_order_of_channels_does_not_matter(order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = scramble(net.Flow(2, net.ConvAct(2, 2, 8), [net.Residual(net.ConvAct(2, 8, 8, act="tanh"))], 8), seed)
    inputs = (torch.randn(2, 2, 5, 5),)
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        for conv, norm in (
            (permuted.stem.conv, permuted.stem.norm),
            (permuted.blocks[0].body.conv, permuted.blocks[0].body.norm),
        ):
            for each in (conv.weight, *norm.parameters(), norm.running_mean, norm.running_var):
                each.copy_(each[order])
        permuted.blocks[0].body.conv.weight.copy_(permuted.blocks[0].body.conv.weight[:, order])
        permuted.heads[0].weight.copy_(permuted.heads[0].weight[:, order])
        torch.testing.assert_close(permuted(*inputs), model(*inputs))
        one, two = (ts.prune.channels(each, inputs, 0.5, round_to=1, min_channels=1) for each in (model, permuted))
        torch.testing.assert_close(two(*inputs), one(*inputs), rtol=1e-4, atol=1e-5)
    assert shapes(one) == shapes(two)


# -- what is left alone -------------------------------------------------------------------------------------------------


def test_excluded_layers_keep_all_and_only_included_groups_lose() -> None:
    model, inputs = chain()
    out = ts.prune.channels(model, inputs, 0.4, round_to=1, min_channels=1, exclude="first")
    assert (out.first.weight.shape, out.second.weight.shape[1]) == ((16, 4), 16)
    assert out.second.out_features < 16
    only = ts.prune.channels(model, inputs, 0.2, round_to=1, min_channels=1, include="first")
    assert only.first.out_features < 16
    assert only.second.out_features == 16
    with pytest.raises(SelectError, match="matches no layer"):
        ts.prune.channels(model, inputs, 0.4, include="frist")


@pytest.mark.slow
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 4, 8]), st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=20)
def test_widths_are_multiples_and_no_less_than_the_least(round_to: int, least: int, sparsity: float) -> None:
    model, inputs = chain(wide=48, last=6)
    shrunk = ts.prune.channels(
        model, inputs, sparsity, of="channels", round_to=round_to, min_channels=least, criterion="random"
    )
    wide, narrow = shrunk.first.out_features, shrunk.second.out_features
    assert wide == 48 or (wide % round_to == 0 and wide >= least)
    assert 1 <= narrow <= 6
    assert least >= 6 or narrow >= least  # a group no wider than the least ignores it


# -- budgets ------------------------------------------------------------------------------------------------------------


def budget_model() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    blocks = [net.Residual(net.ConvAct(2, 24, 24)), net.Dense(2, 24, 12), net.ConvAct(2, 49, 32, act="prelu")]
    return scramble(net.Flow(2, net.ConvAct(2, 2, 24), blocks, 32)), (torch.randn(1, 2, 6, 6),)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["params", "macs", "channels"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75])
def test_budgets_are_met_within_one_step_by_another_count(of: Any, scope: Any, sparsity: float) -> None:
    model, inputs = budget_model()
    shrunk = ts.prune.channels(model, inputs, sparsity, of=of, scope=scope, round_to=1, min_channels=1)
    units = analyze(model, inputs).coupling().units
    if of == "params":
        left = model_size.parameters(shrunk) / model_size.parameters(model)
    elif of == "macs":
        left = model_size.macs(shrunk, inputs).total / model_size.macs(model, inputs).total
    else:
        widths = [shrunk.stem.conv.out_channels, *(c.out_channels for c in (
            shrunk.blocks[1].left.conv, shrunk.blocks[1].right.conv, shrunk.blocks[2].conv))]  # fmt: skip
        left = sum(widths) / (24 + 12 + 13 + 32)
    assert left == pytest.approx(about(shrunk)["left"], abs=1e-9)
    # in scope "layer" all units may move at once
    step = sum(1 / unit.width for unit in units) if scope == "layer" else max(1 / unit.width for unit in units)
    assert abs(left - (1 - sparsity)) <= step
    counts = about(shrunk)
    assert counts["parameters"] == [model_size.parameters(model), model_size.parameters(shrunk)]
    assert counts["macs"] == [model_size.macs(model, inputs).total, model_size.macs(shrunk, inputs).total]


@pytest.mark.slow
def test_more_asked_for_is_never_more_left() -> None:
    model, inputs = budget_model()
    left = [
        model_size.parameters(ts.prune.channels(model, inputs, sparsity, round_to=1, min_channels=1))
        for sparsity in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert left == sorted(left, reverse=True)


# -- again --------------------------------------------------------------------------------------------------------------


def token_model() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    blocks: list[nn.Module] = [
        net.Normed(12, net.Attention(12, 4, 8, fused=True), "layer"),
        net.Normed(12, net.Gated(12, 24, False), "rms"),
    ]
    return scramble(net.Tokens(12, blocks, tied=True, norm="layer")), (torch.randint(11, (2, 5)),)


@pytest.mark.slow
@pytest.mark.parametrize("make", [budget_model, token_model])
def test_pruning_twice_is_recorded_as_two_rounds_that_can_be_replayed(make: Any) -> None:
    model, inputs = make()
    once = ts.prune.channels(model, inputs, 0.3, round_to=1, min_channels=1)
    twice = ts.prune.channels(once, inputs, 0.3, round_to=1, min_channels=1)
    record = ts.surgery(twice)
    assert len(record["rounds"]) == 2
    assert len(ts.surgery(once)["rounds"]) == 1
    fresh, _ = make()
    again = replay(fresh, record)
    assert shapes(again) == shapes(twice)
    assert ts.surgery(again) == record
    again.load_state_dict(twice.state_dict(), strict=True)
    for one, two in zip(run(again.eval(), inputs), run(twice.eval(), inputs), strict=True):
        assert torch.equal(one, two)
    assert_runs(model, twice, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("make", [budget_model, token_model])
def test_a_shrunk_model_can_be_exported(make: Any) -> None:
    model, inputs = make()
    shrunk = ts.prune.channels(model, inputs, 0.5, round_to=1, min_channels=1).eval()
    with torch.no_grad():
        exported = torch.export.export(shrunk, inputs, strict=False).module()
        torch.testing.assert_close(exported(*inputs), shrunk(*inputs))


def test_what_the_check_refuses_is_not_called_too_little() -> None:
    inputs = (torch.randn(2, 4, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 4))
    with pytest.raises(PruneError, match="passes the check"):
        ts.prune.channels(models.CrossAttention(), inputs, 0.4, round_to=1, min_channels=1)


def test_a_tied_weight_is_excluded_by_any_of_its_names() -> None:
    model, inputs = models.Tied(), (torch.randint(5, (2, 4)),)
    for name in ("embed", "head"):
        groups = analyze(model, inputs, exclude=name).coupling().groups
        assert all(each.reason for each in groups if any("embed" in member.weight for member in each.members))
    with pytest.raises(SelectError, match="matches no layer"):
        ts.prune.channels(model, inputs, exclude="hed")
