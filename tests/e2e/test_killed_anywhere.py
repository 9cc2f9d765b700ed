"""What a kill leaves at any moment, found by counting the changes in the folder, is gone on from."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from tests.support import tiny
from tests.support.kills import CHANGES, listing, states
from torchslim.artifact.latency_cache import LatencyTable, Timing
from torchslim.artifact.storage import write_artifact
from torchslim.core.files import TEMPORARY
from torchslim.core.fingerprint import fingerprint
from torchslim.pipeline.latency_pack import pack
from torchslim.tuning.study import Worker

LATENCY = ts.Prune(pattern="channel", sparsity=0.4, of="latency", criterion="l2", round_to=16, min_channels=16)


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["torchslim.pipeline.stage_timing"], "compare", tiny.compare)


@pytest.mark.slow
def test_a_run_that_was_killed_before_any_rename_goes_on(tmp_path: Path) -> None:
    found: list[ts.Result] = []
    left = states(lambda: found.append(tiny.run(tmp_path / "whole")), tmp_path / "whole", tmp_path / "album")
    assert len(left) > 10 * tiny.STEPS
    expected, files = tiny.outcome(found[0]), listing(tmp_path / "whole")
    for state in left:
        assert tiny.outcome(tiny.run(state)) == expected, state.name
        # another run may be writing to the cache of the teacher's answers, so an hour passes before it is cleaned
        assert {name for name in listing(state) if not name.startswith(f"cache/{TEMPORARY}")} == files, state.name
        shutil.rmtree(state)


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_a_save_that_was_killed_before_any_change_is_done_again(before: bool, tmp_path: Path) -> None:
    new, x = tiny.model(), torch.ones(2, 4)
    deployed = ts.deploy(new, (x,), runtime="eager")
    old = ts.deploy(nn.Sequential(nn.Linear(4, 3), nn.Tanh()).eval(), (x,), runtime="eager")
    folder, answers = tmp_path / "out", [old(x).tolist(), deployed(x).tolist()]

    def save(target: Path) -> None:
        write_artifact(target, deployed=deployed, module=new)

    if before:
        write_artifact(folder, deployed=old, extra={"notes.txt": b"of the old one"})
    left = states(lambda: save(folder), folder, tmp_path / "album", events=CHANGES)
    assert len(left) > 2 * len(listing(folder))
    for state in left:
        if (state / "artifact.json").is_file():  # then it is whole: the old one or the new one, never a mixture
            assert ts.load(state)(x).tolist() in answers, state.name
        save(state)
        assert ts.load(state)(x).tolist() == answers[1]
        assert fingerprint(ts.load_module(state, tiny.model).state_dict()) == fingerprint(new.state_dict())
        assert not any(TEMPORARY in name or ".saving" in name for name in listing(state)), state.name


@pytest.mark.slow
def test_packing_that_was_killed_before_any_rename_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 4)).eval()
    x = torch.ones(2, 3, 8, 8)
    task = ts.Task(val=[(x, torch.tensor([0, 1]))], metric="accuracy")
    one = ts.deploy(model, (x,), runtime="onnxruntime")
    monkeypatch.setattr(
        ts.Bench, "deploy", lambda bench, model: one
    )  # what is written counts here, not how long it takes

    def work(folder: Path) -> None:
        pack(model, task, [LATENCY], folder, target=ts.Target(runtime="onnxruntime", threads=1))

    folder = tmp_path / "board"
    left = states(lambda: work(folder), folder, tmp_path / "album")
    whole, files = json.loads((folder / "pack.json").read_text()), listing(folder)
    assert len(left) == len(files) - 1  # the lock is not renamed
    for state in left:
        work(state)
        assert json.loads((state / "pack.json").read_text()) == whole
        assert listing(state) == files


def test_a_table_that_was_killed_before_any_change_keeps_what_it_knew(tmp_path: Path) -> None:
    timing = Timing.from_entry({"ratio": 0.5, "low": 0.4, "high": 0.6, "ms": 1.0, "rounds": 3})

    def add(folder: Path, name: str) -> LatencyTable:
        table = LatencyTable("eager", 1, path=folder / "table.json")
        table.add("first", {name: timing})
        return table

    folder = tmp_path / "cache"
    add(folder, "a")
    for state in states(lambda: add(folder, "b"), folder, tmp_path / "album", events=CHANGES):
        assert "a" in LatencyTable("eager", 1, path=state / "table.json").known("first")
        assert set(add(state, "b").known("first")) == {"a", "b"}


def search(folder: Path) -> Any:
    recipe = {
        "model": "tests.support.tiny:model", "task": "tests.support.tiny:task", "runtime": "eager", "threads": 1, "seed": 1,
        "step": [
            {"do": "prune", "sparsity": {"search": [0.1, 0.6]}},
            {"do": "finetune", "epochs": 1},
        ],
        "budget": {"metric_drop": 100.0, "minimize": ["metric_drop", "params"], "trials": 2, "finalists": 1},
    }  # fmt: skip
    return ts.search(tiny.model(), tiny.task(), recipe, workdir=folder, study="s", sampler="random")


def by_values(found: Any) -> dict[float, Any]:
    """The figures of each trial; values of a lost trial are tried again after those that were waiting already."""
    return {each["parameters"]["1-prune.sparsity"]: each["figures"] for each in found.data["trials"]}


def spared(path: str) -> bool:
    """Optuna's own, and what the tests of a run and of a save go through rename by rename."""
    return any(each in path for each in ("study.journal", "/runs/", "/stages/", ".saving"))


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its first and last renames and one between: its runs, stages and saves are gone through by the tests above."""
    found: list[Any] = []
    folder = tmp_path / "whole"
    with monkeypatch.context() as patch:  # this process lives on, and the one that it stands for does not
        patch.setattr(Worker, "to_dict", lambda self: {"host": self.host, "pid": 2**22 + 1, "started": None})
        left = states(lambda: found.append(search(folder)), folder, tmp_path / "album", spared=spared)
    whole = by_values(found[0])
    for state in (left[0], left[len(left) // 2], left[-1]):
        again = search(state)
        known, best = by_values(again), again.best
        assert len(known) == len(whole) == 2, state.name
        assert known.keys() & whole.keys(), state.name
        assert all(known[each] == whole[each] for each in known.keys() & whole.keys()), state.name
        assert best is not None
        assert best.figures["metric_drop"] == min(each["metric_drop"] for each in known.values()), state.name
