"""Branches and methods that one call does not reach: named in a warning, left to fit, and brought in by examples."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchslim as ts
from tests.support import toy
from tests.support.channel_laws import assert_equals_masked, random_scores, scramble
from torchslim.core.reason import Reason
from torchslim.errors import PruneError
from torchslim.prune.structured.plan import analyze
from torchslim.prune.structured.removal import shrink
from torchslim.prune.structured.selection import Amount

FIELDS: dict[str, Any] = {"sparsity": 0.5, "of": "channels", "scope": "layer", "round_to": 1, "min_channels": 1}
X = torch.randn(2, 3, 8, 8)


class Heads(nn.Module):
    """A head chosen by an argument, and an embedding by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 14, 3)
        self.heads = nn.ModuleList([nn.Linear(14, 3), nn.Sequential(nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 5))])
        self.project = nn.Linear(14, 6)

    def features(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu().mean((2, 3))

    def embed(self, x: Tensor, *, normal: bool = True) -> Tensor:
        x = self.project(self.features(x))
        return F.normalize(x) if normal else x

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.heads[task](self.features(x))


class Exits(nn.Module):
    """An exit after every stage; all stages are equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inner, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 9, 1)) for inner in (3, 9, 9)
        )
        self.exits = nn.ModuleDict({str(place): nn.Linear(9, 4) for place in range(3)})

    def forward(self, x: Tensor, last: int = 2) -> Tensor:
        for stage in self.stages[: last + 1]:
            x = stage(x).relu()
        return self.exits[str(last)](x.mean((2, 3)))


class Branch(nn.Module):
    """Another way through the middle of a model, by a flag."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.usual, self.other = nn.Conv2d(10, 12, 1), nn.Conv2d(10, 12, 1, bias=False)
            self.scale = nn.Parameter(torch.ones(12, 1, 1))

        def forward(self, x: Tensor, usual: bool) -> Tensor:
            return self.usual(x) if usual else self.other(x) * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3)
        self.block, self.last = self.Block(), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor, usual: bool = True) -> Tensor:
        return self.last(self.block(self.first(self.stem(x).relu()).relu(), usual).relu())


