"""Latency as a budget: a table of what narrowings save, widths under a ceiling, measured and corrected.

Times are those of a machine that is a formula, so that nothing depends on this one.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from torchslim.artifact import latency_cache
from torchslim.artifact.latency import Timings
from torchslim.core.step import Makers
from torchslim.errors import PruneError
from torchslim.prune.latency.solve import AIM, BAND, ROUNDS, reach
from torchslim.prune.latency.table import ALL, Table, load_rows, rows_of
from torchslim.prune.structured.plan import analyze
from torchslim.prune.structured.selection import Amount, select

Bill = Callable[[nn.Module], float]


class Chain(nn.Module):
    """Six convolutions in a row: five groups of channels, of which two are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(taken, given, 3, padding=1)
            for taken, given in ((3, 32), (32, 64), (64, 64), (64, 64), (64, 64), (64, 8))
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return x.mean((2, 3))


INPUTS = (torch.ones(1, 3, 6, 6),)


def work(model: nn.Module) -> float:
    """Time that goes with the multiplications, kernels in whole vectors of 16, and a fixed part."""
    took = 0.0
    for each in model.modules():
        if isinstance(each, nn.Conv2d):
            taken, given = (-(-count // 16) * 16 for count in (each.in_channels, each.out_channels))
            took += taken * given * 1e-4 + 0.02
    return took


@dataclass
class Clock:
    """A workbench whose times are a formula of the model; counts what it was asked for."""

    bill: Bill = work
    bias: float = 1.0  # of what is measured `again`: reality is not what the table says
    asked: list[str] = field(default_factory=list)
    again: int = 0

    def deploy(self, model: nn.Module) -> Callable[..., Any]:
        return model

    def about(self, reference: nn.Module) -> Mapping[str, Any]:
        return {"runtime": "onnxruntime", "threads": None, "ends": "float", "structure": str(reference)}

    def latency(self, models: Makers, reference: nn.Module, *, again: bool = False) -> Mapping[str, float]:
        self.asked += [] if again else list(models)
        self.again += again
        power = self.bias if again else 1.0
        made = {name: make() for name, make in models.items()}
        return {
            name: (self.bill(each) / self.bill(reference)) ** power for name, each in made.items() if each is not None
        }


def cut(sparsity: float, clock: Clock, **fields: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ts.prune.channels(
            chain(), INPUTS, sparsity, of="latency", criterion="l2", workbench=clock, min_channels=8, **fields
        )


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain().eval()


def ratio(model: nn.Module, bill: Bill = work) -> float:
    return bill(model) / bill(chain())


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.6])
def test_the_ceiling_is_kept_and_nearly_reached(sparsity):
    clock = Clock()
    model = cut(sparsity, clock)
    assert BAND * (1 - sparsity) <= ratio(model) <= 1 - sparsity
    assert clock.again <= 3
    about = ts.surgery(model)["rounds"][0]["about"]
    assert (about["of"], about["left"]) == ("latency", pytest.approx(ratio(model)))


@pytest.mark.slow
@pytest.mark.parametrize("bias", [0.6, 0.8, 1.3, 1.7])
def test_what_is_measured_counts_not_what_the_table_promises(bias):
    clock = Clock(bias=bias)
    model = cut(0.4, clock)
    assert BAND * 0.6 <= ratio(model) ** bias <= 0.6
    assert 1 < clock.again <= ROUNDS + 1


def test_units_that_are_alike_share_a_row():
    plan = analyze(chain(), INPUTS)
    selection = select(
        plan.coupling(),
        Amount(of="latency"),
        plan.names,
        lambda coupling, group: torch.ones(len(group.classes)).numpy(),
    )
    rows = rows_of(selection)
    assert [row.units for row in rows] == [(0,), (1,), (2, 3), (4,), (0, 1, 2, 3, 4)]
    assert rows[-1].key == ALL
    for row in rows[:-1]:
        assert all(width % 8 == 0 and 8 <= width < 64 for width in row.widths)
        assert list(row.widths) == sorted(set(row.widths), reverse=True)
    clock = Clock()
    Table(plan=plan, amount=Amount(of="latency"), workbench=clock).learn()
    assert len(clock.asked) == sum(len(row.widths) for row in rows)


def test_single_units_are_predicted_as_measured_and_few_rounds_are_needed():
    plan = analyze(chain(), INPUTS)
    amount = Amount(of="latency", sparsity=0.5)
    table = Table(plan=plan, amount=amount, workbench=Clock())
    table.learn()
    selection = select(
        plan.coupling(), amount, plan.names, lambda coupling, group: torch.rand(len(group.classes)).double().numpy()
    )
    assert table.choose(selection, 1.0) == [32, 64, 64, 64, 64]  # nothing goes where nothing must
    for ceiling in (0.9, 0.7, 0.5):
        assert table.predict(selection, table.choose(selection, ceiling)) <= ceiling + 1e-9


@pytest.mark.slow
def test_fast_widths_are_preferred():
    """Kernels work on whole vectors of 16: 24 channels take as long as 32."""
    model = cut(0.3, Clock())
    assert all(conv.out_channels % 16 == 0 for conv in model.convs[:-1])


@pytest.mark.slow
def test_a_ceiling_that_widths_cannot_meet_is_told():
    clock = Clock()
    with pytest.warns(UserWarning, match=r"latency of 0.05.*cannot be reached.*round_to=8 .*0\.\d+.*least"):
        model = ts.prune.channels(chain(), INPUTS, 0.95, of="latency", criterion="l2", workbench=clock)
    assert ratio(model) == pytest.approx(min(ratio(model), 1.0))
    assert clock.again <= ROUNDS
    with pytest.warns(UserWarning, match="latency of 0.97.*kept by far.*0.500"):
        ts.prune.channels(
            nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)), (torch.ones(1, 4),), 0.03, of="latency",
            round_to=32, criterion="l2", workbench=Clock(bill=lambda model: model[0].out_features),
        )  # fmt: skip


