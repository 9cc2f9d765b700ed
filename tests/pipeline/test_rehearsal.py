"""The rehearsal: what would fail late fails before the run, and a run is the same with it as without."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests.support import rehearsals, tiny, toy
from tests.support.distributed import two_processes
from torchslim.core.step import Rehearses
from torchslim.errors import DeployError, RecipeError, TaskError, TorchslimError
from torchslim.pipeline.forecast import BASELINE
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.rehearsal import RECORD_FILE, at_least_effort
from torchslim.pipeline.runner import rehearse_steps
from torchslim.pipeline.small_task import UPDATES, small
from torchslim.pipeline.target_bench import Bench
from torchslim.prune.latency.solve import ROUNDS
from torchslim.quantize.rollback import Unverified
from torchslim.training.finetune import REHEARSED_LR

TRAIN = ts.Finetune(epochs=4, lr=1e-2)


@pytest.fixture(autouse=True)
def _rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsals.restore(monkeypatch)
    monkeypatch.setattr(sys.modules["torchslim.pipeline.stage_timing"], "compare", tiny.compare)


def options(**given: Any) -> RunOptions:
    return RunOptions(target=ts.core.step.Target(runtime="eager"), progress=lambda event: None, **given)


def rehearse(steps: list[Any], task: ts.Task | None = None, model: nn.Module | None = None, **given: Any) -> Any:
    return rehearse_steps(model or tiny.model(), task or tiny.task(), steps, options(**given))


class Heard:
    """A progress callback that notes the steps of events, and may stop the run at a phase."""

    def __init__(self, stop: tuple[str, str] | None = None) -> None:
        self.steps: list[str] = []
        self.stop = stop

    def __call__(self, event: ts.Event) -> None:
        if (event.step, event.phase) == self.stop:
            raise KeyboardInterrupt
        self.steps.append(event.step)


# a run with a rehearsal is the same as one without --------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_the_same_with_a_rehearsal_and_leaves_only_its_record(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(*tiny.task().val[0]), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    outcomes, states = [], []
    for rehearsed in (True, False):
        heard, before = Heard(), (data.generator.get_state(), torch.get_rng_state())
        result = ts.compress(
            tiny.model(), replace(tiny.task(), train=data), tiny.steps(tmp_path / f"cache-{rehearsed}"),
            runtime="eager", workdir=tmp_path / str(rehearsed), rehearse=rehearsed, progress=heard,
        )  # fmt: skip
        outcomes.append(tiny.outcome(result))
        states += [
            torch.equal(*pair) for pair in zip(before, (data.generator.get_state(), torch.get_rng_state()), strict=True)
        ]
        assert ("rehearsal" in heard.steps) is rehearsed
        assert ("forecast" in result.run) is rehearsed
        assert heard.steps[0] == ("rehearsal" if rehearsed else BASELINE)
    assert outcomes[0] == outcomes[1]
    assert all(states)
    with_record, without = ({path.name for path in (tmp_path / str(each)).iterdir()} for each in (True, False))
    assert with_record - without == {RECORD_FILE}
    names = [[path.name for path in (tmp_path / f"cache-{each}").iterdir()] for each in (True, False)]
    assert names[0] == names[1], "the teacher's outputs in the rehearsal are not those of the run"


@pytest.mark.slow
def test_a_resumed_run_is_not_rehearsed_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, progress=Heard(("distill", "start")))
    heard = Heard()
    result = tiny.run(tmp_path, progress=heard)
    assert "rehearsal" not in heard.steps
    assert heard.steps[0] == "forecast"
    assert [part["name"] for part in result.run["forecast"]["parts"]] == ["baseline", "prune", "distill", "artifact"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["seed", "record", "interrupted"])
def test_another_run_a_damaged_record_or_a_rehearsal_that_was_stopped_is_rehearsed_again(
    tmp_path: Path, change: str
) -> None:
    if change == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path, progress=Heard(("rehearsal", "parts")))
    else:
        tiny.run(tmp_path)
    if change == "record":
        path = tmp_path / "work" / RECORD_FILE
        record = json.loads(path.read_text())
        record["forecast"]["memory_mib"] += 1
        path.write_text(json.dumps(record))
    heard = Heard()
    tiny.run(tmp_path, progress=heard, overwrite=True, **({"seed": 4} if change == "seed" else {}))
    assert "rehearsal" in heard.steps
    assert not [path for path in (tmp_path / "work").iterdir() if "rehearsal-" in path.name]


@pytest.mark.slow
def test_the_baseline_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[bool] = []
    compile_ = ts.Bench.compile

    def counted(bench: ts.Bench, model: nn.Module) -> Any:
        compiled.append(True)
        return compile_(bench, model)

    monkeypatch.setattr(ts.Bench, "compile", counted)
    steps = [ts.Prune(sparsity=0.5), ts.Prune(sparsity=0.6)]
    ts.compress(tiny.model(), tiny.task(), steps, runtime="eager")
    assert len(compiled) == 1 + 2 * len(steps)


# what would fail late fails before the run ----------------------------------------------------------------------------


def of_deployed(predict: Any, batches: Any) -> float:
    """A metric that fails where the artifact takes the model's place."""
    if isinstance(predict, ts.runtimes.Deployed):
        raise ValueError("no parameters here")
    return 1.0


