"""The page of predicted latencies is made from its rows, and a model counts as within the bars only if it is."""

from __future__ import annotations

import numpy as np

from benchmarks.predicted import CASES, MEDIAN, P90, PAGE, ROWS, page
from benchmarks.rows import load


def test_the_page_is_that_of_its_rows() -> None:
    assert PAGE.read_text() == page()


def test_models_are_within_the_bars_where_the_page_says_so() -> None:
    lines = {line.split("|")[1].strip(): line for line in PAGE.read_text().splitlines() if line.startswith("| ")}
    for name in CASES:
        rows = [row for row in load(ROWS) if row["model"] == name]
        errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
        within = bool(rows) and np.median(errors) <= MEDIAN and np.quantile(errors, 0.9) <= P90
        assert lines[name].rstrip(" |").endswith("yes") == within
