"""Operations with rules of their own: what a removal leaves equals the original with zeros, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.support.channel_laws import assert_equals_masked, assert_runs, remove, run, scramble


class Between(nn.Module):
    """A convolution, something, a convolution and a head."""

    def __init__(self, between: Callable[[Tensor], Tensor], after: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(after, 6, 1), nn.Linear(6, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(x).relu())).relu().mean((2, 3)))


def pieces(x: Tensor, count: int) -> Tensor:
    batch, wide, *space = x.shape
    return x.view(batch, count, wide // count, *space)


def neighbors(x: Tensor, count: int) -> Tensor:
    batch, wide, *space = x.shape
    return x.view(batch, wide // count, count, *space)


class Filter(nn.Module):
    """One complex weight for each channel and frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 6, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.weight)
        return torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {  # and how many channels come out of 16
    "maxout": (lambda x: pieces(x, 2).max(1).values, 8),
    "maxout of neighbors": (lambda x: neighbors(x, 2).max(2).values, 8),
    "maxout by amax": (lambda x: pieces(x, 4).amax(1), 4),
    "maxout by chunk": (lambda x: torch.maximum(*x.chunk(2, 1)), 8),
    "maxout of a stack": (lambda x: torch.stack(x.chunk(4, 1)).max(0)[0], 4),
    "norm of pieces": (lambda x: pieces(x, 2).norm(dim=1), 8),
    "largest channel": (lambda x: x * x.max(1, keepdim=True)[0], 16),
    "largest in space": (lambda x: x.flatten(2).max(2).values[..., None, None], 16),
    "largest so far": (lambda x: x.cummax(2).values, 16),
    "glu": (lambda x: F.glu(x, 1), 8),
    "filter of frequencies": (Filter(), 16),
    "spectrum": (lambda x: torch.fft.rfft2(x).abs(), 16),
    "real part": (lambda x: torch.fft.fft2(x).real, 16),
    "there and back": (lambda x: torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3)), dim=(2, 3)).real, 16),
    "unfold": (lambda x: F.unfold(x, 3, padding=1).view(len(x), -1, *x.shape[2:]), 144),
    "unfold and fold": (lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[2:], 2, stride=2), 16),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 64),
    "repeat interleave": (lambda x: x.repeat_interleave(2, 1), 32),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 32),
    "flip of channels": (lambda x: x.flip(1), 16),
    "roll in space": (lambda x: x.roll((1, 2), (2, 3)), 16),
    "cumsum of channels": (lambda x: x.cumsum(1), 16),
    "buckets": (lambda x: x * torch.bucketize(x, torch.linspace(-1, 1, 5, dtype=x.dtype)), 16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("seed", [0, 1])
def test_channels_pass_through(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    between, after = BETWEEN[name]
    model, inputs = scramble(Between(between, after), seed), (torch.randn(2, 2, 6, 6),)
    plan, done = remove(model, inputs, seed, 0.5, scope="layer")
    assert {"first.weight", "second.weight", "head.weight"} <= {cut.weight for cut in done.surgery.cuts}
    assert not plan.trace.unruled
    assert_equals_masked(model, done, inputs)
    assert_runs(model, done.model, inputs)


FIXED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "the place of the largest is used": (lambda x: x * (1 + x.max(1, keepdim=True)[1]), "the place of the largest"),
    "the largest's place by argmax": (lambda x: x * (1 + x.argmax(1, keepdim=True)), "the place of the largest"),
    "the place of the largest so far": (lambda x: x * (1 + x.cummax(1)[1]), "the place of the largest"),
    "frequencies of channels": (lambda x: torch.fft.fft(x, dim=1).real, "a Fourier transform runs along it"),
}


@pytest.mark.parametrize("name", FIXED)
def test_channels_stay_where_their_positions_matter(name: str) -> None:
    between, why = FIXED[name]
    model, inputs = scramble(Between(between)), (torch.randn(2, 2, 6, 6),)
    _, done = remove(model, inputs, 0, 0.3)
    reasons = {group.name: group.reason for group in done.coupling.groups}
    assert why in reasons["first.weight[0]"]
    assert "first.weight" not in {cut.weight for cut in done.surgery.cuts}
    assert_equals_masked(model, done, inputs)


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths; its last state or the sum of its outputs is read."""

    def __init__(self, kind: str, *, both: bool, layers: int, last: bool, ordered: bool, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.core = getattr(nn, kind)(8, 10, layers, batch_first=batch_first, bidirectional=both)
        self.hidden, self.head = nn.Linear(20 if both and not last else 10, 12), nn.Linear(12, 3)
        self.last, self.ordered, self.batch_first = last, ordered, batch_first

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(tokens if self.batch_first else tokens.T)
        packed = pack_padded_sequence(x, lengths, batch_first=self.batch_first, enforce_sorted=self.ordered)
        outputs, state = self.core(packed)
        if self.last:
            x = (state[0] if isinstance(state, tuple) else state)[-1]
        else:
            x = pad_packed_sequence(outputs, batch_first=self.batch_first)[0].sum(1 if self.batch_first else 0)
        return self.head(self.hidden(x).relu())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(("both", "layers", "last", "ordered", "batch_first"), [
    (False, 1, True, False, True), (True, 2, False, False, True), (True, 1, True, True, False),
    (False, 2, False, True, False),
])  # fmt: skip
def test_sequences_of_different_lengths(
    kind: str, both: bool, layers: int, last: bool, ordered: bool, batch_first: bool
) -> None:
    model = Packed(kind, both=both, layers=layers, last=last, ordered=ordered, batch_first=batch_first)
    lengths = torch.tensor([6, 4, 1] if ordered else [2, 6, 3])
    inputs = (torch.randint(20, (3, 6)), lengths)
    plan, done = remove(scramble(model), inputs, 1, 0.5, scope="layer")
    assert {"embed.weight", "core.weight_hh_l0", "hidden.weight"} <= {cut.weight for cut in done.surgery.cuts}
    assert not plan.trace.unruled
    assert_equals_masked(model, done, inputs)
    other = (torch.randint(20, (2, 5)), torch.tensor([5, 2]))
    assert [each.shape for each in run(done.model, other)] == [(2, 3)]


class Bag(nn.Module):
    """Looked-up rows as a set."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.hidden, self.head = nn.EmbeddingBag(20, 10, mode=mode), nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(self.bag(tokens, starts)).relu())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("starts", [False, True])
def test_bags_of_rows(mode: str, starts: bool) -> None:
    model = scramble(Bag(mode))
    tokens = torch.randint(20, (12,) if starts else (3, 4))
    inputs = (tokens, torch.tensor([0, 3, 8])) if starts else (tokens,)
    _, done = remove(model, inputs, 0, 0.5, scope="layer")
    assert {"bag.weight", "hidden.weight", "head.weight"} <= {cut.weight for cut in done.surgery.cuts}
    assert_equals_masked(model, done, inputs)


class Deformed(nn.Module):
    """A convolution that looks where another one says."""

    def __init__(self, groups: int, offset_groups: int, masked: bool) -> None:
        super().__init__()
        self.first, self.offset = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 18 * offset_groups, 3, padding=1)
        self.mask = nn.Conv2d(8, 9 * offset_groups, 3, padding=1) if masked else None
        self.deform = torchvision.ops.DeformConv2d(8, 12, 3, padding=1, groups=groups)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        mask = None if self.mask is None else self.mask(x).sigmoid()
        return self.head(self.deform(x, self.offset(x) * 0.1, mask).relu())


