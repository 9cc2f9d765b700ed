"""Times the kernels that a runtime executes for a program, with the runtime's own profiler."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from torchslim.runtimes.base import Deployed, as_array
from torchslim.runtimes.kernel_listing import UNWANTED, onnx_origins

RUNS = 50
"""Profiled calls of a program, after as many calls without effect."""

DISTURBED = 1.3
"""Calls of a kernel that take longer than its fastest quarter by this factor do not count."""

CLOCK_MS = 0.0015
"""What ONNX Runtime's profiler itself adds to each kernel's time."""

LEAST_MS = 0.0002
"""Least time of a kernel after `CLOCK_MS` is taken off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """Milliseconds of one kernel in one call of its program: the mean over the undisturbed calls of a profile.

    `node` names the node of the program that does its main work, `integer` says whether it computes on integers, and
    `before` gives the places, in the order of execution, of the kernels that it reads; -1 stands for the inputs. A
    kernel that reads constants alone has none.
    """

    node: str
    type: str
    ms: float
    before: tuple[int, ...] = ()
    integer: bool = False


def kernel_times(deployed: Deployed, leaves: Sequence[Tensor]) -> list[KernelTime] | None:
    """Times of all kernels of a program in the order of execution; None if its runtime has no profiler.

    Args:
        deployed: the program.
        leaves: its flat inputs.
    """
    profile = PROFILERS.get(deployed.runtime)
    return None if profile is None or deployed.payload is None else profile(deployed, list(leaves))


def _onnxruntime(deployed: Deployed, leaves: list[Tensor]) -> list[KernelTime]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        if deployed.threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = deployed.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            deployed.payload, options, providers=["CPUExecutionProvider"], disabled_optimizers=UNWANTED
        )
        feeds = {put.name: as_array(leaf) for put, leaf in zip(session.get_inputs(), leaves, strict=True)}
        for _ in range(2 * RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[str, list[float]] = {}
    for event in events:
        name = event.get("name", "").removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"]:
            durations.setdefault(name, []).append(float(event["dur"]))
    kernels = []
    for node, kernel, before in onnx_origins(deployed):
        runs = durations.get(node.name, [0.0])  # a node that gives its input on takes no time, and is not profiled
        ms = max(_typical(runs[len(runs) // 2 :]) / 1e3 - CLOCK_MS, LEAST_MS) if node.name in durations else 0.0
        kernels.append(KernelTime(node=kernel.node, type=kernel.type, ms=ms, integer=kernel.integer, before=before))
    return kernels


def _openvino(deployed: Deployed, leaves: list[Tensor]) -> list[KernelTime]:
    from torchslim.runtimes.openvino import profile

    return [
        KernelTime(
            node=kernel.node,
            type=kernel.type,
            ms=_typical(runs[len(runs) // 2 :]) / 1e3,
            integer=kernel.integer,
            before=before,
        )
        for kernel, before, runs in profile(deployed, leaves, 2 * RUNS)
    ]


def _typical(microseconds: Sequence[float]) -> float:
    """The mean of the calls that were not disturbed; profilers count whole microseconds, so a quantile is coarse."""
    quarter = sorted(microseconds)[len(microseconds) // 4]
    limit = max(DISTURBED * quarter, quarter + 1.0)
    return statistics.mean(duration for duration in microseconds if duration <= limit)


PROFILERS: Mapping[str, Callable[[Deployed, list[Tensor]], list[KernelTime]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""Functions that profile a program on its flat inputs, by runtime."""
