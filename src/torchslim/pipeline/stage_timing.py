"""Time the stages of a run side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchslim.artifact.assembled import AnyDeployed, DeployedParts, pieces
from torchslim.artifact.latency import ROUND_SECONDS, Timings, compare
from torchslim.artifact.remote import TimingWorker
from torchslim.core.step import Target
from torchslim.pipeline.stages import Stage
from torchslim.runtimes.eager import on_eager

ROUNDS = 60
SECONDS = 40.0


def timed(
    stages: Sequence[Stage],
    inputs: Sequence[Tensor] | None,
    target: Target,
    rounds: int,
    worker: TimingWorker | None = None,
) -> Timings:
    """Latency of all stages on the target's runtime and on eager, and of the parts of models.

    Timings are named "INDEX/RUNTIME" by stage, and "INDEX/RUNTIME/PART" for parts.

    Args:
        stages: the stages of a run.
        inputs: flat inputs of every call; None takes the example of each program.
        target: the run's runtime and threads.
        rounds: largest number of rounds.
        worker: times the programs on the target's runtime; those on eager are timed here.
    """
    # one runtime after the other: the threads of one keep spinning for a while and would slow down the other
    measured: dict[str, Sequence[float]] = {}
    machines: dict[str, str] = {}
    for kind in dict.fromkeys((target.runtime, "eager")):
        candidates = {f"{i}/{kind}": _on(stage.deployed, kind, target.threads) for i, stage in enumerate(stages)}
        parts = {
            f"{name}/{path}": piece
            for name, candidate in candidates.items()
            for path, piece in pieces(candidate).items()
            if path
        }
        own = compare if worker is None or kind != target.runtime else worker.compare
        timings = own(candidates | parts, rounds=rounds, seconds=SECONDS, inputs=inputs)
        measured |= timings.rounds
        machines |= timings.machines
    return Timings(measured, machines)


def timing_seconds(run: Mapping[str, Any]) -> float:
    """Seconds that `ROUNDS` rounds take at the latencies of a run that was timed with fewer rounds."""
    medians: dict[str, float] = {}
    for row in run["rows"][:-1]:  # the last one is the artifact: the last stage again
        largest = {f"{name} largest": entry for name, entry in row.get("latency_largest_ms", {}).items()}
        for name, latency in (row["latency_ms"] | largest).items():
            kind = name.partition(",")[0]  # without the part
            medians[kind] = medians.get(kind, 0.0) + max(latency["value"] / 1e3, ROUND_SECONDS)
    return sum(min(ROUNDS * seconds, SECONDS) for seconds in medians.values())


def _on(deployed: AnyDeployed, runtime: str, threads: int | None) -> AnyDeployed:
    """The model on `runtime`, which is the one that it is deployed on, or else eager."""
    if deployed.runtime == runtime:
        return deployed
    return deployed.on_eager(threads) if isinstance(deployed, DeployedParts) else on_eager(deployed, threads)
