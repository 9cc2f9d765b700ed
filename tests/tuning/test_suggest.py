"""A suggested recipe fits the model, the machine and the task, runs as it is, and says why."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from tests.support.processors import SATURATING, detected
from torchslim.core.reason import Reason
from torchslim.core.step import Context, Target
from torchslim.errors import ExportError, RecipeError, TaskError
from torchslim.tuning import make_space

suggesting = importlib.import_module("torchslim.tuning.suggest")  # the package has the function by that name

FAST = ts.Budget(latency_ms=3.0, metric_drop=0.5)
SMALL = ts.Budget(size_mb=2.0)
BOTH = ("onnxruntime", "openvino")


class Convolutional(nn.Module):
    """Wide enough to lose channels."""

    def __init__(self, *, depthwise: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 32, 3, padding=1, groups=32 if depthwise else 1)
        self.last = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, toy.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.last(self.second(x))).mean((2, 3)))


class Recurrent(nn.Module):
    """The last step of an LSTM or GRU."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inside = kind(12, 32, batch_first=True)
        self.head = nn.Linear(32, toy.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(x)[0][:, -1])


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, toy.CLASSES)
    )  # fmt: skip


def encoder() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, num_labels=4
    )
    return transformers.BertForSequenceClassification(config)


def task(*sizes: int, train: bool = True, labels: Any = None) -> ts.Task:
    """Sixteen samples of noise."""
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(toy.CLASSES, (16,), generator=generator) if labels is None else labels
    batch = (torch.randn(16, *sizes, generator=generator), known)
    return ts.Task(train=[batch] * 4 if train else None, val=[batch], metric="accuracy")


def words() -> ts.Task:
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(50, (4, 8), generator=generator), torch.randint(4, (4,), generator=generator)
    batch = {"input_ids": ids, "labels": labels}
    return ts.Task(train=[batch], val=[batch], metric="accuracy")


def images() -> ts.Task:
    return task(1, 8, 8)


