"""Cost tables: sizes are exact, additive times are reproduced exactly, and tables say what the fit says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchslim.allocation.problem import LATENCY, MACS, PARAMS
from torchslim.analysis.costs.layout import INPUT, OUTPUT, layout_of
from torchslim.analysis.costs.measuring import Subject, measure_costs, measured, tables
from torchslim.analysis.costs.programs import Choice, random_choices, spread_choices
from torchslim.analysis.costs.samples import Sample, observed, shares
from torchslim.analysis.costs.sizes import Sizes, total
from torchslim.core.measurement import Measurement
from torchslim.core.step import Target
from torchslim.errors import SensitivityError
from torchslim.prune.latency.table import programs
from torchslim.prune.structured.plan import analyze
from torchslim.prune.structured.selection import Amount
from torchslim.runtimes.kernel_times import KernelTime


class Net(nn.Module):
    """A stem, a residual block, a concatenation and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.inner = nn.Conv2d(32, 48, 3, padding=1)
        self.outer = nn.Conv2d(48, 32, 3, padding=1)
        self.side = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = (x + self.outer(self.inner(x).relu())).relu()
        return self.head(torch.cat([y, self.side(x)], 1).mean((2, 3)))


INPUTS = (torch.zeros(1, 3, 8, 8),)
REFERENCE = Measurement(value=2.0, unit="ms", p10=1.9, p90=2.2, rounds=5)


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    plan = analyze(Net().eval(), INPUTS)
    amount = Amount(of="latency", round_to=4, min_channels=4)
    blocks = {"block": ["inner", "outer"]}
    return Subject.of(plan, INPUTS, Target(threads=1), amount, ("int8",), blocks, None, 7)


def additive(subject: Subject, choice: Choice) -> Sample:
    """A sample of a runtime whose times are sums of MACs, weights and activations of modules, by their context."""
    kept = {u: k / w for u, (k, w) in enumerate(zip(choice.kept, subject.widths, strict=True))}
    own, moves = {}, {}
    for place, (path, work) in enumerate(subject.works.items()):
        speed = 0.3 if subject.layout.context(path, choice.schemes) == "int8" else 1.0
        macs, elements = float(total(work.macs, kept)), float(total(work.elements, kept))
        own[path] = 1e-3 * place + speed * 1e-6 * macs + 1e-5 * elements
    for station in subject.layout.readers:
        output = subject.works[station].output if station in subject.works else ()
        passes = subject.layout.passes(station, choice.schemes)
        changes = sum(count for (made, taken), count in passes.items() if taken != made.replace("input", "float"))
        moves[station] = changes * (1e-3 + 1e-6 * float(total(output, kept)))
    ratio = sum(own.values()) + sum(moves.values())
    integer = frozenset(path for path in subject.works if path in subject.layout.readers)
    return Sample(choice=choice, ratio=ratio, own=own, moves=moves, integer=integer)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_sizes_are_those_of_the_narrowed_model(subject: Subject, data: st.DataObject) -> None:
    kept = [data.draw(st.sampled_from(own)) for own in subject.space.kept]
    fractions = {u: k / w for u, (k, w) in enumerate(zip(kept, subject.widths, strict=True))}
    removed = subject.maker.selection.removed(kept)
    assert total(subject.sizes.macs(), fractions) == pytest.approx(subject.coupling.macs(removed))
    expected = subject.coupling.parameters(removed, subject.sizes.selection.names)
    assert total(subject.sizes.parameters(), fractions) == pytest.approx(expected)


def test_additive_times_are_reproduced_and_the_tables_say_the_same(subject: Subject) -> None:
    samples = [additive(subject, choice) for choice in subject.choices(30, 0)]
    found = tables(subject, samples, REFERENCE)
    generator = np.random.default_rng(3)
    for _ in range(30):
        places = [int(generator.integers(len(decision.options))) for decision in found.decisions]
        places[-1] = 0
        exact = additive(subject, found.space.choice(places)).ratio
        assert found.predict(places) == pytest.approx(exact * REFERENCE.value, rel=0.02)
    assert found.spread == pytest.approx((1.0, 1.0), abs=0.02)


def test_macs_and_parameters_of_the_tables_are_exact_and_end_with_a_dropped_block(subject: Subject) -> None:
    found = tables(subject, [additive(subject, choice) for choice in subject.choices(6, 0)], REFERENCE)
    generator = np.random.default_rng(0)
    for _ in range(20):
        places = [int(generator.integers(len(decision.options))) for decision in found.decisions]
        places[-1] = 0
        removed = subject.maker.selection.removed(found.space.choice(places).kept)
        assert found.predict(places, MACS) == pytest.approx(subject.coupling.macs(removed))
        expected = subject.coupling.parameters(removed, subject.sizes.selection.names)
        assert found.predict(places, PARAMS) == pytest.approx(expected)
    whole = [0] * len(found.decisions)
    dropped = [*whole[:-1], 1]
    gone = sum(p.numel() for name, p in Net().named_parameters() if name.startswith(("inner", "outer")))
    assert found.predict(whole, PARAMS) - found.predict(dropped, PARAMS) == pytest.approx(gone)
    assert found.predict(dropped) < found.predict(whole)
    assert found.space.dropped(dropped) == ["block"]


