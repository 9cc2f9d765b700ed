"""The comparison with pipelines by hand: how lines are counted, what the page judges, and a script of every library."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchslim as ts
from benchmarks.by_hand import lines, page, paired, serve
from benchmarks.by_hand.jobs import JOBS

STATEMENTS = ("x = 1", "y = [\n    1,\n    2,\n]", "def f():\n    return 3", "class A:\n    b = 4")
NOTHING = ("", "# a comment", "   # another")


def row(side: str, seed: int = 0, test: float = 90.0, **more: Any) -> dict[str, Any]:
    found = {"job": "images", "seed": seed, "side": side, "version": "v1", "versions": {"peer": "1.0"}, "reason": ""}
    found["machine"] = "a processor (AVX2)"
    return found | {"val": test, "test": test, "bytes": 2048, "minutes": 1.5, "lines": 20, "tried": []} | more


def timed(ours: float, theirs: float, seed: int = 0) -> dict[str, Any]:
    rounds = {"float": [4.0] * 5, "torchslim": [ours] * 5, "by hand": [theirs] * 5}
    return row("latency", seed, rounds=rounds, load=1.0)


@given(st.lists(st.sampled_from(STATEMENTS), min_size=1), st.lists(st.sampled_from(NOTHING)), st.booleans())
def test_comments_blank_lines_and_docstrings_never_count(code: list[str], idle: list[str], described: bool) -> None:
    expected = sum(len(statement.splitlines()) for statement in code)
    text = "\n".join([*idle, *code, *idle])
    text = '"""What it does,\n\nin three lines."""\n' + text if described else text
    assert lines.python_lines(text) == expected


def test_annotations_cost_no_lines() -> None:
    code = "import a\n\n\ndef f(x):\n    return a.b(x)\n"
    typed = "from __future__ import annotations\n\nimport a\nfrom c import (\n    D,\n    E,\n)\n\nT = D[E]\n"
    typed += "\n\ndef f(x: T) -> E:\n    return a.b(x)\n"
    assert lines.python_lines(typed) == lines.python_lines(code) == 3
    assert lines.python_lines(typed + "\n\nprint(E)\n") == 3 + 4 + 1  # a name that the code reads has to be imported


@pytest.mark.parametrize("name", JOBS)
def test_all_sides_are_given_the_same(name: str) -> None:
    """Every script has one function with the same arguments; the last but one is the seed or the epochs."""
    folder = Path(lines.__file__).parent
    for script in JOBS[name].scripts.values():
        tree = ast.parse((folder / f"{script}.py").read_text())
        (run,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
        given_ = [argument.arg for argument in run.args.args]
        assert given_[:4] + given_[5:] == ["model", "train", "val", "calibration", "folder"]
        assert given_[4] in ("epochs", "seed")


@pytest.mark.parametrize(
    ("ours", "missed"),
    [
        ({}, []),
        ({"test": 89.5}, ["0.50 points less"]),  # rows of before hits were kept: the difference as it is
        ({"lines": 21}, ["21 lines against 60"]),
    ],
)
def test_the_bar_names_what_is_missed(ours: dict[str, Any], missed: list[str]) -> None:
    rows = [row("torchslim", **ours), row("by hand", lines=60), timed(1.0, 1.0)]
    assert page.verdicts(page.latest(rows), "images")["by hand"].misses == missed


def test_a_longer_latency_misses_the_bar_and_seeds_are_averaged() -> None:
    rows = [row("torchslim", seed, 91.0 - seed) for seed in range(2)] + [row("by hand", 0, 90.5, lines=60)]
    rows += [timed(2.0, 1.0), timed(2.0, 1.0, seed=1)]
    assert page.verdicts(page.latest(rows), "images")["by hand"].misses == ["2.00 times the latency"]


@pytest.mark.parametrize(
    ("lost", "gained", "missed", "said"),
    [
        (5, 0, [], "equal within error (5 of 1,000 samples differ, p = 0.06)"),
        (6, 0, ["0.60 points less"], "worse (6 of 1,000 samples differ, p = 0.03)"),
        (30, 20, [], "equal within error (50 of 1,000 samples differ, p = 0.20)"),
        (2, 20, [], "better (22 of 1,000 samples differ, p = 0.0001)"),
    ],
)
def test_a_difference_within_error_meets_the_bar(lost: int, gained: int, missed: list[str], said: str) -> None:
    theirs = np.arange(1_000) >= gained
    ours = np.arange(1_000) < 1_000 - lost
    rows = [
        row("torchslim", test=100 * ours.mean(), hits=paired.packed(ours), samples=1_000),
        row("by hand", test=100 * theirs.mean(), hits=paired.packed(theirs), samples=1_000, lines=60),
        timed(1.0, 1.0),
    ]
    assert page.verdicts(page.latest(rows), "images")["by hand"].misses == missed
    assert f"| {(gained - lost) / 10:+.2f} | {said} |" in page.page(rows)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_packed_hits_come_back(hits: list[bool]) -> None:
    assert paired.unpacked(paired.packed(hits), len(hits)).tolist() == hits


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 4))
def test_equal_seeds_give_the_p_value_of_mcnemars_exact_test(lost: int, gained: int, seeds: int) -> None:
    theirs = np.r_[np.ones(lost, bool), np.zeros(gained, bool), np.ones(7, bool)]
    ours = np.r_[np.zeros(lost, bool), np.ones(gained, bool), np.ones(7, bool)]
    found = paired.difference([ours] * seeds, [theirs] * seeds)
    expected = scipy.stats.binomtest(gained, lost + gained).pvalue if lost + gained else 1.0
    assert found.p == pytest.approx(expected, abs=1e-12)
    assert (found.samples, found.differ) == (lost + gained + 7, lost + gained)
    assert found.points == pytest.approx(100 * (gained - lost) / found.samples)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=9))
def test_the_p_value_is_that_of_all_sign_flips(told: list[list[bool]]) -> None:
    """Three seeds of both sides; every way to give the samples signs is written out."""
    ours, theirs = np.array(told).T[:3], np.array(told).T[3:]
    each = ours.sum(0) - theirs.sum(0)
    flips = [np.dot(signs, each) for signs in itertools.product((-1, 1), repeat=len(each))]
    expected = np.mean(np.abs(flips) >= abs(each.sum()))
    assert paired.difference(list(ours), list(theirs)).p == pytest.approx(expected)


def test_the_page_shows_failures_with_their_reason() -> None:
    failed = row("fasterai", reason="TypeError: <a | b>")
    tried = row("by hand", tried=[{"what": "a call", "error": "ValueError: no"}])
    text = page.page([row("torchslim"), failed, tried, timed(1.0, 2.0)])
    assert "TypeError: &lt;a \\| b>" in text
    assert "| images | by hand | a call | ValueError: no |" in text
    assert "| 2.000 | 0.50 [0.50-0.50] | 1.5 | 20 | 1 |" in text


def test_every_job_names_its_source_and_its_processors() -> None:
    text = page.page([row("torchslim"), row("by hand", version="v0"), timed(1.0, 2.0) | {"machine": "another (VNNI)"}])
    assert "Measured on a processor (AVX2), another (VNNI); torchslim v1." in text


def test_samples_keep_their_own_length() -> None:
    ids, mask = torch.ones(8, 5, dtype=torch.long), torch.ones(8, 5, dtype=torch.long)
    mask[:4, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(8, dtype=torch.long)}
    task = ts.Task(val=[batch], metric="accuracy")
    assert [tuple(sample[0].shape) for sample in serve.samples(task)] == [(1, 3)] * 4 + [(1, 5)] * 4


def test_a_file_is_served_with_the_accuracy_of_its_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3).eval(), torch.randn(6, 4)
    labels = model(x).argmax(1)
    path = ts.save(ts.deploy(model, (x,), runtime="onnxruntime"), tmp_path) / "model.onnx"
    task = ts.Task(val=[(x, labels)], metric="accuracy")
    assert serve.hits(serve.Served(path), task, task.val).all()
    told = serve.hits(serve.Served(path, lambda inputs: [-inputs[0]]), task, task.val)
    assert not told.all()
    assert serve.accuracy(told) == pytest.approx(100 * told.numpy().mean())


@pytest.mark.slow
def test_the_series_with_torchslim_run_in_small(tmp_path: Path) -> None:
    """Costs 15 s."""
    from benchmarks.by_hand import series_torchslim
    from examples.series import tiny

    model, task = tiny.model(), tiny.task()
    path = series_torchslim.run(model, task.train, task.val, task.train, 0, tmp_path)
    assert serve.accuracy(serve.hits(serve.Served(path), task, task.val)) > 100 / 9


@pytest.mark.slow
def test_the_images_by_hand_run_in_small(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    pytest.importorskip("torchdistill")
    from benchmarks.by_hand import images
    from examples.fashion_mnist import tiny

    model, task = tiny.model(), tiny.task()
    path = images.run(model, task.train, task.val, task.val, 1, tmp_path)
    inputs, _ = serve.listed(task, next(iter(task.val)))
    expected = serve.Served(tmp_path / "float.onnx")(inputs)
    assert (serve.Served(path)(inputs) - expected).abs().max() < 0.2 * expected.abs().max()
    assert path.stat().st_size < (tmp_path / "float.onnx").stat().st_size


@pytest.mark.slow
def test_the_series_by_hand_and_with_fasterai_run_in_small(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    from benchmarks.by_hand import series
    from examples.series import tiny

    model, task = tiny.model(), tiny.task()
    outputs = {"by hand": serve.Served(series.run(model, task.train, task.val, task.val, 0, tmp_path))}
    if pytest.importorskip("fasterai"):
        from benchmarks.by_hand import series_fasterai

        path = series_fasterai.run(model, task.train, task.val, task.val, 0, tmp_path)
        outputs["fasterai"] = serve.Served(path, series_fasterai.serve)
    inputs, _ = serve.listed(task, next(iter(task.val)))
    expected = model(*inputs)
    for served in outputs.values():
        assert (served(inputs) - expected).abs().max() < 0.2 * expected.abs().max()