def without_training() -> ts.Task:
    return task(1, 8, 8, train=False)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], ts.Task]]] = {
    "convolutions": (Convolutional, images),
    "depthwise": (lambda: Convolutional(depthwise=True), images),
    "untrained": (Convolutional, without_training),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: task(9, 12)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: task(9, 12)),
    "perceptron": (perceptron, lambda: task(16)),
    "encoder": (encoder, words),
    "toy": (toy.model, toy.task),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same rules on every machine: both runtimes, and VNNI; and the same weights each time."""
    torch.manual_seed(0)
    monkeypatch.setattr(suggesting, "installed", lambda *, speed=True: BOTH if speed else BOTH[:1])
    monkeypatch.setattr(suggesting, "pilots_of", lambda *arguments: ())  # tests of pilots stand in test_pilot.py
    with detected("avx512-vnni"):
        yield


def derived(name: str, budget: ts.Budget = FAST, **more: Any) -> tuple[ts.Suggestion, dict[str, dict[str, Any]]]:
    """A suggestion, and its steps by what they do."""
    model, given = CASES[name]
    found = ts.suggest(model(), given(), budget, **more)
    return found, {table["do"]: table for table in found.document["step"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [FAST, SMALL, ts.Budget()], ids=["fast", "small", "free"])
def test_a_suggestion_is_a_recipe_that_a_search_takes(name: str, budget: ts.Budget) -> None:
    found, _ = derived(name, budget)
    assert tomllib.loads(found.toml) == found.document
    space = make_space(found.document)
    assert space.budget == ts.Budget(**{**vars(budget), "minimize": budget.objectives})
    assert len(found.reasons) == 3
    assert [line.partition(":")[0] for line in found.reasons] == ["Model", "Machine", "Therefore"]
    assert str(found).splitlines()[:3] == [f"# {line}" for line in found.reasons]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "budget"), [
    ("convolutions", FAST), ("convolutions", SMALL), ("untrained", FAST), ("untrained", SMALL), ("lstm", FAST),
    ("gru", FAST), ("gru", SMALL), ("perceptron", FAST), ("perceptron", SMALL), ("encoder", FAST), ("encoder", SMALL),
    ("toy", FAST),
])  # fmt: skip
def test_the_steps_of_a_suggestion_run(name: str, budget: ts.Budget) -> None:
    model, given = CASES[name]
    own, data = model(), given()
    document = ts.suggest(own, data, budget, runtime="onnxruntime").document
    for table in document["step"]:
        for training in (table, table.get("train", {})):
            if "epochs" in training:
                training["epochs"] = 1
    space = make_space(document)
    inputs = data.inputs(data.val[0])
    choices = [{each.name: end} for each in space.parameters if each.kind == "choice" for end in each.ends[1:]]
    for values in ({}, *choices):
        trained = own = model()
        for step in space.recipe(space.starts[0] | values).steps:
            if isinstance(step, ts.Quantize) and step.by == "latency":  # tests measure no time
                step = replace(step, layers={}, by="metric")
            ctx = Context(task=data, teacher=own, example_inputs=inputs, target=Target(runtime="onnxruntime"))
            step.check(ctx)
            trained = step(trained, ctx).model
        assert data.evaluate(lambda *args, model=trained, **kwargs: model(*args, **kwargs), "val") >= 0


def test_convolutions_lose_channels_learn_again_and_are_trained_on_the_grid() -> None:
    found, steps = derived("convolutions")
    assert list(steps) == ["prune", "distill", "quantize"]
    assert (steps["prune"]["pattern"], steps["prune"]["of"]) == ("channel", "macs")
    low, high = steps["prune"]["sparsity"]["search"]
    assert 0 < low < high <= 0.8
    assert (steps["quantize"]["scheme"], steps["quantize"]["mode"]) == ("int8", "qat")
    assert steps["quantize"]["train"]["epochs"] < steps["distill"]["epochs"] <= 10
    assert found.document["runtime"] == {"search": list(BOTH)}
    assert "100% (int8)" in found.reasons[1]


@pytest.mark.slow
def test_depthwise_layers_may_be_better_off_in_float() -> None:
    found, steps = derived("depthwise")
    assert "depthwise convolutions (1)" in found.reasons[0]
    assert steps["quantize"]["skip"] == {"search": [False, True]}
    assert "skip" not in derived("convolutions")[1]["quantize"]
    assert "skip" not in derived("depthwise", SMALL)[1]["quantize"], "smaller it is in any case"


@pytest.mark.parametrize("name", sorted(SATURATING))
def test_without_vnni_int8_is_on_trial(name: str) -> None:
    with detected(name):
        found, steps = derived("convolutions")
    assert found.reasons[1].startswith(f"Machine: {name}, ")
    assert steps["quantize"]["skip"] == {"search": [False, True]}
    assert "weights keep 7 bits" in found.reasons[1]
    assert "gain little without VNNI" in found.reasons[2]


@pytest.mark.slow
def test_without_training_data_little_is_cut_and_nothing_is_trained() -> None:
    found, steps = derived("untrained")
    assert list(steps) == ["prune", "quantize"]
    assert max(steps["prune"]["sparsity"]["search"]) <= 0.25
    assert make_space(found.document).starts[0]["1-prune.skip"] is True
    assert "mode" not in steps["quantize"]
    assert "no training data" in found.reasons[2]
    bare = ts.suggest(perceptron(), task(16, train=False), FAST)
    assert [table["do"] for table in bare.document["step"]] == ["quantize"]
    assert "nothing would mend the cut" in bare.reasons[2]


@pytest.mark.slow
def test_the_smallest_sparsity_removes_channels() -> None:
    """Eight channels of sixteen are half of the model, above the usual range. Costs 2 s."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    prune = ts.suggest(model, images(), FAST).document["step"][0]
    assert prune["do"] == "prune"
    assert prune["sparsity"] == 0.5
    x = images().inputs(next(iter(images().val)))
    ts.prune.channels(model, x, sparsity=prune["sparsity"], of=prune["of"])


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "named"), [(2000, True), (4, False)])
def test_large_tables_of_embeddings_are_stored_in_8_bits(rows: int, named: bool) -> None:
    """Static int8 leaves tables in float. Costs 2 s each."""
    model = nn.Sequential(nn.Embedding(rows, 32), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 4))
    tokens = torch.randint(4, (16, 8), generator=torch.Generator().manual_seed(0))
    data = ts.Task(val=[(tokens, tokens[:, 0])], metric="accuracy")
    fast = ts.suggest(model, data, FAST)
    (quantize,) = fast.document["step"]
    assert quantize.get("layers") == ({"type:Embedding": "int8-weights"} if named else "auto")
    assert quantize.get("by") == (None if named else "latency")
    assert ("tables of embeddings" in fast.reasons[2]) == named
    (weights,) = ts.suggest(model, data, SMALL).document["step"]
    assert "layers" not in weights, "schemes of weights store tables in 8 bits or fewer anyway"


