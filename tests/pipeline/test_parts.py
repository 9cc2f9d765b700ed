"""Runs over parts of a model: measured whole, resumed, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import parted
from tests.support.parted import Branching, Counted, Translator, generation_task, images, seeded, sentences, task
from torchslim.core.parts import unmounted
from torchslim.errors import ArtifactError, SelectError, TaskError
from torchslim.report import render, table
from torchslim.report.numbers import counted

PARTS = ["backbone", "neck"]
STEPS = [
    ts.Prune(pattern="channel", sparsity=0.4, round_to=1, min_channels=1, train=ts.Finetune(epochs=1, lr=1e-2)),
    ts.Distill(epochs=1, lr=1e-2),
    ts.Quantize("int8", mode="qat", train=ts.Distill(epochs=1)),
]


def run(folder: Path, **options: Any) -> ts.Result:
    given = {"runtime": "eager", "threads": 1, "part": PARTS, "workdir": folder}
    return ts.compress(seeded(Branching), task(), STEPS, **given | options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ts.Result:
    return run(tmp_path_factory.mktemp("run") / "work")


X = images(5, seed=20)[0]


def test_only_the_parts_are_compressed(result: ts.Result) -> None:
    module: Any = result.module
    assert len(module.backbone[0].weight) < 8
    assert len(module.neck[0].weight) < 12
    assert module.low.weight.shape == (4, 8)
    assert module.high.weight is module.low.weight
    layers = {layer["layer"] for layer in result.run["rows"][3]["layers"]}
    assert {"backbone.0", "backbone.3", "backbone.7", "neck.0", "neck.2"} <= layers


def test_the_float_module_has_the_trained_weights_of_all(result: ts.Result) -> None:
    behind = unmounted(result.model)
    for name, value in behind.state_dict().items():
        assert torch.equal(value, result.module.state_dict()[name]), name


def test_the_metric_is_computed_through_the_runtime(result: ts.Result) -> None:
    x, labels = images(32, seed=9)
    right = (result.deployed(x).argmax(1) == labels).float().mean().item() * 100
    assert result.run["rows"][-1]["metric"]["test"]["value"] == pytest.approx(right)
    counted = Counted(result.deployed)
    result.deployed(x)
    assert counted.calls == {"backbone": 1, "neck": 1}


def test_whole_and_parts_are_timed(result: ts.Result) -> None:
    for row in result.run["rows"]:
        assert set(row["latency_ms"]) == {"eager", "eager, part backbone", "eager, part neck"}
        assert all(entry["value"] > 0 for entry in row["latency_ms"].values())
    json.dumps(result.run, allow_nan=False)
    for text in (table(result.run), render(result.run)):
        assert "ne call of backbone alone" in text
        assert "ne call of neck alone" in text


@pytest.mark.slow
def test_a_finished_run_is_taken_from_its_folders(result: ts.Result) -> None:
    phases: list[tuple[str, str]] = []
    again = run(result.folder, progress=lambda event: phases.append((event.step, event.phase)))
    assert [step for step, phase in phases if phase == "resumed"] == ["prune", "distill", "quantize"]
    assert torch.equal(again.deployed(X), result.deployed(X))
    assert torch.equal(again.model(X), result.model(X))
    for name, value in again.module.state_dict().items():
        assert torch.equal(value, result.module.state_dict()[name]), name
    assert [row["metric"] for row in again.run["rows"]] == [row["metric"] for row in result.run["rows"]]


def test_a_saved_run_loads_as_the_whole_and_part_by_part(result: ts.Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "out")
    assert torch.equal(ts.load(folder, Branching)(X), result.deployed(X)), "from the model before the run"
    assert torch.equal(ts.load(folder, lambda: result.module)(X), result.deployed(X)), "from the pruned model"
    backbone = ts.load(folder, part="backbone")
    assert torch.equal(backbone(X), result.deployed.parts["backbone"](X))  # type: ignore[union-attr]
    with pytest.raises(ArtifactError, match="'backbone'.*'neck'"):
        ts.load(folder)
    rebuilt = ts.load_module(folder, Branching)
    assert all(torch.equal(value, result.module.state_dict()[name]) for name, value in rebuilt.state_dict().items())


@pytest.mark.slow
def test_one_part_on_onnxruntime_loads_without_a_name(tmp_path: Path) -> None:
    result = ts.compress(
        seeded(Branching), task(), [ts.Quantize("int8")], part="backbone", threads=1, workdir=tmp_path / "work"
    )
    folder = result.save(tmp_path / "out")
    assert torch.equal(ts.load(folder)(X), result.deployed.parts["backbone"](X))  # type: ignore[union-attr]
    assert torch.equal(ts.load(folder, Branching)(X), result.deployed(X))
    assert set(result.run["rows"][0]["latency_ms"]) == {
        f"{runtime}{part}" for runtime in ("onnxruntime", "eager") for part in ("", ", part backbone")
    }


@pytest.mark.slow
def test_a_generating_model_is_measured_by_what_it_generates(tmp_path: Path) -> None:
    """QAT of the decoder: the first step of every sentence runs in float, with the trained weights."""
    result: Any = ts.compress(
        seeded(Translator), generation_task(), [ts.Quantize("int8", mode="qat", train=ts.Finetune(epochs=1, lr=1e-2))],
        part=["encoder", "decoder"], runtime="eager", threads=1, workdir=tmp_path / "work",
    )  # fmt: skip
    assert result.module.head.weight is result.module.decoder.words.weight
    source, target = sentences(3, 6, seed=9)
    folder = result.save(tmp_path / "out")
    loaded: Any = ts.load(folder, Translator)
    assert torch.equal(loaded.generate(source), result.deployed.generate(source))
    assert torch.equal(loaded(source, target), result.deployed(source, target))
    with torch.no_grad():
        noise = ts.quantize.sqnr(result.module(source, target), result.deployed(source, target))
    assert noise > 15, "float fallback and integers are of one training"


@pytest.mark.slow
def test_automatic_layers_look_at_the_part_alone(tmp_path: Path) -> None:
    result = ts.compress(
        seeded(Branching), task(), [ts.Quantize("int8", layers="auto", metric_drop=5.0)], part="backbone",
        runtime="eager", threads=1, workdir=tmp_path / "work",
    )  # fmt: skip
    layers = {layer["layer"] for layer in result.run["rows"][1]["layers"]}
    assert layers
    assert all(layer.startswith("backbone.") for layer in layers)
    before, after = (row["metric"]["val"]["value"] for row in result.run["rows"][:2])
    assert after >= before - 5.0


@pytest.mark.slow
def test_channels_are_cut_to_the_latency_of_the_part(tmp_path: Path) -> None:
    result = ts.compress(
        seeded(Branching), task(), [ts.Prune(pattern="channel", of="latency", sparsity=0.1, round_to=4)],
        part="backbone", runtime="eager", threads=1, workdir=tmp_path / "work",
    )  # fmt: skip
    assert result.module.neck[0].weight.shape == (12, 8)  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ("backbon", SelectError, ("'backbon'", "backbone")),
        (["backbone", "backbone.0"], SelectError, ("overlap",)),
        ("", SelectError, ("empty",)),
        ("silent", TaskError, ("'silent'", "never called")),
    ],
)
def test_wrong_parts_are_named_before_any_work(part: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    class Silent(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.silent = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(error) as caught:
        ts.compress(seeded(Silent), task(), [ts.Prune(sparsity=0.5)], part=part, runtime="eager")
    assert all(word in str(caught.value) for word in words)


# --- recipes and searches ---

RECIPE = """
model = "tests.support.parted:branching"
task = "tests.support.parted:task"
runtime = "eager"
threads = 1
part = "backbone"

