"""A sort of the batch that is undone is no part of a captured program; one that has an effect is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from torchslim.graph.batch_order import SORTS, drop_batch_order
from torchslim.graph.export import capture
from torchslim.graph.recurrent_shapes import recurrent_kept_whole

Body = Callable[[Tensor, Tensor], Tensor]
FEATURES = 4
WEIGHT = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Sorts samples (batch, steps, features) by length, computes, and restores the order of the results."""

    def __init__(self, *bodies: Body, batch_axis: int = 0) -> None:
        super().__init__()
        self.bodies, self.batch_axis = bodies, batch_axis

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        sorted_lengths, order = lengths.sort(descending=True)
        places = torch.arange(0, lengths.shape[0])
        inverse = torch.empty_like(order).scatter_(0, order, places)
        y = x.index_select(0, order)
        for body in self.bodies:
            y = body(y, sorted_lengths)
        return y.index_select(self.batch_axis, inverse)


# of (batch, steps, features) and lengths (batch,) -> (batch, steps, features)
ALIKE: dict[str, Body] = {
    "masked": lambda x, lengths: torch.where(
        (torch.arange(x.shape[1]).unsqueeze(0) < lengths.unsqueeze(1)).unsqueeze(-1), x, x.new_zeros(())
    ),
    "divided": lambda x, lengths: x / lengths.view(-1, 1, 1),
    "transposed": lambda x, lengths: (x.transpose(0, 1) * lengths.view(1, -1, 1)).permute(1, 0, 2),
    "linear": lambda x, lengths: nn.functional.linear(x, WEIGHT[:1]).expand(-1, -1, FEATURES),
    "softmax": lambda x, lengths: x.softmax(1),
    "joined": lambda x, lengths: torch.cat([x[..., :1], x.new_zeros(x.shape[0], x.shape[1], FEATURES - 1)], -1),
    "last": lambda x, lengths: x.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, -1, FEATURES)) + x,
    "reduced": lambda x, lengths: x - x.mean(2, True) + x.sum(1).unsqueeze(1) + x.select(1, 0).unsqueeze(1),
    "counted": lambda x, lengths: x + lengths.sum(),
}
UNLIKE: dict[str, Body] = {
    "first": lambda x, lengths: x - x[:1],
    "weighted": lambda x, lengths: x * torch.arange(x.shape[0]).view(-1, 1, 1),
    "cumulated": lambda x, lengths: x.cumsum(0),
    "longest": lambda x, lengths: x + lengths[0],
    "flat": lambda x, lengths: x.flatten(0, 1).cumsum(0).view(x.shape),
    "mixed": lambda x, lengths: x + lengths.new_ones(x.shape[0]).cumsum(0).view(-1, 1, 1),
    "normalized": lambda x, lengths: x.softmax(0),
}


def exported(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    batch = Dim.DYNAMIC
    with recurrent_kept_whole():
        return export(model.eval(), inputs, dynamic_shapes=({0: batch, 1: Dim.DYNAMIC}, {0: batch}))


def sorts(program: ExportedProgram) -> int:
    return sum(node.target in SORTS for node in program.graph.nodes)


def batch(lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return torch.randn(len(lengths), max(lengths), FEATURES, generator=generator), torch.tensor(lengths)


def check_same(program: ExportedProgram, model: nn.Module, lengths: list[int]) -> None:
    torch.testing.assert_close(program.module(check_guards=False)(*batch(lengths)), model(*batch(lengths)))


@pytest.mark.slow
@settings(max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.lists(st.sampled_from(sorted(ALIKE)), min_size=1, max_size=4),
    st.lists(st.integers(1, 6), min_size=2, max_size=5),
)
def test_a_sort_without_effect_goes(names: list[str], lengths: list[int]) -> None:
    """Whatever treats samples alike, in any order and for any lengths. Costs 5 s."""
    model = Between(*(ALIKE[name] for name in names))
    program = exported(model, *batch([3, 5, 2]))
    drop_batch_order(program)
    assert not sorts(program)
    check_same(program, model, lengths)


@pytest.mark.parametrize("name", sorted(UNLIKE))
def test_a_sort_with_an_effect_stays(name: str) -> None:
    model = Between(ALIKE["masked"], UNLIKE[name])
    program = exported(model, *batch([3, 5, 2]))
    drop_batch_order(program)
    assert sorts(program) == 1
    check_same(program, model, [2, 4, 1, 3])


def test_samples_restored_in_another_dimension_keep_their_sort() -> None:
    model = Between(lambda x, lengths: x[:, : x.shape[0]], batch_axis=1)
    program = exported(model, torch.randn(3, 3, FEATURES), torch.tensor([1, 3, 2]))
    drop_batch_order(program)
    assert sorts(program) == 1


class ReadsOrder(nn.Module):
    """Returns the sorted batch besides."""

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        sorted_lengths, order = lengths.sort()
        return x.index_select(0, order), sorted_lengths


def test_a_sort_that_is_read_stays() -> None:
    program = exported(ReadsOrder(), *batch([3, 5, 2]))
    drop_batch_order(program)
    assert sorts(program) == 1


class Packs(nn.Module):
    """A layer over packed sequences; its outputs and last states, in the order of the batch."""

    def __init__(self, kind: type[nn.RNNBase], given_state: bool) -> None:
        super().__init__()
        self.layer, self.given_state = kind(FEATURES, 3, 2, bidirectional=True, batch_first=True), given_state

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        one = x[:, 0, :3].expand(4, -1, -1).contiguous()
        state = None if not self.given_state else (one, one) if isinstance(self.layer, nn.LSTM) else one
        outputs, last = self.layer(packed, state)
        return (pad_packed_sequence(outputs, batch_first=True)[0], *(last if isinstance(last, tuple) else (last,)))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("given_state", [False, True])
def test_packed_sequences_need_no_sort(kind: type[nn.RNNBase], given_state: bool) -> None:
    torch.manual_seed(0)
    model = Packs(kind, given_state).eval()
    program = capture(model, [batch([3, 5, 2]), batch([1, 4])]).program
    targets = {str(node.target) for node in program.graph.nodes}
    assert not {target for target in targets if "sort" in target or "scatter" in target or "index_select" in target}
    for lengths in ([2, 6, 1, 6], [4, 4]):
        with torch.no_grad():
            expected, found = model(*batch(lengths)), program.module(check_guards=False)(*batch(lengths))
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
