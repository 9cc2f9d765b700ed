"""Sensitivity: each point is what a model with that one change gives, whatever was reused on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import torchslim as ts
from tests.support import models, toy
from torchslim.analysis import probe
from torchslim.analysis.activation_cache import Changed, Replays, story_of
from torchslim.analysis.measures import LARGEST_DB, decibels
from torchslim.analysis.result import Point, Sensitivity
from torchslim.errors import SensitivityError, TaskError
from torchslim.prune.structured.plan import analyze
from torchslim.quantize import convert, prepare, sqnr
from torchslim.quantize.layerwise import Passes, damages, noise_of, singles

LAYERS = 6


class Chain(nn.Module):
    """Linear layers one after another, with what a replay can get wrong: views, work in place, reads from afar."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(LAYERS)])
        self.act = nn.ReLU(inplace=True)
        self.ran: list[int] = []  # samples, by call of a layer
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, output: self.ran.append(len(output)))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.layers[0](x)
        for layer in self.layers[1:-1]:
            x = layer(x)
            view = x.view(-1)
            view.mul_(1.5)
            x = self.act(x)
        return self.layers[-1](x + first)


class Convs(nn.Module):
    """A chain of convolutions, one of them depthwise, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        return self.head(torch.relu(self.deep(x)).mean((2, 3)))


def made(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def rows(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 8, generator=generator), torch.arange(5)) for _ in range(count)]


def task(batches: Any, **options: Any) -> ts.Task:
    return ts.Task(**({"val": batches, "calibration": batches, "metric": "accuracy"} | options))


# channels of a group --------------------------------------------------------------------------------------------------


class Twins(nn.Module):
    """Every hidden unit twice, so that the layer behind can do without one of each pair."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)
        with torch.no_grad():
            self.first.weight[6:], self.first.bias[6:] = self.first.weight[:6], self.first.bias[:6]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def test_a_channel_that_others_can_replace_does_no_damage_after_reconstruction() -> None:
    data = task(rows(8))
    plain, solved = (
        ts.sensitivity(made(Twins), data, ratios=(1 / 12,), schemes=(), reconstruct=reconstruct)
        for reconstruct in (False, True)
    )
    ((before,), (after,)) = ([point.value for point in found.points] for found in (plain, solved))
    assert before is not None
    assert after is not None
    assert before < 40 < 80 < after  # dB


# a layer by itself ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "int4-weights", "int8-dynamic"])
@pytest.mark.parametrize("kind", [Chain, Convs])
def test_a_layer_alone_is_what_a_model_quantized_there_alone_gives(kind: Any, scheme: str) -> None:
    model = made(kind)
    inputs = [(x,) for x, _ in rows(2)] if kind is Chain else [(toy.images(4, seed)[0],) for seed in (1, 2)]
    prepared = prepare(model, inputs[0], scheme=scheme)
    if scheme == "int8":
        prepared.calibrate(inputs)
    changes, passes = singles(prepared), Passes(prepared, inputs)
    assert len(changes) == (LAYERS if kind is Chain else 3)
    for change in changes:
        alone = prepare(
            model, inputs[0], scheme=scheme,
            layers={each.layer: "float" for each in changes if each is not change},
        )  # fmt: skip
        if scheme == "int8":
            alone.calibrate(inputs)
        quantized = convert(alone)
        expected = [quantized(*each) for each in inputs]
        assert sqnr(expected, list(passes.outputs(change))) > 100, change.layer


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2**30, 0])
def test_what_is_reused_changes_no_value_and_saves_the_work_in_front(limit: int) -> None:
    model = made(Chain)
    inputs = [(x,) for x, _ in rows(3)]
    prepared = prepare(model, inputs[0], scheme="int8-weights")
    passes, fresh = Passes(prepared, inputs, limit), Passes(prepared, inputs, 0)
    list(passes.outputs())
    whole = passes.operations
    before = passes.operations
    for change in singles(prepared):
        for reused, inputs_ in zip(passes.outputs(change), inputs, strict=True):
            assert torch.equal(reused, fresh.answer(change, inputs_))
    spent = passes.operations - before
    assert fresh.place == 0
    if limit:  # tails of 6, 5 ... 1 layers, and the frontier once
        assert spent < 0.78 * LAYERS * whole
    else:
        assert spent == LAYERS * whole