class Flat(nn.Module):
    """An unseen head that flattens what the seen one averages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 7, 3)
        self.mean, self.flat = nn.Linear(7, 2), nn.Linear(7 * 16, 2)

    def forward(self, x: Tensor, flat: bool = False) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.flat(x.flatten(1)) if flat else self.mean(x.mean((2, 3)))


CASES: dict[str, tuple[type[nn.Module], list[Any], str]] = {  # further calls, and a name that the warning has
    "heads": (Heads, [(X, 1), {"x": X, "task": 1}, {"method": "embed", "args": (X,), "kwargs": {"normal": False}}], "embed"),
    "exits": (Exits, [(X, 0), (X, 1)], "exits.0.weight"),
    "branch": (Branch, [(X, False)], "block.other.weight"),
    "flat": (Flat, [{"x": X, "flat": True}], "flat.weight"),
}  # fmt: skip


def asked(model: nn.Module, example: Any) -> Tensor:
    if isinstance(example, tuple):
        return model(*example)  # type: ignore[no-any-return]
    if "method" in example:
        return getattr(model, example["method"])(*example["args"], **example.get("kwargs", {}))  # type: ignore[no-any-return]
    return model(**example)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_what_no_example_reaches_still_runs_and_is_named(name: str) -> None:
    make, examples, named = CASES[name]
    torch.manual_seed(0)
    model = scramble(make())
    with pytest.warns(UserWarning, match="no example reached") as told:
        shrunk = ts.prune.channels(model, (X,), **FIELDS)
    assert any(named in str(each.message) for each in told)
    assert shrunk.get_parameter(next(iter(dict(model.named_parameters())))).shape[0] < 10  # something has gone
    for example in [(X,), *examples]:
        assert asked(shrunk, example).shape == asked(model, example).shape
    found = ts.prune.inspect(model, (X,))
    assert named in found.unreached
    assert "no example reached" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_examples_bring_in_what_one_call_does_not_reach(name: str) -> None:
    make, examples, _ = CASES[name]
    torch.manual_seed(0)
    model = scramble(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrunk = ts.prune.channels(model, (X,), **FIELDS, examples=examples)
    cut = {each["weight"] for each in ts.surgery(shrunk)["rounds"][0]["cuts"]}
    assert {key for key, each in model.named_parameters() if each.dim() > 1} <= cut  # all know of one another
    assert ts.prune.inspect(model, (X,), examples=examples).unreached == ()
    plan = analyze(model, (X,), examples=examples)
    done = shrink(plan, Amount(**FIELDS), random_scores(0))
    assert done.error < 1e-6
    for example in examples:
        if isinstance(example, tuple):
            assert_equals_masked(model, done, example)
        assert asked(done.model, example).shape == asked(model, example).shape


def test_what_is_shared_with_unseen_code_may_be_cut_if_the_user_says_so() -> None:
    model = scramble(Heads())
    with pytest.warns(UserWarning, match="unseen='prune'.*not fit"):
        shrunk = ts.prune.channels(model, (X,), **FIELDS, unseen="prune")
    assert shrunk.second.out_channels < 14
    assert shrunk.project.in_features == 14
    with pytest.raises(PruneError, match="unseen.*'keep', 'prune'"):
        ts.prune.channels(model, (X,), unseen="cut")  # type: ignore[arg-type]


def test_a_method_without_weights_of_its_own_is_named_too() -> None:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x).relu())

        def encode(self, x: Tensor) -> Tensor:
            return self.down(x)

        def reset_all(self, value: float) -> None:
            self.down.weight.data.fill_(value)

    with pytest.warns(UserWarning, match="methods encode.*not checked"):
        ts.prune.channels(Coder(), (torch.randn(2, 6),), **FIELDS)
    encoded = {"method": "encode", "args": (torch.randn(2, 6),)}
    found = analyze(Coder(), (torch.randn(2, 6),), examples=[encoded]).coupling().groups
    assert Reason.OUTPUT.given_in(next(each.reason for each in found if each.name == "down.weight[0]"))


def test_where_all_is_shared_with_unseen_code_the_refusal_says_what_to_give() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor, two: bool = False) -> Tensor:
            return (self.two if two else self.one)(self.body(x).relu())

    with pytest.raises(
        PruneError,
        match=f"{Reason.NOT_REACHED}: two.*calls.*unseen='prune'",
    ):
        ts.prune.channels(Fork(), (torch.randn(2, 4),), **FIELDS)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ((X,), r"examples\[0\].*tuple"),
        ([{"method": "embeds"}], "no method"),
        ([{"method": "embed", "inputs": (X,)}], "method, args, kwargs.*'inputs'"),
        ([{"method": "embed", "args": X}], "args as a tuple"),
        ({"method": "embed"}, "must be a list"),
    ],
)
def test_examples_that_are_none_say_what_to_give(examples: Any, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        ts.prune.channels(Heads(), (X,), examples=examples)


def test_macs_are_those_of_the_example_inputs() -> None:
    model = scramble(Heads())
    one, all_ = (ts.prune.inspect(model, (X,), examples=each) for each in ([], [(X, 1)]))
    assert one.macs == all_.macs


def test_a_step_takes_the_examples_of_its_task() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 10, 3), nn.Conv2d(10, 8, 3)
            self.head, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            hidden = self.second(self.first(x).relu()).relu().mean((2, 3))
            return self.other(hidden) if other else self.head(hidden)

    x = toy.task().inputs(next(iter(toy.task().val)))
    step = ts.Prune(sparsity=0.4, pattern="channel", of="channels", scope="layer", round_to=1, min_channels=1)
    seen = []
    for examples in ((), [(*x, True)]):
        task = toy.task(examples=examples)
        model = Two().eval()
        outcome = step(model, ts.Context(task=task, teacher=model, example_inputs=x))
        seen.append(any("no example reached" in each for each in outcome.warnings))
        assert outcome.model(*x, True).shape == (len(x[0]), 4)
    assert seen == [True, False]
