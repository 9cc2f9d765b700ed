"""The page of the quantization benchmark, from made-up rows."""

from __future__ import annotations

import numpy as np

from benchmarks.quantize import ALLOWED, bound, missing, page
from torchslim.core.hardware import describe_machine


def row(model: str, ours: float, peer: float | None, floating: float = 10.0) -> dict[str, object]:
    noise = np.random.default_rng(0).normal(1, 0.01, 30)
    rounds = {"float": list(floating * noise), "ours": list(ours * noise[::-1])}
    if peer is not None:
        rounds["peer"] = list(peer * noise)
    return {
        "model": model, "runtime": "onnxruntime", "batch": 1, "scheme": "int8", "version": "1", "rounds": rounds,
        "peer": "quantize_static" if peer else None, "reason": "" if peer else "NoKernel: it has | none",
        "sqnr_ours": 30.0, "sqnr_peer": 29.0, "integer_share": 0.97, "bytes_float": 400, "bytes_ours": 100,
        "warnings": ["int8 will hardly be faster here"],
    }  # fmt: skip


def test_the_bound_is_above_the_median_and_near_it_without_noise() -> None:
    middle, upper = bound([2.0] * 20, [1.0] * 20)
    assert (middle, upper) == (2.0, 2.0)
    rng = np.random.default_rng(1)
    middle, upper = bound(list(rng.normal(1, 0.2, 50)), [1.0] * 50)
    assert middle < upper < middle + 0.2


def test_the_page_judges_each_row() -> None:
    text = page([row("resnet18", 5, 5), row("resnet50", 8, 5), row("vit_b_16", 12, None)], describe_machine())
    assert f"At most {ALLOWED} in 1 of 2 rows" in text
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "| met |" in lines["resnet18"]
    assert "**missed**" in lines["resnet50"]
    assert "NoKernel: it has \\| none" in lines["vit_b_16"]
    assert "- vit_b_16 on onnxruntime, batch 1: slower than float; the report said beforehand: int8 will hardly" in text
    assert "- resnet50 on onnxruntime, batch 1: the bound lies above" in text


def test_the_page_says_what_verification_left_in_float() -> None:
    text = page(
        [row("resnet18", 5, 5) | {"rolled_back": ["layer1.0: 3.1 dB"]}, row("resnet50", 5, 5)], describe_machine()
    )
    assert "- resnet18 on onnxruntime, batch 1: verification left in float: layer1.0: 3.1 dB" in text
    assert "- resnet50" not in text


def test_only_rows_of_this_version_count() -> None:
    rows = [row("resnet18", 5, 5)]
    assert ("resnet18", "onnxruntime", 1) not in missing(rows, ["resnet18"], ["onnxruntime"], "1")
    assert ("resnet18", "onnxruntime", 1) in missing(rows, ["resnet18"], ["onnxruntime"], "2")
