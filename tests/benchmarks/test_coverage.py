"""The coverage benchmark: what is left to run, what counts, the page, and what of an output is compared."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchslim
from benchmarks import coverage, runner, zoo
from benchmarks.one_model import TimeLimit, check, counts, timed, words
from benchmarks.outputs import main_outputs, repeated, shapes
from benchmarks.rows import append, load, version
from tests.support import models

ROOT = Path(__file__).parents[2]
MACHINE = {"processor": "a processor", "threads": 2, "versions": {"torch": "2.0"}}
GOOD = {"batch 1": True, "batch 3": True, "shapes": True, "backward": True}


def row(model="timm/a", side="ours", **more):
    base = {
        "model": model, "suite": model.partition("/")[0], "side": side, "version": "v1", "time_limit": 60.0,
        "verified": True, "counts": True, "runs": GOOD, "reason": "", "ratio": 2.0, "seconds": 1.26,
        "peak_bytes": 3 * 2**20, "parameters_before": 4_000_000, "parameters_after": 2_000_000,
        "macs_before": 8_000_000, "macs_after": 2_000_000,
    }  # fmt: skip
    return base | more


def test_a_model_and_side_run_once_and_the_other_side_still_runs():
    todo = runner.missing(["timm/a", "timm/b"], ("ours", "peer"), [row()], {"ours": "v1", "peer": "p"})
    assert todo == [("timm/a", "peer"), ("timm/b", "ours"), ("timm/b", "peer")]


def test_rows_of_other_source_are_run_again_only_when_asked():
    rows = [row(version="v0")]
    assert runner.missing(["timm/a"], ("ours",), rows, {"ours": "v1"}) == []
    assert runner.missing(["timm/a"], ("ours",), rows, {"ours": "v1"}, fresh=True) == [("timm/a", "ours")]
    assert runner.missing(["timm/a"], ("ours",), [*rows, row()], {"ours": "v1"}, fresh=True) == []


def test_what_ran_into_a_shorter_time_limit_is_tried_again():
    rows = [row(reason="time limit of 60 s")]
    versions = {"ours": "v1"}
    assert runner.missing(["timm/a"], ("ours",), rows, versions, limit=60) == []
    assert runner.missing(["timm/a"], ("ours",), rows, versions, limit=180) == [("timm/a", "ours")]


def test_the_newest_row_is_shown():
    rows = [row(counts=False, reason="old"), row()]
    assert runner.latest(rows)["timm/a", "ours"]["counts"]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row("timm/b"))[:40])
    assert [each["model"] for each in load(path)] == ["timm/a"]
    append(row("timm/b"), path)
    assert [each["model"] for each in load(path)] == ["timm/a", "timm/b"]
    assert load(tmp_path / "none.jsonl") == []


def test_our_version_follows_the_source(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(torchslim, "__file__", str(tmp_path / "__init__.py"))
    first = version("ours")
    assert version("ours") == first
    (tmp_path / "a.py").write_text("x = 2")
    assert version("ours") != first


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, True),
        ({"runs": GOOD | {"batch 3": "fixed"}}, True),
        ({"ratio": 1.49}, False),
        ({"verified": None}, False),
        ({"verified": False}, False),
        ({"runs": GOOD | {"backward": False}}, False),
        ({"runs": None}, False),
    ],
)
def test_what_counts(more, expected):
    assert counts(row(**more)) is expected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"reason": "PruneError: no"}, "PruneError: no"),
        ({"verified": False, "reasons": ["a", "b"]}, "not verified; a; b"),
        ({"ratio": 1.2}, "only 1.20x fewer parameters"),
        ({"ratio": 1.2, "reasons": ["heads"]}, "only 1.20x fewer parameters: heads"),
    ],
)
def test_why_a_row_does_not_count(more, words):
    assert coverage.why(row(**more)) == words


def test_the_page_sums_up_each_suite_and_lists_what_fails():
    rows = [
        row("torchvision/x"),
        row("torchvision/x", "peer", same_as_zeroed=False),
        row("timm/a"),
        row("timm/a", "peer", counts=False, verified=None, runs=None, reason="ValueError: <a|b>", ratio=None,
            parameters_after=None, macs_after=None),
    ]  # fmt: skip
    page = coverage.page(rows, MACHINE)
    assert "a processor, 2 threads" in page
    assert "| torchvision | 1 | 1 of 1 (100 %) | 1 of 1 (100 %) | 1 of 1 (100 %) | 0 of 1 (0 %) |" in page
    assert "| timm | 1 | 1 of 1 (100 %) | 0 of 1 (0 %) | 0 of 1 (0 %) | not measured |" in page
    assert "| all | 2 | 2 of 2 (100 %) | 1 of 2 (50 %) |" in page
    assert "| a | ours | yes | yes | 4.00 -> 2.00 M | 2.00x | 8.00 -> 2.00 M | 4.00x | 1.3 | 3 |" in page
    assert "- `timm/a`: ValueError: &lt;a\\|b>" in page
    tables = [line for line in page.splitlines() if line.startswith("| a |")]
    assert all(line.replace("\\|", "").count("|") == len(coverage.COLUMNS) + 1 for line in tables)


def test_the_page_of_one_side():
    page = coverage.page([row(side="peer")], MACHINE)
    assert "ours not measured" in page
    assert "### ours" not in page


def test_hidden_states_and_caches_are_not_compared():
    x = torch.zeros(2, 3)
    assert shapes({"logits": x, "encoder_last_hidden_state": x, "past_key_values": (x,)}) == [[2, 3]]
    assert shapes((x, [x])) == [[2, 3], [2, 3]]
    assert main_outputs(None) == []


def test_how_many_objects_a_detector_finds_is_not_compared():
    assert shapes([{"boxes": torch.zeros(5, 4), "labels": torch.zeros(5)}]) == [[4], []]


def test_inputs_are_repeated_in_every_container():
    image = torch.zeros(1, 3, 2, 2)
    assert repeated((image,), 3)[0].shape == (3, 3, 2, 2)
    assert repeated({"x": image, "flag": True}, 3)["x"].shape == (3, 3, 2, 2)
    assert len(repeated(([image[0]],), 3)[0]) == 3


def test_a_result_is_checked_forward_backward_and_at_another_batch():
    model, inputs = nn.Linear(4, 3), (torch.randn(1, 4),)
    runs, failure = check(model, inputs, [[1, 3]], (torch.randn(3, 4),), [[3, 3]])
    assert (runs, failure) == (GOOD, "")
    runs, failure = check(model, inputs, [[1, 2]], None, None)
    assert (runs["shapes"], runs["batch 3"]) == (False, "fixed")
    assert failure.startswith("shapes")
    runs, failure = check(model, (torch.randn(1, 5),), [[1, 3]], None, None)
    assert not runs["batch 1"]
    assert failure.startswith("result does not run: RuntimeError")
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    assert check(model, inputs, [[1, 3]], None, None)[1] == "no finite gradients"


STUBBORN = """
import json
from benchmarks.one_model import timed