def test_upper_ends_are_not_below_the_medians_and_grow_with_the_noise(subject: Subject) -> None:
    generator = np.random.default_rng(1)
    noisy = []
    for sample in (additive(subject, choice) for choice in subject.choices(30, 0)):
        own = {path: time * float(generator.lognormal(0.0, 0.2)) for path, time in sample.own.items()}
        noisy.append(replace(sample, own=own, ratio=sum(own.values()) + sum(sample.moves.values())))
    found = tables(subject, noisy, REFERENCE)
    places = [0] * len(found.decisions)
    upper = sum(term.at(places) for term in found.upper)
    assert upper > 1.05 * found.predict(places)
    assert found.spread[0] < 1 < found.spread[1]


def test_decisions_name_groups_and_layers_and_read_back_as_options_of_steps(subject: Subject) -> None:
    space = subject.space
    names = [decision.name for decision in space.decisions()]
    assert "scheme inner" in names
    assert names[-1] == "block block"
    places = [len(decision.options) - 1 for decision in space.decisions()]
    widths, layers = space.widths(places), space.layers(places)
    assert set(layers) == {"stem", "inner", "outer", "side", "head"}
    assert set(layers.values()) == {"int8"}
    assert widths["inner.weight[0]"] == subject.space.kept[names.index("width inner.weight[0]")][-1]
    assert space.widths([0] * len(names)) == {}


def test_layout_finds_readers_over_operations_between_layers(subject: Subject) -> None:
    layout = subject.layout
    assert layout.readers[INPUT] == ("stem",)
    assert set(layout.readers["stem"]) == {"inner", "side", ""}  # the addition is outside of modules
    assert layout.passes("stem", {"inner": "int8"}) == Counter({("float", "static"): 1, ("float", "float"): 2})
    on_grid = Counter({("static", "float"): 2, ("static", "static"): 1})  # the addition reads a value on a grid
    assert layout.passes("stem", {"stem": "int8"}) == on_grid
    assert layout.passes("stem", {}) == Counter({("float", "float"): 3})
    assert layout.passes(INPUT, {"stem": "int8"}) == Counter({("input", "static"): 1})
    assert layout.context("norm", dict.fromkeys(layout.layers, "int8")) == "static static"
    assert layout.context("norm", {"inner": "int8"}) == "float mixed"
    assert layout.context("norm", {}) == "float float"


def test_joins_are_on_a_grid_if_any_of_their_values_is_unless_they_were_seen_to_compute_on_floats(
    subject: Subject,
) -> None:
    layout = subject.layout
    for layer in ("stem", "outer"):
        assert layout.grid("", {layer: "int8"}) == "static"
    assert layout.grid("", {"inner": "int8"}) == "float"
    assert set(layout.deciders("outer")) >= {"outer", "stem"}
    seen = observed(layout, [Sample(choice=Choice(kept=(), schemes={"outer": "int8"}), ratio=1.0, own={"": 0.1})])
    assert seen.floats == {""}
    assert seen.grid("", {"outer": "int8"}) == "float"
    assert seen.passes("outer", {"outer": "int8"}) == Counter({("static", "float"): 1})
    kept = Sample(choice=Choice(kept=(), schemes={"outer": "int8"}), ratio=1.0, own={"": 0.1}, integer=frozenset({""}))
    assert not observed(layout, [kept]).floats


def test_shares_add_up_to_the_ratio_and_kernels_without_a_module_go_with_those_before_them() -> None:
    kernels = [
        KernelTime(node="cast", type="QuantizeLinear", ms=0.1, before=(-1,)),
        KernelTime(node="a/Conv", type="Conv", ms=1.0, before=(0,), integer=True),
        KernelTime(node="cast_1", type="Transpose", ms=0.2, before=(1,)),
        KernelTime(node="dequantize/DequantizeLinear", type="DequantizeLinear", ms=0.4),
        KernelTime(node="b/Gemm", type="Gemm", ms=0.3, before=(2, 3)),
    ]
    split = shares(kernels, lambda node: path if (path := node.rpartition("/")[0]) in {"a", "b"} else None, 0.7)
    own, moves = split.own, split.moves
    assert sum(own.values()) + sum(moves.values()) == pytest.approx(0.7)
    assert set(own) == {"a", "b"}
    assert moves["a"] < own["a"]
    assert own["b"] == pytest.approx(0.7 * 0.7 / 2.0)  # with its weights' cast
    assert set(moves) == {INPUT, "a"}
    assert split.integer == {"a"}


