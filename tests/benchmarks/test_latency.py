"""The page of the benchmark of latency says what its rows say."""

from __future__ import annotations

from typing import Any

from benchmarks.latency import CASES, page


def row(**changes: Any) -> dict[str, Any]:
    rounds = [
        {"target": 0.5, "predicted": 0.47, "measured": 0.53},
        {"target": 0.45, "predicted": 0.44, "measured": 0.48},
    ]
    machine = {"processor": "P", "instruction_set": "avx2", "versions": {"onnxruntime": "1.0"}}
    return {
        "model": "demo", "ends": "int8", "sparsity": 0.5, "ceiling": 0.5, "rounds": rounds, "best": 2, "again": 0.47,
        "programs": 40, "seconds": 9.6, "warnings": [], "machine": machine, "elsewhere": "", **changes,
    }  # fmt: skip


def test_a_line_for_each_case():
    text = page([row(), row(best=1, warnings=["it cannot be reached"])])
    assert "| demo | int8 | 0.50 | 0.470 -> 0.530, 0.440 -> 0.480 | 0.960 | yes | 0.940 | 40 | 10 |" in text
    assert "| 1.060 | **no**, and it warns: it cannot be reached |" in text
    assert "P, avx2, onnxruntime 1.0." in text


def test_both_models_end_in_both_numbers():
    assert {(name, ends) for name, ends, _ in CASES} == {
        (name, ends) for name in ("demo", "resnet18") for ends in ("fp32", "int8")
    }
