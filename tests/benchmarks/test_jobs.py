"""The gallery's benchmark: what counts as code, what is missing, what its bars judge, and one job measured in small."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import jobs
from benchmarks.jobs_page import lost, misses, page
from torchslim.errors import RecipeError
from torchslim.pipeline.recipe import Recipe


def row(job: str = "images", **more: Any) -> dict[str, Any]:
    figures = {"val": 90.0, "test": 90.0, "bytes": 4_000}
    found = {
        "job": job, "version": "v1", "machine": "a processor (AVX2)", "reason": "", "lines": 50, "minutes": 1.5, "runtime": "onnxruntime",
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True}, "float": figures,
        "artifact": figures | {"test": 89.5, "bytes": 1_000},
        "latency_ms": {"float": 2.0, "artifact": 1.0},
        "speedup": {"value": 2.0, "low": 1.8, "high": 2.2, "verdict": "faster"},
        "steps": ["quantize"], "suggested": ["Model: small.", "Machine: fast.", "Therefore: quantize to int8.", "Tried: int8."],
    }  # fmt: skip
    return found | more


def test_comments_docstrings_and_blank_lines_are_no_code(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        '"""About.\n\nMore."""\n\nimport x  # why\n\n\ndef f(\n    a,\n):\n    """Doc."""\n    # no\n    return """t\nu"""\n'
    )
    (tmp_path / "tiny.py").write_text("x = 1\n")
    assert jobs.code_lines(tmp_path) == 6


def test_a_job_that_failed_or_was_measured_on_other_source_is_missing() -> None:
    rows = [row("a"), row("b", reason="failed"), row("c", version="v0")]
    assert jobs.missing(rows, "abc", "v1", fresh=False) == ["b"]
    assert jobs.missing(rows, "abc", "v1", fresh=True) == ["b", "c"]


@pytest.mark.parametrize(("more", "missed"), [
    ({}, []),
    ({"artifact": row()["artifact"] | {"test": 88.9}}, ["loses 1.10"]),
    ({"artifact": row()["artifact"] | {"bytes": 2_000}}, ["only 2.00 times fewer bytes"]),
    ({"speedup": row()["speedup"] | {"verdict": "no difference"}}, ["time: no difference"]),
])  # fmt: skip
def test_bars(more: dict[str, Any], missed: list[str]) -> None:
    assert misses(row(**more)) == missed


def test_a_metric_without_percent_loses_per_cent_of_itself() -> None:
    metric = {"name": "mae", "unit": "", "higher_is_better": False}
    worse = row(metric=metric, float=row()["float"] | {"test": 2.0}, artifact=row()["artifact"] | {"test": 2.1})
    assert lost(worse) == pytest.approx(5.0)


def test_the_page_shows_the_newest_row_that_counts_and_names_what_failed() -> None:
    text = page([row("a", lines=1), row("a", lines=77), row("a", reason="broken"), row("b", reason="no data")], "2.0")
    assert "| 77 | v1, a processor (AVX2) |" in text
    assert "- b: no data" in text
    assert "broken" not in text
    assert "| a | met | Therefore: quantize to int8. Tried: int8. |" in text


def test_a_job_without_its_data_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Recipe) -> Any:
        raise RecipeError("get it with: pip")

    monkeypatch.setattr(Recipe, "load", load)
    assert jobs.measure("series")["reason"] == "get it with: pip"


@pytest.mark.slow
def test_a_job_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs 8 s."""
    tiny = importlib.import_module("examples.tabular.tiny")
    torch.manual_seed(0)
    monkeypatch.setattr(Recipe, "load", lambda self: (tiny.model(), tiny.task(), None))
    found = jobs.measure("tabular") | {"version": "v1", "machine": "a processor"}
    assert found["reason"] == ""
    assert found["artifact"]["bytes"] < found["float"]["bytes"]
    assert found["latency_ms"]["artifact"] > 0
    assert found["steps"] == ["prune", "distill", "quantize"]
    assert found["lines"] > 30
    assert "| tabular | ROC AUC |" in page([found], "2.0")