def stubborn():
    while True:
        try:
            sum(range(10_000))
        except Exception:  # what a library may do
            continue

result, found = timed(stubborn, 0.2)
print(json.dumps([result, found]))
"""


@pytest.mark.slow
def test_a_call_that_takes_too_long_is_stopped_even_where_errors_are_swallowed():
    # in a process of its own, as every row is: it sets the alarm of the process
    done = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True, check=True, cwd=ROOT)
    result, found = json.loads(done.stdout)
    assert result is None
    assert found["reason"] == "time limit of 0 s"
    assert 0.1 < found["seconds"] < 5
    assert not issubclass(TimeLimit, Exception)


@pytest.mark.slow
def test_a_failed_call_leaves_its_reason():
    def fail():
        raise ValueError("first\nsecond")

    assert timed(fail, 5)[1]["reason"] == "ValueError: first"


def test_a_reason_names_no_folder_of_this_machine():
    error = RuntimeError("cannot run; /home/me/.venv/lib/python3.11/site-packages/a_package/model.py:7 in forward")
    assert words(error) == "RuntimeError: cannot run; a_package/model.py:7 in forward"


def test_entries_are_the_same_each_time_and_nothing_is_silent():
    entry = zoo.Entry("toy/encoder", "toy", lambda: (models.Encoder(), (torch.randint(0, models.WORDS, (1, 5)),)))
    state = torch.random.get_rng_state()
    (first, inputs), (second, again) = entry.build(), entry.build()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.training
    assert torch.equal(inputs[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(parameter.any() for parameter in first.parameters())


def test_removed_channels_are_zeroed_in_the_original():
    pytest.importorskip("torch_pruning")
    from benchmarks.peer import Removed, prune_with_peer

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1000),
    ).eval()  # fmt: skip
    inputs = (torch.randn(1, 3, 8, 8),)
    original, removed = copy.deepcopy(model), Removed(model)
    pruned = prune_with_peer(model, inputs, trace=removed)
    assert removed.comparable
    assert pruned[0].out_channels == 4
    assert pruned[-1].out_features == 1000
    assert torch.allclose(removed.zeroed(original)(*inputs), pruned(*inputs), atol=1e-6)
