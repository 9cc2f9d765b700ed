"""Short timings: no test reads more than the form of a measured time, so a few calls are enough."""

from __future__ import annotations

import pytest

from torchslim.artifact import latency

WARMUP_SECONDS, ROUND_SECONDS = latency.WARMUP_SECONDS, latency.ROUND_SECONDS


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Time each program for milliseconds instead of a third of a second."""
    patch.setattr(latency, "WARMUP_SECONDS", 0.002)
    patch.setattr(latency, "ROUND_SECONDS", 0.0002)


def restore(patch: pytest.MonkeyPatch) -> None:
    """Time as users do."""
    patch.setattr(latency, "WARMUP_SECONDS", WARMUP_SECONDS)
    patch.setattr(latency, "ROUND_SECONDS", ROUND_SECONDS)