@pytest.mark.slow
def test_the_best_of_the_rounds_counts():
    """A clock that jumps: never near, so the slowest that keeps the ceiling is taken, not the last."""
    answers = iter([0.3, 0.62, 0.5, 0.7, 0.65])

    @dataclass
    class Jumping(Clock):
        def latency(self, models: Any, reference: Any, *, again: bool = False) -> Any:
            return {"pruned": next(answers)} if again else Clock.latency(self, models, reference)

    plan = analyze(chain(), INPUTS)
    amount = Amount(of="latency", sparsity=0.4)
    table = Table(plan=plan, amount=amount, workbench=Jumping())
    found = reach(plan, amount, lambda coupling, group: torch.rand(len(group.classes)).double().numpy(), table)
    measured = [each["measured"] for each in found.evidence["rounds"]]
    assert found.left == max(each for each in measured if each <= 0.6)
    assert measured[found.evidence["best"] - 1] == found.left
    assert len(measured) <= ROUNDS
    assert all(each["target"] > 0 for each in found.evidence["rounds"])


@pytest.mark.slow
def test_where_noise_decides_the_slower_of_two_counts():
    answers = iter([0.595, 0.605, 0.57])

    @dataclass
    class Noisy(Clock):
        def latency(self, models: Any, reference: Any, *, again: bool = False) -> Any:
            return {"pruned": next(answers)} if again else Clock.latency(self, models, reference)

    plan = analyze(chain(), INPUTS)
    amount = Amount(of="latency", sparsity=0.4)
    table = Table(plan=plan, amount=amount, workbench=Noisy())
    found = reach(plan, amount, lambda coupling, group: torch.rand(len(group.classes)).double().numpy(), table)
    assert [each["measured"] for each in found.evidence["rounds"]] == [0.605, 0.57]


def test_without_something_to_measure_with_it_says_what_to_do():
    with pytest.raises(PruneError, match="of='latency'.*workbench=ts.Bench"):
        ts.prune.channels(chain(), INPUTS, 0.5, of="latency")
    with pytest.raises(PruneError, match="of='params' with workbench"):
        ts.prune.channels(chain(), INPUTS, 0.5, workbench=Clock())
    step = ts.Prune(pattern="channel", sparsity=0.5, of="latency")
    with pytest.raises(PruneError, match="of='latency'.*workbench.*ts.compress"):
        step.check(context())
    with pytest.raises(PruneError, match="leave out scope='layer'"):
        ts.Prune(pattern="channel", sparsity=0.5, of="latency", scope="layer")
    with pytest.raises(PruneError, match="latency_table.*of='latency'.*of='params'"):
        ts.Prune(pattern="channel", sparsity=0.5, latency_table="latency.json")


