"""The watch over mutated inputs sees every kind of fault, and counts what was tried however a batch ends."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.deployment_models import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.fuzzed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("accepted", {"accepted": 3}),
        ("refused", {"refused": 3}),
        ("raw", {"raw": 3}),
        ("hang", {"hang": 3}),
        ("growth", {"growth": 3}),
        ("hidden growth", {"growth": 3}),
        ("death", {"death": 1}),
        ("silence", {"hang": 1}),
    ],
)
def test_every_outcome_is_told_apart(name: str, outcomes: dict[str, int], found: dict[str, Any]) -> None:
    row = found["rows"][name]
    assert row["outcomes"] == outcomes
    assert len(row["faults"]) == sum(count for each, count in outcomes.items() if each not in ("accepted", "refused"))


@pytest.mark.parametrize("name", ["the end", "a signal"])
def test_what_was_tried_before_a_batch_was_cut_off_is_counted(name: str, found: dict[str, Any]) -> None:
    row = found["rows"][name]
    assert 1 <= row["outcomes"]["accepted"] < 100
    assert not row["faults"]
    assert row.get("stopped", False) is (name == "a signal")


def test_the_page_counts_the_kinds_of_a_group_together(found: dict[str, Any]) -> None:
    assert "| **all made** | 6 | 3 | 0 | 3 |" in found["page"]
    assert "- raw (3), ZeroDivisionError" in found["page"]