def bad_loss(outputs: Tensor, batch: Any) -> Tensor:
    return outputs[:, 7].mean()


@dataclass(frozen=True)
class Own:
    """A step of a user's own, with a mistake."""

    accepts: ClassVar[ts.Form] = ts.Form.MODULE
    produces: ClassVar[ts.Form] = ts.Form.MODULE

    def check(self, ctx: ts.Context) -> None: ...

    def __call__(self, model: nn.Module, ctx: ts.Context) -> ts.Outcome:
        return ts.Outcome(model=model.encoder)


def small_last_batch() -> ts.Task:
    """The last of many batches has one sample, of which a batch norm cannot make statistics."""
    x = torch.randn(41, 4)
    return replace(tiny.task(), train=DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 4))


LATE: dict[str, tuple[Callable[[], nn.Module], Callable[[], ts.Task], list[Any], type, str]] = {
    "metric of the artifact": (
        tiny.model, lambda: replace(tiny.task(), metric=of_deployed), [TRAIN], TaskError,
        r"the artifact failed: ValueError: no parameters here .*test_rehearsal\.py, line \d+",
    ),
    "loss of the second training": (
        tiny.model, lambda: replace(tiny.task(), loss=bad_loss), [ts.Distill(epochs=3, response=ts.KD(alpha=1.0)), TRAIN],
        TorchslimError, r"step 2 \('finetune'\) failed: .*IndexError.*test_rehearsal\.py, line \d+",
    ),
    "step of one's own": (
        tiny.model, tiny.task, [TRAIN, Own()], TaskError,
        r"step 2 \('own'\) failed: AttributeError: .*'encoder'.*test_rehearsal\.py, line \d+",
    ),
    "last batch of an epoch": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), small_last_batch,
        [ts.Prune(sparsity=0.5), TRAIN], TorchslimError,
        r"step 2 \('finetune'\) failed: .*more than 1 value per channel",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LATE)
def test_what_would_fail_late_fails_first_with_the_step_and_the_line(name: str, tmp_path: Path) -> None:
    model, task, steps, error, message = LATE[name]
    heard = Heard()
    with pytest.raises(error, match=message) as caught:
        ts.compress(model(), task(), steps, runtime="eager", workdir=tmp_path, progress=heard)
    assert set(heard.steps) == {"rehearsal"}
    assert caught.value.__cause__ is not None
    assert "rehearse=False" in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name[:1].isdigit()]