def context(**fields: Any) -> ts.Context:
    batch = (torch.randn(16, 3, 6, 6), torch.zeros(16, dtype=torch.long))
    task = ts.Task(train=[batch], val=[batch], metric="accuracy")
    return ts.Context(task=task, teacher=chain(), example_inputs=INPUTS, **fields)


def step(**fields: Any) -> ts.Prune:
    return ts.Prune(**{"pattern": "channel", "sparsity": 0.5, "of": "latency", "criterion": "l2", **fields})


@pytest.mark.slow
def test_the_step_tells_what_it_predicted_and_measured():
    clock = Clock(bias=0.8)
    outcome = step()(chain(), context(workbench=clock))
    (told,) = outcome.evidence["latency"]
    best = told["rounds"][told["best"] - 1]
    assert best["measured"] == pytest.approx(ratio(outcome.model) ** 0.8)
    assert BAND * 0.5 <= best["measured"] <= told["ceiling"] == 0.5
    assert told["rounds"][0]["target"] == pytest.approx(AIM * 0.5)
    assert told["elsewhere"] == ""
    assert json.loads(json.dumps(outcome.evidence)) == outcome.evidence
    assert not outcome.warnings


@pytest.mark.slow
def test_rounds_of_a_schedule_are_fractions_of_the_model_that_the_step_received(tmp_path):
    clock = Clock()
    train = ts.Finetune(epochs=1)
    outcome = step(schedule="iterative", rounds=2, train=train)(chain(), context(workbench=clock, state=tmp_path))
    told = outcome.evidence["latency"]
    assert [each["ceiling"] for each in told] == [pytest.approx(0.5**0.5), 0.5]
    assert BAND * 0.5 <= ratio(outcome.model) <= 0.5
    measured = len(clock.asked)
    assert measured == len(set(clock.asked))  # one table serves both rounds
    (tmp_path / "prune-2.ckpt").unlink(missing_ok=True)
    again = step(schedule="iterative", rounds=2, train=train)(chain(), context(workbench=clock, state=tmp_path))
    assert again.evidence == outcome.evidence
    assert len(clock.asked) == measured


@pytest.mark.slow
def test_what_is_known_to_hurt_is_spared():
    """All groups cost alike; one that hurts ten times as much keeps more channels, whatever is budgeted."""
    for of, clock in (("latency", Clock()), ("params", None)):
        plain = widths(step(of=of)(chain(), context(workbench=clock)).model)
        most = min(range(5), key=lambda place: plain[place] / widths(chain())[place])
        for name in (f"convs.{most}.weight[0]", f"convs.{most}"):
            spared = step(of=of)(chain(), context(workbench=clock, priors={name: 10.0})).model
            assert widths(spared)[most] > plain[most]


def widths(model: nn.Module) -> list[int]:
    return [conv.out_channels for conv in model.convs]


def table(clock: Clock, path: Path, **changes: Any) -> str:
    plan = analyze(chain(), INPUTS)
    known = Table(plan=plan, amount=Amount(of="latency"), workbench=clock)
    known.learn()
    written = {**known.to_dict(clock.about(chain())), "machine": "a board", **changes}
    path.write_text(json.dumps(written))
    return str(path)


@pytest.mark.slow
def test_times_taken_elsewhere_are_used_and_said_to_be(tmp_path):
    clock = Clock()
    path = table(clock, tmp_path / "latency.json")
    here = Clock()
    outcome = step(latency_table=path)(chain(), context(workbench=here))
    assert (here.asked, here.again) == ([], 0)
    assert ratio(outcome.model) == pytest.approx(0.5 * AIM, rel=0.1)
    (told,) = outcome.evidence["latency"]
    assert (told["elsewhere"], [each["measured"] for each in told["rounds"]]) == ("a board", [None])
    (warning,) = outcome.warnings
    assert re.search("predicted.*a board.*not measured", warning)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"runtime": "openvino"}, "runtime 'openvino'.*'onnxruntime'"),
        ({"threads": 4}, "threads 4.*None"),
        ({"ends": "int8"}, "final numbers 'int8'.*'float'"),
        ({"structure": "of old"}, "model another.*this one"),
    ],
)
def test_a_table_of_something_else_is_refused(tmp_path, about, message):
    clock = Clock()
    path = table(clock, tmp_path / "latency.json", about={**clock.about(chain()), **about})
    with pytest.raises(PruneError, match=message):
        step(latency_table=path)(chain(), context(workbench=clock))
    if "ends" not in about and "structure" not in about:
        with pytest.raises(PruneError, match=message):
            step(latency_table=path).check(context(workbench=clock))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format": 1e999}',
        '{"format": "torchslim-latency-rows", "about": {}, "machine": "", "rows": {"a": {"8": -1}}}',
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "latency.json").write_text(text)
    with pytest.raises(PruneError, match="(no table of latencies|damaged).*latency.json.*bench.py"):
        load_rows(tmp_path / "latency.json", {})
    with pytest.raises(PruneError, match="does not exist.*latency.json"):
        load_rows(tmp_path / "missing.json", {})