[[step]]
do = "prune"
pattern = "channel"
sparsity = 0.4
round_to = 1
min_channels = 1
"""


@pytest.mark.slow
def test_a_recipe_names_a_part(call: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = call("run", tmp_path / "recipe.toml", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    x = images(3)[0]
    pruned: Any = ts.load_module(tmp_path / "out", parted.branching)
    assert len(pruned.backbone[0].weight) < 8
    with torch.no_grad():
        assert torch.allclose(ts.load(tmp_path / "out", parted.branching)(x), pruned.eval()(x), atol=1e-5)


@pytest.mark.slow
def test_a_search_looks_at_a_part(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    recipe = {
        "model": "tests.support.parted:branching",
        "task": "tests.support.parted:task",
        "runtime": "eager",
        "threads": 1,
        "budget": {"minimize": ["params"], "metric_drop": 90.0, "trials": 2, "finalists": 1},
        "step": [{"do": "prune", "pattern": "channel", "sparsity": {"search": [0.2, 0.5]}, "round_to": 1, "min_channels": 1}],
    }  # fmt: skip
    found = ts.search(seeded(Branching), task(), recipe, workdir=tmp_path / "search", part="backbone")
    assert found.best is not None
    assert found.best.result is not None
    best: Any = found.best.result.module
    assert best.neck[0].weight.shape == (12, 8)
    assert len(best.backbone[0].weight) + len(best.backbone[3].weight) < 24


def test_a_suggestion_is_made_for_parts_alone() -> None:
    one = ts.suggest(seeded(Branching), task(), part="backbone", runtime="onnxruntime")
    assert one.document["part"] == "backbone"
    assert 'part = "backbone"' in one.toml
    both = ts.suggest(seeded(Branching), task(), part=["backbone", "neck"], runtime="onnxruntime")
    assert both.document["part"] == ["backbone", "neck"]
    model = seeded(Branching)
    count = sum(weight.numel() for path in PARTS for weight in model.get_submodule(path).parameters())
    assert f"{counted(count)} parameters" in both.reasons[0]
    assert f"{counted(count)} parameters" not in one.reasons[0]


@pytest.mark.slow
def test_a_budget_is_kept_by_compressing_a_part(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    result: Any = ts.compress(
        seeded(lambda: Branching(48)), task(), budget=ts.Budget(minimize=("params",), metric_drop=90.0, trials=2, finalists=1),
        part="backbone", runtime="eager", threads=1, workdir=tmp_path / "work",
    )  # fmt: skip
    assert result.module.neck[0].weight.shape == (12, 8)