def test_an_error_of_torchslim_keeps_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inner(DeployError):
        """A kind that only the code inside knows."""

    original = Inner("no such kernel")

    def refused(bench: ts.Bench, model: nn.Module) -> Any:
        raise original

    monkeypatch.setattr(ts.Bench, "deploy", refused)
    with pytest.raises(DeployError, match=r"rehearsal of the baseline failed: no such kernel") as caught:
        rehearse([ts.Prune(sparsity=0.5)])
    assert type(caught.value) is DeployError
    assert caught.value.__cause__ is original


def test_a_bug_of_torchslim_is_not_taken_for_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchslim.pipeline.runner.nonzeros", len)  # fails inside of torchslim: a model has no length
    with pytest.raises(TypeError) as caught:
        rehearse([ts.Prune(sparsity=0.5)], toy.task(), toy.model())
    assert any("the baseline" in note for note in caught.value.__notes__)


# what depends on quality does not fail --------------------------------------------------------------------------------


class NeedsClasses:
    """A metric for which the first `needed` batches are too few, as for an AUROC with one class: raises, or gives NaN."""

    def __init__(self, needed: int, *, raises: bool) -> None:
        self.needed, self.raises, self.calls = needed, raises, 0

    def __call__(self, predict: Any, batches: Any) -> float:
        self.calls += 1
        if sum(1 for _ in batches) >= self.needed:
            return 0.5
        if self.raises:
            raise ValueError("only one class")
        return float("nan")


def many(count: int) -> list[Any]:
    x, y = tiny.task().val[0]
    return [(x, y)] * count


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("needed", [3, 9, 100])
def test_a_metric_that_needs_more_batches_gets_them(needed: int, raises: bool) -> None:
    metric = NeedsClasses(needed, raises=raises)
    rehearse([ts.Prune(sparsity=0.5)], replace(tiny.task(), val=many(100), metric=metric))
    assert metric.calls < 16, "once enough, always enough"


@pytest.mark.parametrize("raises", [True, False])
def test_a_metric_that_never_works_fails(raises: bool) -> None:
    task = replace(tiny.task(), val=many(9), metric=NeedsClasses(10, raises=raises))
    with pytest.raises(TaskError, match=r"the baseline failed: .*(only one class|nan)"):
        rehearse([ts.Prune(sparsity=0.5)], task)


def test_a_learning_rate_that_diverges_is_no_failure_of_the_rehearsal() -> None:
    rehearse([ts.Finetune(epochs=2, lr=1e9, optimizer="sgd")])


@pytest.mark.slow
def test_outputs_that_fail_their_checks_are_none_either(monkeypatch: pytest.MonkeyPatch) -> None:
    step = sys.modules["torchslim.quantize.step"]
    converted = step.converted

    def strict(prepared: Any, checks: Any, known: Any = None) -> Any:
        if checks is not None:
            raise Unverified("the quantized model cannot be verified")
        return converted(prepared, checks, known)

    monkeypatch.setattr(step, "converted", strict)
    rehearse([ts.Quantize("int8")])
    with pytest.raises(Unverified):
        ts.compress(tiny.model(), tiny.task(), [ts.Quantize("int8")], runtime="eager", rehearse=False)


def test_a_rehearsal_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rehearse([ts.Quantize("int8", layers="auto", metric_drop=0.0)])


# least effort ---------------------------------------------------------------------------------------------------------