@pytest.mark.slow
def test_linear_layers_have_a_choice_of_static_and_dynamic() -> None:
    for name in ("perceptron", "encoder"):
        found, steps = derived(name)
        assert steps["quantize"]["scheme"] == {"search": ["int8", "int8-dynamic"]}
        assert ("heads and neurons" in found.reasons[2]) == (name == "encoder")
    slow, fast = derived("encoder")[1]["distill"]["lr"]["search"], derived("perceptron")[1]["distill"]["lr"]["search"]
    assert max(slow) <= min(fast)


@pytest.mark.slow
def test_an_lstm_is_dynamic_first_and_a_gru_keeps_floating_sums() -> None:
    assert derived("lstm")[1]["quantize"]["scheme"] == {"search": ["int8-dynamic", "int8-weights"]}
    found, steps = derived("gru")
    assert steps["quantize"]["scheme"] == "int8-weights"
    assert "onnxruntime none, openvino none" in found.reasons[1]
    assert "nothing here computes" in found.reasons[2]
    assert derived("lstm", runtime="openvino")[1]["quantize"]["scheme"] == "int8-weights"
    assert derived("gru", runtime="eager")[1]["quantize"]["scheme"] == {"search": ["int8-dynamic", "int8-weights"]}


def test_where_bytes_alone_count_weights_alone_become_integers() -> None:
    found, steps = derived("perceptron", SMALL)
    assert steps["quantize"]["scheme"] == {"search": ["int8-weights", "int4-weights"]}
    assert steps["prune"]["of"] == "params"
    assert found.document["runtime"] == "onnxruntime", "the time does not matter"
    assert (
        "int4-weights"
        in derived("perceptron", ts.Budget(size_mb=2.0, minimize=("latency",)))[1]["quantize"]["scheme"]["search"]
    )


@pytest.mark.slow
def test_counts_are_no_matter_of_bits() -> None:
    found, steps = derived("convolutions", ts.Budget(macs=1e5))
    assert "quantize" not in steps
    assert "neither MACs nor parameters" in found.reasons[2]
    with pytest.raises(RecipeError, match="no step.*budget.*pruning .*quantization"):
        derived("toy", ts.Budget(macs=1e5))


def test_what_cannot_lose_channels_is_told_and_not_trained_in_vain() -> None:
    found, steps = derived("toy")
    assert list(steps) == ["quantize"]
    assert "wider than the 8" in found.reasons[2]
    alone = ts.suggest(nn.Linear(16, 4), task(16), FAST)
    assert re.search(f"no channels.*{Reason.OUTPUT}", alone.reasons[2])


def test_outputs_decide_what_the_original_teaches() -> None:
    classes = derived("perceptron")[1]["distill"]
    assert classes["response"] == {"do": "kd", "temperature": 4.0, "alpha": 0.9}
    numbers = ts.suggest(perceptron(), task(16, labels=torch.randn(16, 4)), FAST).document["step"][1]
    assert numbers["response"] == {"do": "mse"}
    assert "label_weight" not in numbers
    batch = (torch.randn(16, 16),)
    silent = ts.Task(train=[batch], val=[batch], metric=lambda predict, batches: 0.0)
    unlabeled = ts.suggest(perceptron(), silent, FAST).document["step"][1]
    assert (unlabeled["response"], unlabeled["label_weight"]) == ({"do": "mse"}, 0.0)