@pytest.mark.slow
def test_the_noise_of_outputs_is_that_of_a_plain_sum() -> None:
    one, two = torch.randn(4, 3), torch.randn(4, 3)
    assert noise_of([one], iter([two])) == pytest.approx(float((one - two).square().sum() / one.square().sum()), 1e-5)
    assert noise_of([one], iter([one])) == 0
    assert (decibels(0.0), decibels(math.inf), decibels(0.01)) == (LARGEST_DB, -LARGEST_DB, pytest.approx(20))
    prepared = prepare(made(Chain), (rows(1)[0][0],), scheme="int4-weights")
    assert set(damages(prepared, [(rows(1)[0][0],)])) == {f"layers.{each}" for each in range(LAYERS)}


# modules that answer from memory --------------------------------------------------------------------------------------


def changed(model: Chain, place: int) -> Chain:
    torch.manual_seed(place)
    other = made(Chain)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.layers[place].weight.mul_(0.5)
    return other


@pytest.mark.parametrize("limit", [2**30, 0])
def test_replayed_runs_equal_full_ones_and_call_each_layer_in_front_once(limit: int) -> None:
    model, inputs = made(Chain), [(x,) for x, _ in rows(3)]
    runs = Replays(model, inputs, (inputs[0][0][:2],), limit)
    model.ran.clear()
    spent = 0
    for place in range(LAYERS):
        other = changed(model, place)
        begins = runs.story.begins({f"layers.{place}.weight"}, ())
        outputs = list(runs.outputs(Changed(model=other, begins=begins)))
        spent += sum(size == 5 for size in other.ran)
        other.ran.clear()
        assert all(torch.equal(got, other(*each)) for got, each in zip(outputs, inputs, strict=True))
    ahead = sum(size == 5 for size in model.ran)  # samples of the example are two
    if limit:
        assert spent == len(inputs) * sum(range(1, LAYERS + 1))
        assert ahead <= len(inputs) * LAYERS
    else:
        assert (spent, ahead) == (len(inputs) * LAYERS**2, pytest.approx(0, abs=len(inputs) * LAYERS))


def test_only_answers_that_are_read_are_held() -> None:
    model, inputs = made(Chain), [(x,) for x, _ in rows(2)]
    runs = Replays(model, inputs, (inputs[0][0][:2],))
    list(runs.outputs(Changed(model=model, begins=runs.story.begins({"layers.4.weight"}, ()))))
    held = {path for path, answer in runs.held[0].items() if any(answer.stride())}
    assert held == {"layers.0", "layers.1", "layers.2", "layers.3"}  # each is scaled in place by the model itself
    sequential = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]).eval()
    runs = Replays(sequential, inputs, (inputs[0][0][:2],))
    list(runs.outputs(Changed(model=sequential, begins=runs.story.begins({"3.weight"}, ()))))
    assert {path for path, answer in runs.held[0].items() if any(answer.stride())} == {"2"}


def test_a_module_called_twice_or_one_that_reads_the_change_is_not_replayed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.early = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.linear(x, self.last.weight)  # used before its module runs
            return self.last(self.again(self.again(self.early(x))))

    story = story_of(made(Twice), (torch.randn(2, 8),))
    assert story.before(story.begins({"last.weight"}, ())) == []
    assert story.before(story.begins({"last.bias"}, ())) == ["early"]
    assert story.begins({"nowhere"}, ()) == 0


# the whole ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["sqnr", "kl", "metric"])
def test_a_group_is_measured_as_the_model_without_its_channels(measure: Any, tmp_path: Path) -> None:
    model = made(toy.Net)
    batches = [toy.images(16, 1), toy.images(16, 2)]
    found = ts.sensitivity(model, task(batches), ratios=(0.5,), schemes=(), measure=measure, workdir=tmp_path)
    (point,) = found.points
    assert (point.name, point.kind, point.change, point.amount) == ("conv1.weight[0]", "channels", "50 %", 0.5)
    shrunk = ts.prune.channels(
        model, (batches[0][0],), sparsity=0.5, of="channels", round_to=1, min_channels=1, normalization="none"
    )
    with torch.no_grad():
        before, after = ([each(x) for x, _ in batches] for each in (model, shrunk))
    if measure == "sqnr":
        assert point.value == pytest.approx(sqnr(before, after), abs=1e-3)
    elif measure == "kl":
        logs = [functional.log_softmax(torch.cat(each).double(), 1) for each in (after, before)]
        expected = functional.kl_div(*logs, reduction="batchmean", log_target=True)
        assert point.value == pytest.approx(float(expected), abs=1e-7)
        assert found.reference == 0
    else:
        assert point.value == task(batches).evaluate(shrunk.eval())
        assert (found.reference, found.unit) == (task(batches).evaluate(model), "%")