EFFORTS: dict[str, tuple[Any, int]] = {
    "finetune": (TRAIN, 1),
    "accumulate": (ts.Finetune(epochs=4, accumulate=8), 1),
    "distill": (ts.Distill(epochs=5), 1),
    "iterative": (ts.Prune(sparsity=0.5, schedule="iterative", rounds=3, train=TRAIN), 1),
    "gradual": (ts.Prune(sparsity=0.5, schedule="gradual", train=TRAIN), 1),
    "sparsify": (
        ts.Prune(pattern="channel", sparsity=0.5, of="channels", round_to=1, min_channels=1, sparsify="group-lasso",
                 train=TRAIN, schedule="iterative", rounds=4), 2,
    ),
    "qat": (ts.Quantize("int8", mode="qat", train=TRAIN), 1),
    "auto": (ts.Quantize("int8", mode="qat", train=TRAIN, layers="auto", metric_drop=0.0), 1),
    "own": (toy.Shift(), 0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFORTS)
def test_a_step_trains_a_few_updates_at_a_rate_that_changes_nothing(name: str) -> None:
    step, trainings = EFFORTS[name]
    task = replace(tiny.task(), train=many(UPDATES))
    seen: list[ts.Event] = []
    rehearsed = at_least_effort(step, Path("unused"))
    result = ts.compress(
        tiny.model(), task, [rehearsed], runtime="eager", rehearse=False,
        progress=seen.append,
    )  # fmt: skip
    updates = [event.current for event in seen if "epoch" in event.values]
    assert len(updates) == UPDATES * trainings
    assert type(rehearsed) is type(step)
    if trainings:
        before, after = tiny.model().state_dict(), result.module.state_dict()
        kept = [
            torch.isclose(before[key], after[key], atol=100 * REHEARSED_LR) | (after[key] == 0)
            for key in before
            if before[key].shape == after[key].shape
        ]
        assert all(bool(each.all()) for each in kept)


def test_every_step_of_torchslim_has_a_form_for_rehearsals() -> None:
    from torchslim.pipeline.recipe import STEPS

    assert all(issubclass(kind, Rehearses) for kind in STEPS.values())


def test_widths_for_a_latency_are_chosen_without_timing() -> None:
    step = ts.Prune(pattern="channel", sparsity=0.5, of="latency")
    assert step.rehearsed(Path("unused")).of == "macs"
    given = replace(step, latency_table="latency.json")
    assert given.rehearsed(Path("unused")).of == "latency"


def test_the_forecast_counts_programs_that_only_the_run_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "seconds_by_program", lambda bench, model: 1e4)
    step = ts.Prune(pattern="channel", sparsity=0.2, of="latency", round_to=1, min_channels=1)
    ctx = ts.Context(
        task=tiny.task(), teacher=tiny.model(), example_inputs=tiny.task().inputs(next(iter(tiny.task().val)))
    )
    (count,) = step.timed_programs(tiny.model(), ctx).values()
    assert count > ROUNDS
    forecast = rehearse([step]).forecast
    assert forecast.parts[1].seconds == pytest.approx(1e4 * count, rel=0.05)
    assert not replace(step, of="macs").timed_programs(tiny.model(), ctx)


def test_adaround_is_replaced_by_what_needs_the_same_statistics() -> None:
    assert ts.Quantize("int8", rounding="adaround").rehearsed(Path("unused")).rounding == "gptq"


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """A step of a user's own that trains by a step of torchslim, and has no form for rehearsals."""

    accepts: ClassVar[ts.Form] = ts.Form.MODULE
    produces: ClassVar[ts.Form] = ts.Form.MODULE
    train: Any = TRAIN

    def check(self, ctx: ts.Context) -> None: ...

    def __call__(self, model: nn.Module, ctx: ts.Context) -> ts.Outcome:
        self.train.fit(model, ctx)
        return ts.Outcome(model=model)


def test_trainings_in_a_step_of_ones_own_are_rehearsed_and_its_own_form_comes_first() -> None:
    assert at_least_effort(Wrapping(), Path("unused")).train.epochs == 1

    @dataclass(frozen=True, kw_only=True)
    class Known(Wrapping):
        rounds: int = 9

        def rehearsed(self, folder: Path) -> Known:
            return replace(self, rounds=1)

    assert at_least_effort(Known(), Path("unused")) == Known(rounds=1)


def test_the_metric_sees_batches_of_two_sizes_where_there_are_some() -> None:
    x, y = tiny.task().val[0]
    sizes: list[int] = []

    def metric(predict: Any, batches: Any) -> float:
        sizes.extend(len(batch[0]) for batch in batches)
        return 1.0

    task = small(replace(tiny.task(), val=DataLoader(TensorDataset(x, y), 5), metric=metric), lambda *time: None)
    task.evaluate(tiny.model(), "val")
    assert sizes == [5, 32 % 5]