def test_outputs_without_logits_are_taught_by_labels_or_not_at_all() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = perceptron()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"boxes": self.inside(x)}

    given = task(16)
    losses = ts.Task(train=given.train, val=given.val, metric=lambda p, b: 0.0, loss=lambda out, b: out["boxes"].sum())
    assert [table["do"] for table in ts.suggest(Several(), losses, FAST).document["step"]][1] == "finetune"
    batch = (torch.randn(16, 16),)
    silent = ts.Task(train=[batch], val=[batch], metric=lambda p, b: 0.0)
    found = ts.suggest(Several(), silent, FAST)
    assert "no teacher" in found.reasons[0]
    assert [table["do"] for table in found.document["step"]] == ["quantize"]


@pytest.mark.slow
def test_few_batches_are_seen_more_often() -> None:
    many = ts.Task(train=[images().val[0]] * 400, val=images().val, metric="accuracy")
    assert ts.suggest(Convolutional(), many, FAST).document["step"][1]["epochs"] == 3

    class Stream:
        def __iter__(self) -> Any:
            return iter([images().val[0]])

        def __len__(self) -> int:
            raise TypeError("an iterable data set has no length")

    stream = ts.Task(train=Stream(), val=images().val, metric="accuracy")
    assert ts.suggest(Convolutional(), stream, FAST).document["step"][1]["epochs"] == 3
    assert derived("convolutions")[1]["distill"]["epochs"] == 10


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model, given = Convolutional().train(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ts.suggest(model, given, FAST)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(TaskError, match="no parameters"):
        ts.suggest(nn.ReLU(), task(16), FAST)
    with pytest.raises(RecipeError, match="runtime 'tpu'"):
        ts.suggest(perceptron(), task(16), FAST, runtime="tpu")
    with pytest.raises(RecipeError, match="no layer.*weights"):
        ts.suggest(nn.LayerNorm(16), task(16), FAST)
    with pytest.raises(ExportError):
        ts.suggest(perceptron(), task(3), FAST)


def test_installed_runtimes_are_found_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    known: set[str] = set()
    monkeypatch.setattr(suggesting.importlib.util, "find_spec", lambda name: name in known or None)
    monkeypatch.setattr(suggesting.shutil, "which", lambda name: "/usr/bin/g++" if "compiler" in known else None)
    assert suggesting.installed() == ("eager",)
    known |= {"compiler"}
    assert suggesting.installed() == ("aoti",)
    known |= {"openvino", "onnx"}
    assert suggesting.installed() == ("openvino",)
    known |= {"onnxruntime"}
    assert suggesting.installed() == BOTH
    assert suggesting.installed(speed=False) == BOTH[:1]


@pytest.mark.slow
def test_the_command_prints_the_recipe_or_writes_it(call: Any, tmp_path: Path) -> None:
    arguments = (
        "suggest",
        "tests.tuning.test_suggest:Convolutional",
        "tests.tuning.test_suggest:images",
        "--latency-ms",
        3,
    )
    done = call(*arguments, "--metric-drop", 0.5)
    assert done.code == 0, done.err
    document = tomllib.loads(done.out)
    assert document["model"] == "tests.tuning.test_suggest:Convolutional"
    assert document["budget"]["latency_ms"] == 3.0
    out = tmp_path / "recipe.toml"
    written = call(*arguments, "--runtime", "onnxruntime", "--out", out)
    assert written.out.splitlines()[2].startswith("Therefore: ")
    assert tomllib.loads(out.read_text())["runtime"] == "onnxruntime"
    checked = call("check", out)
    assert checked.code == 0, checked.err
    assert "torchslim suggest package.module:model" in call("suggest", "--help").out
    assert call("suggest", "tests.nothing:model", "tests.support.toy:task").code == 2
    assert "must be a finite number" in call(*arguments[:3], "--size-mb", -1).err
