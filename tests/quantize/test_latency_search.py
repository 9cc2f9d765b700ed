"""Layers go back to float where that is faster: the search on made-up costs, and the step on made-up times."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchslim as ts
from torchslim.core.measurement import Measurement, Speedup
from torchslim.core.reason import Reason
from torchslim.core.seals import read_sealed
from torchslim.errors import QuantizeError
from torchslim.pipeline.recipe import parse_recipe
from torchslim.quantize import QuantizedModule
from torchslim.quantize.latency_search import MOST_PROGRAMS, Fastest, Group, Layers, Timed, fastest
from torchslim.quantize.units import units_of

Cost = Callable[[Layers], float]


def groups_of(kinds: Mapping[str, str]) -> list[Group]:
    by_kind: dict[str, list[str]] = {}
    for layer, kind in kinds.items():
        by_kind.setdefault(kind, []).append(layer)
    return [Group(kind=kind, layers=tuple(own), of=len(own)) for kind, own in by_kind.items()]


def timed(cost: Cost, asked: list[Layers]) -> Callable[[Layers, Sequence[Layers]], list[Timed]]:
    """A comparison that computes milliseconds instead of measuring them."""

    def compare(reference: Layers, candidates: Sequence[Layers]) -> list[Timed]:
        asked.extend(candidates)
        return [
            Timed(
                latency=Measurement(value=cost(layers), unit="ms"),
                speedup=Speedup(value=cost(reference) / cost(layers)),
            )
            for layers in candidates
        ]

    return compare


layers = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.floats(0.1, 3.0), st.floats(0.1, 3.0)), min_size=1, max_size=12
)


@given(layers, st.floats(0.0, 0.5))
def test_the_result_is_as_fast_as_both_ends_within_the_bound_of_programs(
    drawn: list[tuple[str, float, float]], conversion: float
) -> None:
    names = [str(number) for number in range(len(drawn))]

    def cost(in_float: Layers) -> float:
        own = sum(row[1] if name in in_float else row[2] for name, row in zip(names, drawn, strict=True))
        return own + conversion * sum((one in in_float) != (two in in_float) for one, two in pairwise(names))

    asked: list[Layers] = []
    found = fastest(groups_of({name: row[0] for name, row in zip(names, drawn, strict=True)}), timed(cost, asked))
    ends = cost(frozenset(names)), cost(frozenset())
    assert cost(frozenset(found.reasons)) <= min(ends) * 1.02  # the gain from which the search starts in float
    assert found.latency.value == pytest.approx(cost(frozenset(found.reasons)))
    assert (found.float_latency.value, found.integer_latency.value) == ends
    assert len(set(asked)) <= found.programs <= MOST_PROGRAMS
    assert frozenset(found.reasons) in asked  # what is chosen was timed
    assert all(Reason.FASTER_IN_FLOAT.given_in(reason) for reason in found.reasons.values())


@pytest.mark.parametrize("start", [1.0, 9.0])
def test_a_kind_that_is_slower_on_integers_goes_back_alone(start: float) -> None:
    kinds = {f"{kind}{number}": kind for number in range(4) for kind in ("depthwise", "pointwise")}
    slow = {"depthwise": start, "pointwise": 0.5}

    def cost(in_float: Layers) -> float:
        return sum(1.0 if layer in in_float else slow[kind] + 0.1 for layer, kind in kinds.items())

    found = fastest(groups_of(kinds), timed(cost, []))
    assert set(found.reasons) == {layer for layer, kind in kinds.items() if kind == "depthwise"}
    assert "depthwise" in next(iter(found.reasons.values()))


def test_halves_of_a_kind_are_tried_where_the_whole_does_not_pay() -> None:
    kinds = {str(number): "convolutions" for number in range(8)}

    def cost(in_float: Layers) -> float:
        return sum(1.0 if name in in_float else (4.0 if int(name) < 2 else 0.2) for name in kinds)

    found = fastest(groups_of(kinds), timed(cost, []))
    assert set(found.reasons) == {"0", "1"}


def test_a_profile_replaces_the_bisection() -> None:
    kinds = {str(number): "convolutions" for number in range(8)}
    slow = frozenset({"1", "5"})

    def cost(in_float: Layers) -> float:
        return sum(1.0 if name in in_float else (2.0 if name in slow else 0.2) for name in kinds)

    found = fastest(groups_of(kinds), timed(cost, []), lambda current: slow)
    assert (set(found.reasons), found.programs) == ({"1", "5"}, 3)
    wrong = fastest(groups_of(kinds), timed(cost, []), lambda current: frozenset(kinds) - slow)
    assert not wrong.reasons  # what a profile proposes is timed, too


def test_a_chain_of_changes_that_is_slower_in_the_end_is_taken_back() -> None:
    """Each change looks harmless in turn with the one before, and the whole has lost."""
    kinds = {str(number): str(number) for number in range(3)}
    every = frozenset(kinds)

    def compare(reference: Layers, candidates: Sequence[Layers]) -> list[Timed]:
        def ratio(layers: Layers) -> float:
            if reference == frozenset():
                return 2.0 if layers == every else 1.0
            if reference == every and len(layers) < 2:
                return 0.5
            return 1.0

        return [
            Timed(latency=Measurement(value=1.0, unit="ms"), speedup=Speedup(value=ratio(layers)))
            for layers in candidates
        ]

    found: Fastest = fastest(groups_of(kinds), compare)
    assert set(found.reasons) in ({"0", "1", "2"}, {"0", "1"}, {"0", "2"}, {"1", "2"})


def test_programs_that_the_runtime_does_not_take_are_not_chosen() -> None:
    kinds = {"0": "depthwise", "1": "pointwise"}

    def compare(reference: Layers, candidates: Sequence[Layers]) -> list[Timed]:
        return [
            Timed(latency=Measurement(value=1.0, unit="ms"), speedup=Speedup(value=1.0))
            if layers == frozenset(kinds)
            else Timed(latency=None, speedup=Speedup(value=1e-9))
            for layers in candidates
        ]

    found = fastest(groups_of(kinds), compare)
    assert set(found.reasons) == set(kinds)
    assert all("cannot be deployed" in reason for reason in found.reasons.values())
    assert found.integer_latency is None


# the step, on times that are a formula of the graph -------------------------------------------------------------------


class Mixed(nn.Module):
    """Depthwise and pointwise convolutions with a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.narrow, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(x)
        x = x + self.narrow(torch.relu(self.deep(x)))
        return self.head(x.mean((2, 3)))


