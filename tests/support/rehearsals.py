"""Runs without their rehearsal: it takes as long as a run of a tiny model, and is tested by itself."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import torchslim.pipeline.runner
import torchslim.tuning.search_loop  # noqa: F401 - the modules are patched
from torchslim.pipeline.rehearsal import Rehearsed

RUNNER, SEARCH = (sys.modules[f"torchslim.{name}"] for name in ("pipeline.runner", "tuning.search_loop"))
REHEARSED_ONCE, REHEARSE_STEPS = RUNNER.rehearsed_once, RUNNER.rehearse_steps


def skip(patch: pytest.MonkeyPatch) -> None:
    """Begin runs and searches at once."""
    patch.setattr(RUNNER, "rehearsed_once", _nothing)
    patch.setattr(SEARCH, "rehearse_steps", _nothing)


def restore(patch: pytest.MonkeyPatch) -> None:
    """Rehearse as users do."""
    patch.setattr(RUNNER, "rehearsed_once", REHEARSED_ONCE)
    patch.setattr(SEARCH, "rehearse_steps", REHEARSE_STEPS)


def _nothing(*args: Any, **options: Any) -> Any:
    return Rehearsed()
