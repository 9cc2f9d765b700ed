"""`inspect` and `channels` never contradict each other, whatever the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support.channel_laws import scramble
from tests.support.random_networks import conv_networks, token_networks
from torchslim.errors import PruneError
from torchslim.prune import ChannelGroup
from torchslim.prune.structured.plan import Plan, analyze
from torchslim.prune.structured.proof import settle
from torchslim.prune.structured.removal import Stuck, shrink
from torchslim.prune.structured.selection import Amount

NETWORKS = st.one_of(conv_networks(), token_networks())


def alone(model: nn.Module, inputs: tuple[object, ...], wanted: Sequence[ChannelGroup]) -> Plan:
    """What `inspect` found, with nothing free but these groups."""
    plan = analyze(model, inputs)
    settle(plan)
    known = {(each.members, each.width) for each in wanted}
    for group in plan.coupling().groups:
        members = tuple(f"{each.weight}[{each.dim}]" for each in group.members)
        if (members, len(group.classes)) not in known:
            plan.stays.append((group.classes, "not asked for"))
    return plan


@pytest.mark.slow
@given(NETWORKS, st.data())
@settings(max_examples=6)
def test_what_may_go_goes_when_one_channel_of_it_is_asked_for(
    made: tuple[nn.Module, tuple[object, ...]], data: st.DataObject
) -> None:
    model, inputs = made
    found = ts.prune.inspect(model, inputs)
    open_ = [each for each in found.groups if each.prunable]
    if not open_:
        return
    group = data.draw(st.sampled_from(open_))
    together = [each for each in found.groups if each.unit == group.unit]
    plan = alone(model, inputs, together)
    assert plan.coupling().units
    done = shrink(
        plan,
        Amount(round_to=1, min_channels=1),
        lambda _, group: np.arange(len(group.classes), dtype=np.float64),
        lambda selection: [unit.width - (place == 0) for place, unit in enumerate(selection.coupling.units)],
    )
    assert done.rollbacks == ()
    lost = {f"{cut.weight}[{cut.dim}]" for cut in done.surgery.cuts}
    assert lost
    assert lost <= {member for each in together for member in each.members}


@pytest.mark.slow
@given(NETWORKS, st.sampled_from([0.2, 0.6]))
@settings(max_examples=6)
def test_what_does_not_go_stays_by_the_same_reason(made: tuple[nn.Module, tuple[object, ...]], sparsity: float) -> None:
    model, inputs = made
    found = ts.prune.inspect(model, inputs)
    outcome: nn.Module | PruneError
    try:
        outcome = ts.prune.channels(model, inputs, sparsity, of="channels", round_to=1, min_channels=1)
    except PruneError as error:
        outcome = error
    if isinstance(outcome, Stuck):
        assert not any(each.prunable for each in found.groups)
        assert any(each.reason in str(outcome) for each in found.groups if each.reason)
        return
    if isinstance(outcome, PruneError):
        assert "removes no channel" in str(outcome)
        return
    record = ts.surgery(outcome)
    assert record is not None
    said = {each.members[0]: each.reason for each in found.groups if each.reason}
    assert record["rounds"][0]["about"]["stayed"] == said


class Unknown(nn.Module):
    """An operation that reads neighbors in the middle, and layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.linalg.qr(torch.tanh(self.a(x)))[0]
        return self.o(torch.tanh(self.c(x * 2 + torch.tanh(self.b(x)))))


def test_a_refusal_names_its_first_cause() -> None:
    torch.manual_seed(0)
    model, inputs = scramble(Unknown()), (torch.randn(12, 12),)
    said = {member: each.reason for each in ts.prune.inspect(model, inputs).groups for member in each.members}
    assert said["a.weight[0]"] == said["b.weight[1]"] == said["b.weight[0]"] == said["c.weight[1]"]
    assert "'linalg_qr' has no rule" in said["a.weight[0]"]
    assert said["c.weight[0]"] == ""
    with pytest.raises(Stuck, match="no channel of Unknown.*'linalg_qr' has no rule"):
        ts.prune.channels(model, inputs, 0.5, exclude="c")


def test_a_settled_plan_says_of_all_that_failed_why() -> None:
    class Even(nn.Module):
        """Works with an even count of channels alone, which no trace can see."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            if h.shape[1] % 2:
                raise ValueError("even widths, please")
            return self.o(h)

    plan = analyze(Even().eval(), (torch.randn(2, 4),))
    assert not settle(plan).units
    assert any("even widths, please" in each.reason for each in plan.coupling().groups)
    with pytest.raises(Stuck, match="even widths, please"):
        ts.prune.channels(Even().eval(), (torch.randn(2, 4),), 1 / 8, of="channels", round_to=1, min_channels=1)