class Clock:
    """A workbench on which each layer costs what `prices` says on integers, and 1 in float."""

    def __init__(self, profiles: bool = False, **prices: float) -> None:
        self.prices, self.profiles, self.made = prices, profiles, 0

    def deploy(self, model: nn.Module) -> Any:
        self.made += 1
        assert isinstance(model, QuantizedModule)
        integer = set()
        for node in model.program.graph.nodes:
            if "dequantize_per_channel" in str(node.target):
                integer |= {str(entry[0]) for user in node.users for entry in user.meta["nn_module_stack"].values()}
        return {
            name: price if any(path.endswith(name) for path in integer) else 1.0 for name, price in self.prices.items()
        }

    def compare(self, deployed: Mapping[str, Any], reference: str) -> dict[str, tuple[Measurement, Speedup]]:
        costs = {name: sum(own.values()) for name, own in deployed.items()}
        return {
            name: (Measurement(value=cost, unit="ms"), Speedup(value=costs[reference] / cost))
            for name, cost in costs.items()
        }

    def layer_times(self, deployed: Any) -> Mapping[str, float] | None:
        return deployed if self.profiles else None

    def within(self, path: str) -> Clock:
        return self


def task() -> ts.Task:
    x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    labelled = [(x, torch.zeros(16, dtype=torch.long))]
    return ts.Task(train=labelled, val=labelled, metric="accuracy")


def context(model: nn.Module, clock: Clock, **options: Any) -> ts.Context:
    data = task()
    inputs = (next(iter(data.val))[0][:2],)
    return ts.Context(task=data, teacher=model, example_inputs=inputs, workbench=clock, **options)  # type: ignore[arg-type]


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


STEP = ts.Quantize("int8", layers="auto", by="latency", observer="min-max")


@pytest.mark.slow
@pytest.mark.parametrize("profiles", [False, True])
def test_layers_that_are_slower_on_integers_stay_in_float_and_their_records_say_why(profiles: bool) -> None:
    clock = Clock(profiles, wide=0.5, deep=4.0, narrow=0.5, head=0.5)
    outcome = STEP(mixed(), context(mixed(), clock))
    records = {record.layer: record for record in outcome.layers}
    assert {name for name, record in records.items() if record.action == "quantized"} == {"wide", "narrow", "head"}
    assert Reason.FASTER_IN_FLOAT.given_in(records["deep"].reason)
    assert not outcome.warnings  # a choice is no fault
    evidence = outcome.evidence["faster_in_float"][""]
    assert (evidence["in_float"], evidence["layers"]) == (1, 4)
    assert (evidence["latency_ms"], evidence["float_ms"], evidence["integer_ms"]) == (2.5, 4.0, 5.5)
    assert clock.deploy(outcome.model) == {"wide": 0.5, "deep": 1.0, "narrow": 0.5, "head": 0.5}


@pytest.mark.slow
def test_where_float_is_fastest_the_model_stays_there_with_a_warning() -> None:
    clock = Clock(wide=2.0, deep=4.0, narrow=2.0, head=2.0)
    model = mixed()
    outcome = STEP(model, context(model, clock))
    assert not any(record.action == "quantized" for record in outcome.layers)
    assert any("stays in float, which is faster on onnxruntime: 4 ms" in message for message in outcome.warnings)
    x = next(iter(task().val))[0]
    torch.testing.assert_close(outcome.model(x), model(x))


