"""The check runs in float64 whatever forward makes, with the same noise in both runs; or says that it does not."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import torchslim as ts
from tests.support.channel_laws import assert_runs, assert_untouched, remove, scramble, state
from tests.support.wrong_surgery import noticed, with_cut

GRID = torch.linspace(-1, 1, 5)
BOX: dict[tuple[int, ...], Tensor] = {}


def autocast(h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (h @ torch.ones(h.shape[-1], 1)) * h


def cached(h: Tensor) -> Tensor:
    if (key := (h.shape[0], 1)) not in BOX:
        BOX[key] = torch.rand(key)
    return h * BOX[key]


def masked(h: Tensor) -> Tensor:
    own = torch.zeros(h.shape[0], h.shape[0]).masked_fill(torch.ones(h.shape[0], h.shape[0]).triu(1).bool(), -torch.inf)
    return F.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=own)[0]


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda h: torch.zeros(h.shape).index_add(0, torch.arange(h.shape[0]), h),
    "zeros in place": lambda h: torch.zeros(h.shape, dtype=torch.float32).add_(h),
    "float()": lambda h: h.float() * 2 + h.to(torch.float32),
    "tensor": lambda h: h * torch.tensor([2.0]) + torch.tensor(0.5),
    "legacy types": lambda h: h.type(torch.FloatTensor) * torch.FloatTensor([3.0]),
    "numpy": lambda h: h * torch.from_numpy(np.ones(1, dtype=np.float32)) * np.float32(1.5),
    "constant": lambda h: h * GRID[:1] + GRID.view(1, -1)[:, 2:3],
    "matrix": lambda h: torch.from_numpy(np.eye(h.shape[0], dtype=np.float32)) @ h,
    "finfo": lambda h: h.masked_fill(h < 0, torch.finfo(torch.float32).min).clamp(min=-3),
    "half": lambda h: h.half().float() + h.bfloat16().float(),
    "whole numbers divided": lambda h: h + torch.sin(torch.arange(h.shape[0])[:, None] / 3),
    "where": lambda h: torch.where(h > 0, h, torch.tensor(0.1)),
    "autocast": autocast,
    "cached": cached,
    "attention": masked,
}

NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": lambda h: h + 0.1 * torch.randn_like(h),
    "randn": lambda h: h + torch.randn(h.shape),
    "rand": lambda h: h * torch.rand(h.shape[0], h.shape[1], dtype=torch.float32),
    "generator": lambda h: h + torch.randn(h.shape, generator=torch.Generator().manual_seed(1)),
    "dropout": lambda h: F.dropout(h, 0.3, True),
    "dropout of channels": lambda h: F.dropout1d(h[..., None], 0.3, True)[..., 0],
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.3, True),
    "bernoulli": lambda h: h * torch.bernoulli(h.sigmoid()),
    "bernoulli_": lambda h: h * torch.empty_like(h).bernoulli_(0.5),
    "normal_": lambda h: h + h.new_empty(h.shape).normal_(),
    "normal": lambda h: torch.normal(h, h.abs() + 0.1),
    "distribution": lambda h: torch.distributions.Normal(h, F.softplus(h)).rsample(),
    "gamma": lambda h: torch._standard_gamma(h.abs() + 0.5),
    "poisson": lambda h: torch.poisson(h.abs()),
    "gumbel": lambda h: h + F.gumbel_softmax(h, dim=-1),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "stochastic depth": lambda h: h + (torch.rand(h.shape[0], 1) < 0.5) * h.tanh(),
    "a layer left out": lambda h: h if torch.rand(1).item() < 0.5 else h * 2,
    "a layer left out by numpy": lambda h: h if np.random.rand() < 0.5 else h * 2,
    "samples": lambda h: h * (1 + torch.multinomial(h[:, :1].abs() + torch.ones(1, 3), 1)),
}


class Between(nn.Module):
    """Three layers, and something between the first two."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.b(self.between(torch.tanh(self.a(x))))))


def between(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(seed)
    return scramble(Between((MADE | NOISE)[name]), seed), (torch.randn(4, 8),)


@pytest.mark.slow
@given(st.sampled_from([*MADE, *NOISE]), st.integers(0, 20), st.data())
@settings(max_examples=40)
def test_whatever_is_made_or_drawn_on_the_way_is_checked_in_float64(name: str, seed: int, data: st.DataObject) -> None:
    model, inputs = between(name, seed)
    before = state(model)
    plan, done = remove(model, inputs, seed, data.draw(st.sampled_from([0.2, 0.5, 0.8])))
    assert done.rollbacks == ()
    assert plan.precision == torch.float64
    assert not done.imprecise
    assert done.model.o.weight.shape[1] < 16 or done.model.a.weight.shape[0] < 24
    assert_runs(model, done.model, inputs)
    assert_untouched(model, before)


@pytest.mark.slow
@given(st.sampled_from([*MADE, *NOISE]), st.data())
@settings(max_examples=30)
def test_a_wrong_cut_is_noticed_there_too(name: str, data: st.DataObject) -> None:
    plan, done = remove(*between(name), 0, 0.5)
    cut = data.draw(st.sampled_from(done.surgery.cuts))
    gone = data.draw(st.sampled_from(sorted(set(range(cut.size)) - set(cut.kept))))
    place = data.draw(st.integers(0, len(cut.kept) - 1))
    kept = (*cut.kept[:place], gone, *cut.kept[place + 1 :])
    assert noticed(plan, done, with_cut(done.surgery, cut, replace(cut, kept=kept)))


class Only32(nn.Module):
    """Its code takes float32 and nothing else."""

    def __init__(self, bits: bool) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 3)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.bits:
            h = (h.view(torch.int32) & -2).view(torch.float32)
        elif h.dtype != torch.float32:
            raise TypeError("float32, please")
        return self.o(torch.tanh(self.b(h)))


