"""Progress: what is logged where no callback is given."""

from __future__ import annotations

import logging

import pytest

import torchslim as ts
from tests.support import toy


@pytest.mark.slow
def test_phases_are_logged_at_info_and_their_progress_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "torchslim")
    ts.compress(toy.model(), toy.task(), [ts.Finetune(epochs=1)], runtime="eager")
    rows = [(row.levelname, row.getMessage()) for row in caplog.records if row.name == "torchslim"]
    assert ("INFO", "finetune: start") in rows
    assert ("INFO", "artifact: measure latency") in rows
    steps = [message for level, message in rows if level == "DEBUG"]
    assert len(steps) == 8, "one for each batch"
    assert steps[-1].startswith("finetune: train 8/8  epoch 1  loss ")
