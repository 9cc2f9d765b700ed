"""Sizes that stand as numbers in the code of forward change with the channels, for the pruned module alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchslim as ts
from tests.support.channel_laws import assert_equals_masked, assert_runs, remove
from torchslim.errors import PruneError
from torchslim.prune.structured.literals import literals, write


class States(nn.Module):
    """Initial states of a recurrent layer, made with its size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.hidden, self.out = nn.LSTM(6, 12, 2, batch_first=True), nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(2, x.size(0), 12), torch.zeros((2, x.shape[0], 12), dtype=x.dtype)
        return self.out(F.relu(self.hidden(self.core(x, (h, c))[0][:, -1])))


class Folded(nn.Module):
    """Channels and positions unfolded by a number."""

    def __init__(self, last: int = 3) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(6, 4 * 10), nn.Linear(10, last)

    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return self.out(torch.tanh(self.up(x).view(-1, 4, 10)) * scale).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape", "number"), [(States, (2, 5, 6), 12), (Folded, (3, 6), 10)])
def test_a_number_in_the_code_follows_the_channels(
    make: type[nn.Module], shape: tuple[int, ...], number: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, inputs = make().eval(), (torch.randn(shape),)
    _, done = remove(model, inputs, 0, 0.5)
    small = done.model
    patches = [each for each in done.surgery.patches if each.name == "forward"]
    assert [each.place for each in patches] == [(number,)]
    assert dict(literals(small))[number] == patches[0].new < number
    assert dict(literals(model))[number] == number
    assert_runs(model, small, inputs)
    assert_equals_masked(model, done, inputs)
    assert torch.equal(copy.deepcopy(small)(*inputs), small(*inputs))
    pruned = ts.prune.channels(model, inputs, 0.4, round_to=1, min_channels=1)
    twice = ts.prune.channels(pruned, inputs, 0.3, round_to=1, min_channels=1)
    ts.save(twice, tmp_path / "a")
    assert torch.equal(ts.load_module(tmp_path / "a", make).eval()(*inputs), twice(*inputs))
    exported = torch.export.export(twice, inputs).module()
    torch.testing.assert_close(exported(*inputs), twice(*inputs))


def test_a_number_set_back_leaves_the_class_its_own_forward() -> None:
    model = Folded()
    write(model, 10, 7)
    assert "forward" in vars(model)
    assert model.forward.__func__.__code__.co_consts != Folded.forward.__code__.co_consts
    write(model, 10, 10)
    assert "forward" not in vars(model)


def test_a_record_that_names_another_number_is_refused() -> None:
    model = Folded().eval()
    small = ts.prune.channels(model, (torch.randn(3, 6),), 0.4, round_to=1, min_channels=1)
    record = ts.surgery(small)
    assert record is not None
    for patch in record["rounds"][0]["patches"]:
        if patch["name"] == "forward":
            patch["place"] = [999]
    from torchslim.prune.structured.record import replay

    with pytest.raises(PruneError, match="which lacks it"):
        replay(Folded(), record)
