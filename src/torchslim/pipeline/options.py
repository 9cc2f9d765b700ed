"""The options of a run that do not belong to a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchslim.analysis.result import Sensitivity
from torchslim.artifact.remote import TimingWorker
from torchslim.core.fingerprint import canonical
from torchslim.core.step import Engine, Event, Inputs, Step, Target, log_progress


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run; `torchslim.compress` documents each of them."""

    target: Target
    example_inputs: Inputs | None = None
    dynamic_shapes: Any = "auto"
    part: str | Sequence[str] | None = None
    teacher: nn.Module | None = None
    engine: Engine | None = None
    seed: int = 0
    workdir: str | Path | None = None
    overwrite: bool = False
    stages: str | Path | None = None
    names: Mapping[str, str] | None = None
    sensitivity: Sensitivity | None = None
    rehearse: bool = True
    worker: TimingWorker | None = None
    progress: Callable[[Event], None] = log_progress

    def recipe(self, steps: Sequence[Step]) -> dict[str, Any]:
        """Return the recipe as the working folder stores it, to tell runs apart."""
        return {
            **dict(self.names or {}),
            "steps": [canonical(step) for step in steps],
            "target": asdict(self.target),
            "seed": self.seed,
        }