def count_macs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Programs take as long as their multiplications; gives what was timed."""
    timed: list[list[str]] = []

    def compare(deployed: Mapping[str, ts.Deployed], **_: Any) -> Timings:
        timed.append(list(deployed))
        return Timings({name: [float(sum(each["macs"] for each in one.spec.layers))] for name, one in deployed.items()})

    monkeypatch.setattr(latency_cache, "compare", compare)
    return timed


def test_narrower_is_not_always_faster():
    with pytest.raises(PruneError, match="none of the narrower widths.*faster"):
        cut(0.5, Clock(bill=lambda model: 1.0))


@pytest.mark.slow
def test_a_run_measures_on_its_runtime_in_the_numbers_that_it_ends_with(monkeypatch):
    """The real thing, small: what it predicts and measures stands in the run."""
    count_macs(monkeypatch)
    steps = [
        ts.Prune(pattern="channel", sparsity=0.3, of="latency", round_to=2, min_channels=2), ts.Quantize("int8"),
    ]  # fmt: skip
    events: list[ts.Event] = []
    result = ts.compress(toy.model(), toy.task(), steps, runtime="onnxruntime", threads=1, progress=events.append)
    (told,) = result.run["rows"][1]["evidence"]["latency"]
    assert 0.5 < told["rounds"][told["best"] - 1]["measured"] <= 0.7
    assert told["programs"] >= 1
    assert {each.phase for each in events} >= {"table of latencies", "widths, attempt 1"}
    assert result.module.conv1.out_channels < 8


@pytest.mark.slow
def test_a_bench_measures_a_program_once(monkeypatch):
    """What was timed is known before it is a program; only what decides is timed again."""
    timed = count_macs(monkeypatch)
    bench = ts.Bench(example_inputs=INPUTS, target=ts.Target(runtime="eager"))
    whole = chain()
    half = ts.prune.channels(whole, INPUTS, 0.5, criterion="l2")
    first = bench.latency({"half": lambda: half, "none": lambda: None}, whole)
    assert list(first) == ["half"]
    assert 0 < first["half"] < 1
    assert bench.latency({"half": lambda: pytest.fail("made again")}, chain()) == first
    assert len(timed) == 1
    assert bench.latency({"half": lambda: half}, whole, again=True) == first
    assert len(timed) == 2
    assert bench.latency({"half": lambda: whole}, half)["half"] == pytest.approx(1 / first["half"])  # of another model
    int8 = replace(bench, steps=[ts.Quantize("int8")])
    assert int8.about(whole) != bench.about(whole)
    assert int8.about(whole)["ends"] == "int8"


@pytest.mark.slow
@pytest.mark.parametrize(("later", "known"), [(1.0, 1.0), (0.7, 0.7), (0.95, 1.0), (3.0, 1.0)])
def test_a_reference_that_was_timed_on_a_busy_machine_is_mended(monkeypatch, tmp_path, later, known):
    """Of milliseconds; the ratios to it came from paired rounds, and stay."""
    busy = [1.0]
    monkeypatch.setattr(
        latency_cache, "compare", lambda deployed, **_: Timings({name: [2.0 * busy[0]] for name in deployed})
    )
    reference, other = (ts.deploy(each, INPUTS, runtime="eager") for each in (chain(), cut(0.3, Clock())))
    table = latency_cache.LatencyTable("eager", path=tmp_path / "table.json")
    first = table.measure({"other": other}, reference)["other"]
    busy[0] = later
    assert table.settle(reference).latency.value == pytest.approx(2.0 * known)
    assert table.known(reference.spec.structure)[reference.spec.structure].latency.value == pytest.approx(2.0 * known)
    assert table.measure({"other": other}, reference)["other"] == first