@pytest.mark.slow
def test_a_metric_that_calls_otherwise_each_time_still_gets_true_outputs(tmp_path: Path) -> None:
    seen = []

    def metric(predict: Any, batches: Any) -> float:
        seen.append(0)
        shift = float(len(seen))
        return sum(float((predict(x + shift) - predict(x)).sum()) for x, _ in batches)

    model, batches = made(toy.Net), [toy.images(4, 1)]
    found = ts.sensitivity(model, task(batches, metric=metric), ratios=(), schemes=("int8-weights",), measure="metric",
                           workdir=tmp_path)  # fmt: skip
    values = {each.name: each.value for each in found.points}
    x = batches[0][0]
    quantized = ts.quantize.weights(model, (x,), layers={"conv2": "float", "head": "float"})
    place = list(values).index("conv1")
    shift = float(2 + place)  # the first evaluation was that of the reference
    assert values["conv1"] == pytest.approx(float((quantized(x + shift) - quantized(x)).sum()), rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_what_is_known_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = made(toy.Net), task([toy.images(8, 1)])
    expected = ts.sensitivity(model, data, workdir=tmp_path / "whole")
    (file,) = (tmp_path / "whole").iterdir()
    real, left = probe.OutputGauge.value, [4]

    def dying(self: Any, runs: Any, change: Any) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, runs, change)

    monkeypatch.setattr(probe.OutputGauge, "value", dying)
    with pytest.raises(KeyboardInterrupt):
        ts.sensitivity(model, data, workdir=tmp_path / "cut")
    measured = []
    monkeypatch.setattr(
        probe.OutputGauge, "value", lambda self, runs, change: measured.append(1) or real(self, runs, change)
    )
    assert ts.sensitivity(model, data, workdir=tmp_path / "cut").points == expected.points
    assert len(measured) == len(expected.points) - 4
    assert ts.sensitivity(model, data, workdir=tmp_path / "cut", ratios=(0.5,)).points != expected.points
    assert len(measured) == len(expected.points) - 4  # a part of what is known
    with torch.no_grad():
        model.head.bias += 1
    ts.sensitivity(model, data, workdir=tmp_path / "cut", ratios=(), schemes=("int8",))
    assert len(measured) == len(expected.points) - 4 + 3  # other weights are another model
    assert b'"done": ["' in file.read_bytes()


@pytest.mark.slow
def test_the_model_and_the_random_state_are_left_as_they_were(tmp_path: Path) -> None:
    model = toy.model().train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = torch.random.get_rng_state()
    ts.sensitivity(model, toy.task(), ratios=(0.5,), schemes=("int8",), samples=32, workdir=tmp_path)
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [models.Recurrent, models.Encoder, models.Tied])
def test_models_of_other_families(kind: Any, tmp_path: Path) -> None:
    model = made(kind)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 5, generator=generator) if kind is models.Recurrent else torch.arange(24).reshape(4, 6) % 11
    found = ts.sensitivity(model, task([(x, torch.zeros(4))]), ratios=(0.5,), workdir=tmp_path)
    kinds = {each.kind for each in found.points if each.value is not None}
    assert kinds == {"channels", "layer"}
    assert all(math.isfinite(each.value) for each in found.points if each.value is not None)
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.slow
def test_include_and_exclude_say_what_is_looked_at(tmp_path: Path) -> None:
    model, data = made(toy.Net), task([toy.images(8, 1)])
    only = ts.sensitivity(model, data, include="head", ratios=(), workdir=tmp_path)
    assert {each.name for each in only.points} == {"head"}
    rest = ts.sensitivity(model, data, exclude=["head", "conv1"], ratios=(0.5,), workdir=tmp_path)
    assert {each.name for each in rest.points} == {"conv2"}


# what is made of it ---------------------------------------------------------------------------------------------------


def example(values: dict[str, float], measure: Any = "sqnr", higher: bool = True) -> Sensitivity:
    points = tuple(Point(name=name, kind="layer", change="int8", value=value) for name, value in values.items())
    return Sensitivity(
        model="m", measure=measure, unit="", higher_is_better=higher, reference=None, runtime="eager", points=points
    )