@pytest.mark.parametrize(
    ("groups", "offset_groups", "masked"), [(1, 1, False), (1, 1, True), (2, 1, False), (1, 4, True), (2, 2, False)]
)
def test_deformable_convolutions(groups: int, offset_groups: int, masked: bool) -> None:
    model, inputs = scramble(Deformed(groups, offset_groups, masked)), (torch.randn(2, 3, 6, 6),)
    plan, done = remove(model, inputs, 0, 0.5, scope="layer")
    cuts = {(cut.weight, cut.dim) for cut in done.surgery.cuts}
    assert {("first.weight", 0), ("offset.weight", 1), ("deform.weight", 0), ("head.weight", 1)} <= cuts
    assert ("offset.weight", 0) not in cuts
    assert not plan.trace.unruled
    if done.model.deform.weight.shape[1] * groups == done.model.first.out_channels:
        assert_equals_masked(model, done, inputs)
    assert_runs(model, done.model, inputs)


class Compared(nn.Module):
    """Distances to prototypes, and a product of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 12), nn.Linear(5, 8)
        self.pair, self.prototypes = nn.Bilinear(12, 8, 10), nn.Parameter(torch.randn(4, 10))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.pair(self.one(x).relu(), self.two(x).relu()), self.prototypes)


def test_distances_and_products_of_two_inputs() -> None:
    model, inputs = scramble(Compared()), (torch.randn(3, 5),)
    plan, done = remove(model, inputs, 0, 0.5, scope="layer")
    assert {"one.weight", "two.weight", "pair.weight", "prototypes"} <= {cut.weight for cut in done.surgery.cuts}
    assert not plan.trace.unruled
    assert_equals_masked(model, done, inputs)


class Maxout(nn.Module):
    """The largest of two halves, over and over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 24), nn.Linear(12, 16), nn.Linear(8, 3)

    def largest(self, x: Tensor) -> Tensor:
        batch, wide = x.shape
        return x.view(batch, 2, wide // 2).max(1).values

    def forward(self, x: Any) -> Tensor:
        return self.head(self.largest(self.second(self.largest(self.first(x)))))


@pytest.mark.parametrize("seed", range(4))
def test_maxout_of_negative_values_is_over_what_is_kept(seed: int) -> None:
    model, inputs = scramble(Maxout(), seed), (torch.randn(3, 5),)
    _, done = remove(model, inputs, seed, 0.5, scope="layer")
    widths = (done.model.first.out_features, done.model.second.in_features, done.model.second.out_features)
    assert widths[0] == 2 * widths[1] < 24
    assert widths[2] == 2 * done.model.head.in_features < 16
    assert_equals_masked(model, done, inputs)  # pairs go together, so no zero meets a negative value
