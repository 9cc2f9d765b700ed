"""The watch over mutated inputs sees every kind of fault, and counts what was tried however a batch ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from benchmarks import fuzz
from tests.mutations import Kind
from torchslim.errors import ArtifactError


def refuse(_: int) -> None:
    raise ArtifactError("no")


def out_of_memory(_: int) -> None:
    try:
        bytearray(2**34)
    except MemoryError as error:
        raise ArtifactError("it cannot be read") from error


def busy(_: int) -> None:
    end = time.process_time() + 20
    while time.process_time() < end:
        pass


def watched(
    attempt: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch, *, count: int = 3, seconds: float = 30.0
) -> fuzz.Row:
    monkeypatch.setitem(fuzz.KINDS, "made", Kind(name="made", group="made", examples=st.integers(), attempt=attempt))
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    return fuzz.watched("made", 0, count, time.monotonic() + seconds)


@pytest.mark.parametrize(
    ("attempt", "outcomes"),
    [
        (abs, {"accepted": 3}),
        (refuse, {"refused": 3}),
        (lambda _: 1 / 0, {"raw": 3}),
        (busy, {"hang": 3}),
        (lambda _: bytearray(2**34), {"growth": 3}),
        (out_of_memory, {"growth": 3}),
        (lambda _: os._exit(7), {"death": 1}),
    ],
)
def test_every_outcome_is_told_apart(attempt: Any, outcomes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    row = watched(attempt, monkeypatch)
    assert row["outcomes"] == outcomes
    faults = sum(outcomes.get(each, 0) for each in fuzz.FAULTS)
    assert len(row["faults"]) == faults


def test_a_child_without_a_word_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SILENCE", 0.5)
    row = watched(lambda _: time.sleep(60), monkeypatch)
    assert row["outcomes"] == {"hang": 1}


def test_what_was_tried_before_the_time_ended_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    row = watched(lambda _: time.sleep(0.05), monkeypatch, count=1_000, seconds=1.5)
    assert 1 <= row["outcomes"]["accepted"] < 100
    assert not row["faults"]


def test_what_was_tried_before_a_signal_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with fuzz.told_to_stop():
        row = watched(lambda _: time.sleep(0.05), monkeypatch, count=1_000)
    timer.join()
    assert row["stopped"]
    assert 1 <= row["outcomes"]["accepted"] < 100


def test_the_page_counts_the_kinds_of_a_group_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [watched(abs, monkeypatch), watched(lambda _: 1 / 0, monkeypatch)]
    text = fuzz.page(rows, {"processor": "a CPU", "versions": {"torch": "2"}})
    assert "| **all made** | 6 | 3 | 0 | 3 |" in text
    assert "- raw (3), ZeroDivisionError" in text