# other ways to begin --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_rehearses_once_and_no_trial(tmp_path: Path) -> None:
    """Costs 3 s."""
    recipe = {
        "model": "tests.support.toy:model", "task": "tests.support.toy:task", "runtime": "eager",
        "step": [{"do": "prune", "sparsity": {"search": [0.2, 0.6]}, "skip": {"search": [True, False]}}],
        "budget": {"metric_drop": 90.0, "minimize": ["metric_drop", "params"], "trials": 2, "finalists": 1},
    }  # fmt: skip
    counts = []
    for _ in range(2):
        heard = Heard()
        ts.search(tiny.model(), tiny.task(), recipe, workdir=tmp_path, sampler="random", progress=heard)
        counts.append(heard.steps.count("rehearsal"))
    assert counts == [4, 0], "three parts, and the end of the last one"
    heard = Heard()
    ts.search(
        tiny.model(), tiny.task(), {**recipe, "rehearse": False}, workdir=tmp_path / "b", sampler="random",
        progress=heard,
    )  # fmt: skip
    assert "rehearsal" not in heard.steps


@pytest.mark.slow
def test_a_search_fails_before_its_first_trial(tmp_path: Path) -> None:
    recipe = {
        "model": "tests.support.toy:model", "task": "tests.support.toy:task", "runtime": "eager",
        "step": [{"do": "finetune", "epochs": {"search": [1, 4]}}], "budget": {"metric_drop": 90.0},
    }  # fmt: skip
    heard = Heard()
    with pytest.raises(TorchslimError, match=r"step 1 \('finetune'\)"):
        ts.search(tiny.model(), replace(tiny.task(), loss=bad_loss), recipe, workdir=tmp_path, progress=heard)
    assert set(heard.steps) == {"rehearsal"}


class Chatty(nn.Module):
    """A model that cannot be captured as a whole, with a part that can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny.model()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 1e9:
            print("large")
        return self.body(x)


def test_parts_of_a_model_are_rehearsed_and_deployed_once(tmp_path: Path) -> None:
    steps = [ts.Prune(sparsity=0.5), ts.Quantize("int8")]
    result = ts.compress(Chatty(), tiny.task(), steps, part="body", runtime="eager", workdir=tmp_path)
    assert len(result.run["forecast"]["parts"]) == 4
    assert [path.name for path in tmp_path.iterdir() if "rehearsal" in path.name] == [RECORD_FILE]


def work(rank: int, folder: Path) -> None:
    patch = pytest.MonkeyPatch()
    rehearsals.restore(patch)
    patch.setattr(sys.modules["torchslim.pipeline.stage_timing"], "compare", tiny.compare)
    heard = Heard()
    steps = [ts.Prune(sparsity=0.5), ts.Finetune(epochs=1)]
    result = ts.compress(tiny.model(), tiny.task(), steps, runtime="eager", workdir=folder, progress=heard)
    assert "rehearsal" in heard.steps
    assert len(result.run["forecast"]["parts"]) == 4
    assert [path.name for path in folder.iterdir() if "rehearsal" in path.name] == [RECORD_FILE]


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_train_together_rehearse_together(tmp_path: Path) -> None:
    """Costs 6 s."""
    two_processes(work, tmp_path)


def test_the_file_of_a_recipe_may_leave_it_out(tmp_path: Path) -> None:
    from torchslim.pipeline.recipe import parse_recipe

    text = 'model = "tests.support.toy:model"\ntask = "tests.support.toy:task"\n{}\n[[step]]\ndo = "finetune"'
    assert parse_recipe(text.format("")).rehearse
    assert not parse_recipe(text.format("rehearse = false")).rehearse
    with pytest.raises(RecipeError, match="rehearse"):
        parse_recipe(text.format("rehearse = 3"))