@pytest.mark.slow
@given(st.dictionaries(st.text("abc", min_size=1), st.integers(-20, 100), min_size=1))
def test_priors_have_mean_one_and_the_order_of_the_damage(values: dict[str, float]) -> None:
    found = example(values)
    priors = found.priors()
    assert sum(priors.values()) / len(priors) == pytest.approx(1)
    ranked = found.most_sensitive("int8")
    assert [values[name] for name in ranked] == sorted(values.values())  # few decibels are much damage
    assert [priors[name] for name in ranked] == sorted(priors.values(), reverse=True)


def test_damage_is_counted_in_the_direction_of_the_measure() -> None:
    metric = Sensitivity(
        model="m", measure="metric", unit="%", higher_is_better=False, reference=2.0, runtime="eager",
        points=(Point(name="a", kind="layer", change="int8", value=5.0), Point(name="b", kind="layer", change="int8")),
    )  # fmt: skip
    assert [metric.damage(each) for each in metric.points] == [3.0, None]
    assert metric.most_sensitive("int8") == ["a"]
    with pytest.raises(SensitivityError, match="'int4-weights'.*not measured.*int8"):
        metric.most_sensitive("int4-weights")


@pytest.mark.slow
def test_a_run_starts_from_what_is_known(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Look(ts.Quantize):
        def check(self, ctx: ts.Context) -> None:
            seen.append(dict(ctx.priors))

    found = ts.sensitivity(toy.model(), toy.task(), ratios=(0.5,), samples=32, workdir=tmp_path)
    path = found.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(path) == found == Sensitivity.load(tmp_path)
    for given_ in (found, path):
        with pytest.raises(ValueError, match="enough"):
            ts.compress(
                toy.model(), toy.task(), [Look("int8-weights")], runtime="eager", sensitivity=given_,
                progress=lambda event: (_ for _ in ()).throw(ValueError("enough")),
            )  # fmt: skip
    assert seen == [found.priors(), found.priors()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "psnr"}, "measure.*'sqnr', 'kl', 'metric'.*'psnr'"),
        ({"ratios": (0.5, 1.0)}, r"\(0, 1\).*got 1.0"),
        ({"ratios": (), "schemes": ()}, "nothing to measure"),
        ({"samples": 0}, "samples.*at least 1"),
        ({"schemes": ("int3",)}, "scheme 'int3'"),
        ({"runtime": "nowhere"}, "nowhere"),
        ({"include": "nothing"}, "matches no layer"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ts.TorchslimError, match=message):
        ts.sensitivity(toy.model(), toy.task(), workdir=tmp_path, **options)


def test_what_cannot_be_read_or_measured_says_so(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": 1, "kind": "run"}')
    with pytest.raises(SensitivityError, match=r"other\.json.*no sensitivity.*\"run\""):
        Sensitivity.load(tmp_path / "other.json")
    with pytest.raises(SensitivityError, match="cannot be read"):
        Sensitivity.load(tmp_path / "missing.json")
    with pytest.raises(TaskError, match="'kl'.*logits"):
        ts.sensitivity(nn.Sequential(nn.Linear(8, 4), nn.Flatten(0)), task(rows(1)), measure="kl", ratios=(),
                       workdir=tmp_path)  # fmt: skip
    with pytest.raises(SensitivityError, match="nothing.*measured"):
        ts.sensitivity(nn.LayerNorm(8), task(rows(1)), workdir=tmp_path)


def test_a_group_that_no_copy_without_it_runs_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + torch.ones(1, len("is six")))  # a size that no number stands for

    model = made(Fixed)
    coupling = probe.settled(analyze(model, (torch.randn(2, 8),)))
    found = ts.sensitivity(model, task(rows(1)), ratios=(0.5,), schemes=("int8-weights",), workdir=tmp_path)
    refused = [each for each in found.points if each.kind == "channels"]
    assert all(each.refused and each.value is None for each in refused)
    assert not coupling.units


@pytest.mark.slow
def test_the_command_line_writes_figures_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchslim.cli import main

    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "tests.support.toy:model"\ntask = "tests.support.toy:task"\nruntime = "openvino"\n')
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["torchslim", "sensitivity", str(recipe), "--measure", "kl", "--out",
                                     str(out)])  # fmt: skip
    main()
    printed = capsys.readouterr().out
    found = Sensitivity.load(out)
    assert found.table() in printed
    assert (found.measure, found.runtime, found.model) == ("kl", "openvino", "tests.support.toy:model")
    assert "conv1.weight[0]" in (out / "sensitivity.html").read_text()