@pytest.mark.parametrize("bits", [True, False])
def test_where_the_model_itself_fails_in_float64_the_check_runs_in_float32_and_says_so(bits: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Only32(bits).eval(), (torch.randn(4, 8),)
    with pytest.warns(UserWarning, match="checked in float32"):
        shrunk = ts.prune.channels(model, inputs, 0.5, round_to=1, min_channels=1)
    record = ts.surgery(shrunk)
    assert record is not None
    assert record["rounds"][0]["about"]["precision"] == "float32"
    assert shrunk.b.weight.shape[0] < 16
    plan, done = remove(model, inputs, 0, 0.5)
    assert plan.precision == torch.float32
    for cut in done.surgery.cuts:
        gone = min(set(range(cut.size)) - set(cut.kept))
        wrong = with_cut(done.surgery, cut, replace(cut, kept=(*cut.kept[:-1], gone)))
        assert noticed(plan, done, wrong), cut.weight


class Threaded(nn.Module):
    """Notes what another thread makes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.seen = nn.Linear(8, 16), nn.Linear(16, 3), set[torch.dtype]()

    def __deepcopy__(self, memo: dict[int, Any]) -> Threaded:
        copied = Threaded.__new__(Threaded)
        nn.Module.__init__(copied)
        copied.a, copied.o, copied.seen = (memo.get(id(self.a)), memo.get(id(self.o)), self.seen)
        for name in ("a", "o"):
            setattr(copied, name, copy_of(getattr(self, name), memo))
        return copied

    def forward(self, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: self.seen.add((torch.zeros(1) + torch.tensor(1.0)).dtype))
        thread.start()
        thread.join()
        return self.o(torch.relu(self.a(x)) + torch.zeros(1, dtype=torch.float32))


def copy_of(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    import copy

    return copy.deepcopy(module, memo)


def test_other_threads_and_what_comes_after_notice_nothing() -> None:
    model = Threaded().eval()
    remove(model, (torch.randn(2, 8),), 0, 0.5)
    assert model.seen == {torch.float32}
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).dtype == torch.float32


class Reduced(nn.Module):
    """Convolutions, attention, a norm and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 24, 3, padding=1), nn.BatchNorm1d(24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.scale, self.recurrent, self.head = nn.LayerNorm(24), nn.GRU(24, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x))).transpose(1, 2)
        h = self.scale(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(self.recurrent(h)[0][:, -1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_pruned_and_stay_so(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = scramble(Reduced()).to(dtype), (torch.randn(2, 4, 6).to(dtype),)
    plan, done = remove(model, inputs, 0, 0.4)
    assert plan.precision == torch.float64
    assert {each.dtype for each in done.model.parameters()} == {dtype}
    assert done.model(*inputs).dtype == dtype


@functools.lru_cache
def ramp(count: int) -> Tensor:
    return torch.linspace(1, 2, 4)[:, None].expand(4, count).contiguous()


def test_a_table_that_is_kept_between_runs_is_made_once_and_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = scramble(Between(lambda h: h * ramp(h.shape[1])))
    _, done = remove(model, (torch.randn(4, 8),), 0, 0.5)
    assert done.model.b.weight.shape[0] < 16
    assert ramp(24).dtype == torch.float32
    assert done.model(torch.randn(4, 8)).dtype == torch.float32


class Complex(nn.Module):
    """Complex matrices between real layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 12), nn.Linear(10, 16), nn.Linear(16, 3)
        self.one = nn.Parameter(torch.randn(12, 14, dtype=torch.cfloat))
        self.two = nn.Parameter(torch.randn(14, 10, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).to(torch.cfloat) @ self.one + torch.zeros(1, dtype=torch.cfloat)
        return self.o(torch.tanh(self.b((h @ self.two).abs())))


@pytest.mark.parametrize("seed", range(3))
def test_channels_of_complex_weights_are_counted_ranked_and_cut(seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs = Complex().eval(), (torch.randn(4, 8),)
    with torch.no_grad():
        model.one[:, 5] *= 1e-3
        model.two[5] *= 1e-3
    plan, done = remove(model, inputs, seed, 0.5)
    assert plan.precision == torch.float64
    assert done.rollbacks == ()
    assert done.model.one.shape[1] == done.model.two.shape[0] < 14
    assert done.model.one.dtype == torch.complex64
    assert_runs(model, done.model, inputs)
    for cut in done.surgery.cuts:
        gone = min(set(range(cut.size)) - set(cut.kept))
        assert noticed(plan, done, with_cut(done.surgery, cut, replace(cut, kept=(*cut.kept[:-1], gone)))), cut.weight
    hidden = ts.prune.channels(model, inputs, 0.02, criterion="l1", round_to=1, min_channels=1)
    assert torch.equal(hidden.one, torch.cat([model.one[:, :5], model.one[:, 6:]], 1))
