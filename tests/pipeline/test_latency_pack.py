"""Times taken where torchslim is not installed: packed, timed by the script alone, and given back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from tests.support import parted
from torchslim import cli
from torchslim.errors import PruneError, RecipeError, SelectError
from torchslim.pipeline.latency_pack import pack
from torchslim.pipeline.recipe import parse_recipe
from torchslim.training.calibration import part_examples

pytestmark = pytest.mark.slow

INPUTS = (torch.ones(2, 3, 8, 8),)
TARGET = ts.Target(runtime="onnxruntime", threads=1)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    ).eval()


def task() -> ts.Task:
    return ts.Task(val=[(*INPUTS, torch.tensor([0, 1]))], metric="accuracy")


def step(**fields: Any) -> ts.Prune:
    return ts.Prune(
        pattern="channel", sparsity=0.4, of="latency", criterion="l2", round_to=16, min_channels=16, **fields
    )


def context() -> ts.Context:
    bench = ts.Bench(example_inputs=INPUTS, target=TARGET)
    return ts.Context(task=task(), teacher=model(), example_inputs=INPUTS, target=TARGET, workbench=bench)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "board"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent))
        pack(model(), task(), [step()], folder, target=TARGET)
    poison = folder.parent / "poison"
    for name in ("torch", "torchslim"):  # the other machine has neither
        (poison / name).mkdir(parents=True)
        (poison / name / "__init__.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, folder / "bench.py", "--rounds", "5"],
        capture_output=True, text=True, timeout=300, check=True, env={"PYTHONPATH": str(poison)},
    )  # fmt: skip
    assert done.stdout.strip() == str(folder / "latency.json")
    return folder


def test_every_program_is_packed_and_timed(packed):
    about = json.loads((packed / "pack.json").read_text())
    assert {each["file"] for each in about["programs"]} | {"whole.onnx"} == {
        each.name for each in packed.glob("*.onnx")
    }
    found = json.loads((packed / "latency.json").read_text())
    timed = {(row, int(width)) for row, widths in found["rows"].items() for width in widths}
    assert timed == {(each["row"], each["width"]) for each in about["programs"]}
    assert all(ratio > 0 for widths in found["rows"].values() for ratio in widths.values())
    assert found["machine"]


def test_a_recipe_takes_the_table(packed, tmp_path):
    """With times that do not depend on this machine, in the rows that the script has written."""
    found = json.loads((packed / "latency.json").read_text())
    found["rows"] = {
        row: {width: 0.3 + 0.7 * int(width) / (100 if row == "all" else 32) for width in each}
        for row, each in found["rows"].items()
    }
    (tmp_path / "latency.json").write_text(json.dumps({**found, "machine": "a board"}))
    outcome = step(latency_table=str(tmp_path / "latency.json"))(model(), context())
    assert outcome.evidence["latency"][0]["elsewhere"] == "a board"
    assert outcome.model[0].out_channels + outcome.model[2].out_channels < 50
    with pytest.raises(PruneError, match="measured for model another"):
        step(latency_table=str(tmp_path / "latency.json"))(nn.Sequential(*model(), nn.ReLU()), context())


def test_packed_again_in_its_place_but_not_in_that_of_others(packed, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(RecipeError, match="files.*no latency pack"):
        pack(model(), task(), [step()], tmp_path)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([ts.Prune(sparsity=0.5)], "no step.*latency"),
        ([ts.Prune(pattern="channel", sparsity=0.2), step()], r"step 1 \('prune'\).*shape"),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path, steps, message):
    with pytest.raises(RecipeError, match=message):
        pack(model(), task(), steps, tmp_path / "board")


def test_a_runtime_without_files_cannot_be_timed_elsewhere(tmp_path):
    with pytest.raises(RecipeError, match="runtime 'inductor' has no file"):
        pack(model(), task(), [step()], tmp_path / "board", target=ts.Target(runtime="inductor"))


def test_the_command_packs_what_a_recipe_needs(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'model = "tests.support.toy:model"\ntask = "tests.support.toy:task"\nruntime = "onnxruntime"\nthreads = 1\n'
        '[[step]]\ndo = "prune"\npattern = "channel"\nsparsity = 0.3\nof = "latency"\nround_to = 4\nmin_channels = 4\n'
    )
    monkeypatch.setattr(sys, "argv", ["torchslim", "latency", str(recipe), "--pack", str(tmp_path / "board")])
    cli.main()
    assert "latency_table" in capsys.readouterr().out
    assert json.loads((tmp_path / "board" / "pack.json").read_text())["about"]["threads"] == 1
    missing = recipe.read_text() + 'latency_table = "nowhere.json"\n'
    (step,) = parse_recipe(missing).steps
    assert step == ts.Prune(
        pattern="channel", sparsity=0.3, of="latency", round_to=4, min_channels=4, latency_table="nowhere.json"
    )
    with pytest.raises(PruneError, match=r"nowhere\.json does not exist; give the latency.json"):
        step.check(context())


def test_a_part_is_packed_as_a_run_would_time_it(tmp_path: Path) -> None:
    data = parted.task()
    net = parted.branching()
    pack(net, data, [step()], tmp_path / "board", target=TARGET, part="backbone")
    content = json.loads((tmp_path / "board" / "pack.json").read_text())
    calls = part_examples(net, data, ["backbone"])
    bench = ts.Bench(example_inputs=parted.images(2)[:1], target=TARGET, steps=[step()], parts=calls)
    assert content["about"] == bench.within("backbone").about(net.backbone)
    assert content["spec"]["sizes"][0][1:] == [1, 8, 8], "the input of the part"
    with pytest.raises(RecipeError, match="one part, got 'backbone', 'neck'"):
        pack(net, data, [step()], tmp_path / "other", target=TARGET, part=["backbone", "neck"])
    with pytest.raises(SelectError, match="'backbon'.*backbone"):
        pack(net, data, [step()], tmp_path / "third", target=TARGET, part="backbon")