@pytest.mark.slow
def test_a_training_leaves_these_layers_in_float_and_an_all_float_choice_trains_nothing() -> None:
    step = ts.Quantize(
        "int8", layers="auto", by="latency", mode="qat", observer="min-max", train=ts.Finetune(epochs=1, lr=1e-4)
    )
    outcome = step(mixed(), context(mixed(), Clock(wide=0.5, deep=4.0, narrow=0.5, head=0.5)))
    records = {record.layer: record for record in outcome.layers}
    assert Reason.FASTER_IN_FLOAT.given_in(records["deep"].reason)
    assert records["wide"].action == "quantized"
    assert outcome.history
    outcome = step(mixed(), context(mixed(), Clock(wide=2.0, deep=4.0, narrow=2.0, head=2.0)))
    assert not outcome.history
    assert not any(record.action == "quantized" for record in outcome.layers)


@pytest.mark.slow
def test_an_interrupted_choice_makes_no_program_twice(tmp_path: Path) -> None:
    clock = Clock(wide=0.5, deep=4.0, narrow=0.5, head=0.5)
    ctx = context(mixed(), clock, state=tmp_path)
    first = STEP(mixed(), ctx)
    assert json.loads(read_sealed(tmp_path / "latency.rows", ctx.key))
    made, clock.made = clock.made, 0
    assert made > 2
    assert STEP(mixed(), ctx).layers == first.layers
    assert clock.made == 0


@pytest.mark.slow
def test_with_a_bound_of_the_metric_that_chooses_first() -> None:
    x = next(iter(task().val))[0]
    model = mixed()
    data = ts.Task(
        train=[(x, x)], val=[(x, x)], metric=lambda predict, batches: -float((predict(x) - model(x)).detach().norm())
    )

    class Both(Clock):
        def deploy(self, model: nn.Module) -> Any:
            class Program(dict):  # type: ignore[type-arg]
                def __call__(self, *args: Any) -> Any:
                    return model(*args)

            return Program(super().deploy(model))

    ctx = ts.Context(
        task=data,
        teacher=model,
        example_inputs=(x[:2],),
        workbench=Both(wide=0.5, deep=4.0, narrow=0.5, head=0.5),  # type: ignore[arg-type]
    )
    outcome = ts.Quantize("int8", layers="auto", by="latency", metric_drop=1e3, observer="min-max")(model, ctx)
    records = {record.layer: record for record in outcome.layers}
    assert Reason.FASTER_IN_FLOAT.given_in(records["deep"].reason)
    assert records["wide"].action == "quantized"


def test_a_recipe_may_ask_for_it() -> None:
    text = (
        'model = "tests.support.toy:model"\ntask = "tests.support.toy:task"\n'
        '[[step]]\ndo = "quantize"\nscheme = "int8"\nlayers = "auto"\nby = "latency"\n'
    )
    (step,) = parse_recipe(text).steps
    assert step == ts.Quantize("int8", layers="auto", by="latency")
    assert isinstance(step, ts.Quantize)
    assert step.rehearsed(Path()).layers == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "latency"}, "by='latency' belongs to layers='auto'"),
        ({"layers": "auto", "by": "speed"}, "by must be.*'speed'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        ts.Quantize("int8", **options)


def test_without_a_workbench_the_check_says_what_to_do() -> None:
    model = mixed()
    with pytest.raises(QuantizeError, match="by='latency' needs a workbench.*ts.compress"):
        STEP.check(ts.Context(task=task(), teacher=model, example_inputs=(torch.randn(2, 3, 6, 6),)))


@pytest.mark.slow
def test_operations_go_to_float_with_the_layers_before_them() -> None:
    from torchslim.quantize.latency_trials import LatencyTrials
    from torchslim.quantize.stored_rows import StoredRows

    model = mixed()
    ctx = context(model, Clock())
    prepared = ts.quantize.prepare(model, ctx.example_inputs)
    prepared.calibrate([ctx.example_inputs])
    trials = LatencyTrials(prepared=prepared, bench=Clock(), ctx=ctx, path="", rows=StoredRows(ctx, "latency.rows"))  # type: ignore[arg-type]
    assert trials.kinds == {
        "layer wide": "pointwise convolutions",
        "layer deep": "depthwise convolutions",
        "layer narrow": "pointwise convolutions",
        "layer head": "linear layers",
    }
    addition = next(unit.key for unit in units_of(prepared.program) if unit.operation == "add")
    assert addition in trials.released(frozenset({"layer narrow"}))
    assert addition not in trials.released(frozenset({"layer deep"}))
    assert trials.released(frozenset(trials.kinds)) == frozenset(unit.key for unit in trials.units)
