"""Whatever is done wrong in a removal, the check notices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import channel_networks as net
from tests.support.channel_laws import remove, run, scramble
from tests.support.wrong_surgery import noticed, with_cut
from torchslim.core.reason import Reason
from torchslim.prune.structured.attributes import mend
from torchslim.prune.structured.plan import Plan
from torchslim.prune.structured.removal import Shrunk
from torchslim.prune.structured.surgery import Patch, Surgery, perform

ACT = {"norm": "batch", "act": "silu"}  # no channel of which is ever dead


def convolutions() -> tuple[nn.Module, Any]:
    blocks = [
        net.Residual(nn.Sequential(net.ConvAct(2, 8, 12, **ACT), net.ConvAct(2, 12, 8, norm="none", act="tanh"))),
        net.Dense(2, 8, 4),
        net.ConvAct(2, 17, 8, norm="group", act="tanh"),
        net.Gate(2, 8),
    ]
    return net.Flow(2, net.ConvAct(2, 2, 8, **ACT), blocks, 8, 2), (torch.randn(2, 2, 5, 5),)


def grouped() -> tuple[nn.Module, Any]:
    blocks = [
        net.ConvAct(1, 8, 8, groups=2, act="tanh"),
        net.ConvAct(1, 8, 16, groups=8, norm="none", act="silu"),
        net.ConvAct(1, 16, 12, norm="instance", act="prelu"),
        nn.ConvTranspose1d(12, 8, 3),
    ]
    return net.Flow(1, net.ConvAct(1, 2, 8, **ACT), blocks, 8), (torch.randn(2, 2, 6),)


def attention() -> tuple[nn.Module, Any]:
    blocks: list[nn.Module] = [
        net.Normed(12, net.Attention(12, 4, 6, kv=2, sdpa=False), "layer"),
        net.Normed(12, net.Attention(12, 2, 6, fused=True), "rms"),
        net.Normed(12, net.TorchAttention(12, 3), "layer"),
        net.Normed(12, net.Gated(12, 10, fused=True), "rms"),
    ]
    return net.Tokens(12, blocks, tied=True, norm="layer"), (torch.randint(11, (2, 5)),)


def recurrent() -> tuple[nn.Module, Any]:
    blocks: list[nn.Module] = [
        net.Normed(6, net.Recurrent(6, 8, "LSTM", 2, True), "none"),
        net.Normed(6, net.Recurrent(6, 8, "GRU", 1, False), "none"),
    ]
    return net.Tokens(6, blocks, tied=False, norm="layer"), (torch.randint(11, (2, 5)),)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "convolutions": convolutions, "grouped": grouped, "attention": attention, "recurrent": recurrent,
}  # fmt: skip


@functools.cache
def removal(name: str, seed: int) -> tuple[Plan, Shrunk]:
    torch.manual_seed(seed)
    model, inputs = MODELS[name]()
    return remove(scramble(model, seed), inputs, seed, 0.4)


def choices(names: Sequence[str] = tuple(MODELS)) -> Any:
    return st.tuples(st.sampled_from(list(names)), st.integers(0, 3)).map(lambda pair: removal(*pair))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_right_surgery_passes(name: str) -> None:
    plan, done = removal(name, 0)
    assert not noticed(plan, done, done.surgery)


@pytest.mark.slow
@given(choices(), st.data())
@settings(max_examples=60)
def test_another_index_in_the_place_of_a_kept_one(made: tuple[Plan, Shrunk], data: st.DataObject) -> None:
    plan, done = made
    cut = data.draw(st.sampled_from(done.surgery.cuts))
    place = data.draw(st.integers(0, len(cut.kept) - 1))
    gone = data.draw(st.sampled_from(sorted(set(range(cut.size)) - set(cut.kept))))
    kept = (*cut.kept[:place], gone, *cut.kept[place + 1 :])
    assert noticed(plan, done, with_cut(done.surgery, cut, replace(cut, kept=kept)))


@pytest.mark.slow
@given(choices(), st.data())
@settings(max_examples=40)
def test_two_kept_indices_in_the_wrong_order(made: tuple[Plan, Shrunk], data: st.DataObject) -> None:
    plan, done = made
    cut = data.draw(st.sampled_from([each for each in done.surgery.cuts if len(each.kept) > 1]))
    one, two = data.draw(st.permutations(range(len(cut.kept))))[:2]
    kept = list(cut.kept)
    kept[one], kept[two] = kept[two], kept[one]
    assert noticed(plan, done, with_cut(done.surgery, cut, replace(cut, kept=tuple(kept))))


@pytest.mark.slow
@given(choices(), st.data())
@settings(max_examples=40)
def test_one_cut_of_those_that_go_together_is_missing(made: tuple[Plan, Shrunk], data: st.DataObject) -> None:
    plan, done = made
    assert noticed(plan, done, with_cut(done.surgery, data.draw(st.sampled_from(done.surgery.cuts)), None))


def answers(plan: Plan, surgery: Surgery) -> list[Tensor] | None:
    try:
        with torch.no_grad():
            return run(perform(plan.model, surgery).eval(), plan.inputs)
    except Exception:  # noqa: BLE001 - whatever a wrong attribute makes a model raise
        return None


def matters(plan: Plan, right: Surgery, wrong: Surgery) -> bool:
    one, two = answers(plan, right), answers(plan, wrong)
    return one is None or two is None or not all(map(torch.equal, one, two))


@pytest.mark.slow
@given(choices(), st.data())
@settings(max_examples=60)
def test_a_wrong_attribute_that_matters(made: tuple[Plan, Shrunk], data: st.DataObject) -> None:
    plan, done = made
    patches = done.surgery.patches
    patch = data.draw(st.sampled_from(patches))
    value = data.draw(st.integers(1, 2 * patch.old).filter(lambda value: value != patch.new))
    wrong = replace(
        done.surgery, patches=tuple(replace(each, new=value) if each is patch else each for each in patches)
    )
    assume(matters(plan, done.surgery, wrong))
    assert noticed(plan, done, wrong)


@pytest.mark.slow
@given(choices(), st.data())
@settings(max_examples=60)
def test_an_attribute_changed_that_should_not_be(made: tuple[Plan, Shrunk], data: st.DataObject) -> None:
    plan, done = made
    known = {(each.module, each.name) for each in done.surgery.patches}
    numbers = [
        (path, name, value)
        for path, module in plan.model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int and name[0] != "_" and (path, name) not in known
    ]
    path, name, value = data.draw(st.sampled_from(numbers))
    wrong = Patch(path, name, (), value, data.draw(st.integers(1, 9).filter(lambda new: new != value)))
    surgery = replace(done.surgery, patches=(*done.surgery.patches, wrong))
    assume(matters(plan, done.surgery, surgery))
    assert noticed(plan, done, surgery)


@pytest.mark.parametrize("name", ["convolutions", "grouped", "recurrent"])
def test_an_output_that_loses_elements(name: str) -> None:
    plan, done = removal(name, 0)
    coupling = done.coupling
    outputs = next(each for each in coupling.groups if each.reason == Reason.OUTPUT)
    removed = done.removed | np.isin(coupling.roots, outputs.classes[:1])
    surgery, diverged = mend(plan.model, coupling, removed, plan.inputs)
    assert diverged is not None or noticed(plan, replace(done, removed=removed), surgery)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_head_of_zeros_hides_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for part, module in model.named_modules():
        if isinstance(module, nn.Linear) and part.startswith("head") and name != "attention":
            nn.init.zeros_(module.weight)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            nn.init.zeros_(module.weight)
    plan, done = remove(model.eval(), inputs, 0, 0.4)
    for cut in done.surgery.cuts:
        gone = min(set(range(cut.size)) - set(cut.kept))
        assert noticed(plan, done, with_cut(done.surgery, cut, replace(cut, kept=(*cut.kept[:-1], gone)))), cut.weight


class Muted(nn.Module):
    """Nothing of its hidden layer reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.past = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.past(x) + 0.0 * self.two(self.one(x).tanh())


def test_a_check_that_cannot_fail_is_said_to_be_one() -> None:
    with pytest.warns(UserWarning, match="changes no output"):
        shrunk = ts.prune.channels(Muted(), (torch.randn(2, 6),), 0.5, of="channels", round_to=1, min_channels=1)
    record = ts.surgery(shrunk)
    assert record is not None
    assert record["rounds"][0]["about"]["output_change"] == 0
    seen = ts.surgery(ts.prune.channels(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)),
                                        (torch.randn(2, 6),), 0.5, of="channels", round_to=1, min_channels=1))  # fmt: skip
    assert seen is not None
    assert seen["rounds"][0]["about"]["output_change"] > 0.01