def test_nodes_outside_of_modules_belong_to_the_model_and_casts_to_none(subject: Subject) -> None:
    layout = subject.layout
    assert layout.owner("inner/Conv") == "inner"
    assert layout.owner("add/Add") == ""
    assert layout.owner("add_17/Add") == ""
    assert layout.owner("quantize_per_tensor_2/QuantizeLinear") is None
    assert layout.owner("Reorder") is None


def test_activations_of_a_linear_layer_do_not_count_its_transposed_weight() -> None:
    plan = analyze(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)).eval(), (torch.zeros(5, 16),))
    selection, _ = programs(plan, Amount(of="latency"))
    work = Sizes(selection).works()["0"]
    assert float(total(work.elements, {})) == 5 * 32
    assert float(total(work.reads, {})) == 5 * 16
    assert float(total(work.weights, {})) == 16 * 32 + 32


@given(count=st.integers(3, 40), seed=st.integers(0, 5))
def test_spread_choices_use_every_option_equally_often(count: int, seed: int) -> None:
    options = [(8, 6, 4, 2), (3, 1)]
    schemes: Mapping[str, tuple[str, ...]] = {"a": ("float", "int8"), "b": ("float",)}
    for place, own in enumerate(options):
        kept = [choice.kept[place] for choice in spread_choices(options, schemes, count, seed)]
        counts = [kept.count(option) for option in own]
        assert max(counts) - min(counts) <= 1
    first, again = (random_choices(options, schemes, count, seed) for _ in range(2))
    assert first == again
    assert all(choice.schemes["b"] == "float" for choice in first)


def test_choices_cover_ways_of_computing_that_independent_draws_rarely_reach() -> None:
    layers = "abcdefgh"
    schemes = dict.fromkeys(layers, ("float", "int8"))

    def ways(chosen: Mapping[str, str]) -> set[tuple[str, ...]]:
        """A module between each three layers computes in eight ways."""
        return {(layers[i : i + 3], *(chosen[layer] for layer in layers[i : i + 3])) for i in range(6)}

    def distinct(covering: bool) -> int:
        choices = spread_choices([(8, 4)], schemes, 16, 0, ways if covering else None)
        return len({way for choice in choices for way in ways(choice.schemes)})

    assert distinct(covering=True) > distinct(covering=False)


def test_a_layout_without_choices_has_no_readers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    program = torch.export.export(model, (torch.zeros(1, 4),))
    layout = layout_of(program, {"0", "1"}, ())
    assert layout.context("1", {}) == "float float"
    assert layout.readers == {INPUT: (OUTPUT,)}


def test_programs_must_be_counted() -> None:
    with pytest.raises(SensitivityError, match="at least 1"):
        measure_costs(nn.Linear(4, 4), (torch.zeros(1, 4),), programs=0)


def test_without_a_profiler_times_of_whole_programs_give_the_tables(subject: Subject) -> None:
    def whole(choice: Choice) -> Sample:
        """Every kind of module takes as long for each MAC and element, whichever module it is."""
        kept = {u: k / w for u, (k, w) in enumerate(zip(choice.kept, subject.widths, strict=True))}
        ratio = 0.01
        for path, work in subject.works.items():
            speed = 0.3 if subject.layout.context(path, choice.schemes) == "int8" else 1.0
            ratio += speed * 1e-6 * float(total(work.macs, kept)) + 1e-6 * float(total(work.elements, kept))
        return Sample(choice=choice, ratio=ratio)

    found = tables(subject, [whole(choice) for choice in subject.choices(60, 0)], REFERENCE)
    generator = np.random.default_rng(3)
    errors = []
    for _ in range(30):
        places = [int(generator.integers(len(decision.options))) for decision in found.decisions]
        places[-1] = 0
        errors.append(found.predict(places) / whole(found.space.choice(places)).ratio / REFERENCE.value - 1)
    assert np.median(np.abs(errors)) < 0.05
    assert found.predict([*[0] * (len(found.decisions) - 1), 1]) < found.predict([0] * len(found.decisions))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "eager"])
def test_measured_samples_are_kept_and_read_again(tmp_path: Path, runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    plan = analyze(Net().eval(), INPUTS)
    amount = Amount(of="latency", round_to=16)
    subject = Subject.of(plan, INPUTS, Target(runtime=runtime, threads=1), amount, ("int8",), {}, None, 2)
    samples, reference = measured(subject, 2, 0, tmp_path)
    assert len(samples) == 3
    for sample in samples:
        split = sum(sample.own.values()) + sum(sample.moves.values())
        assert split == pytest.approx(0.0 if runtime == "eager" else sample.ratio)
    assert all(path in subject.works for sample in samples for path in sample.own)
    if runtime != "eager":
        assert {"inner", "outer"} <= set(samples[2].integer)  # the second choice has all layers in int8
    assert measured(subject, 2, 0, tmp_path) == (samples, reference)
    found = tables(subject, samples, reference)
    assert found.predict([0] * len(found.decisions), LATENCY) > 0
