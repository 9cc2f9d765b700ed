"""CPU seconds and memory from a module to a saved artifact, beside the peers: python -m benchmarks.toolchain

Each measurement runs in a process of its own, ours and the peer's in turn, on one thread. Imports count. Rows are
appended to benchmarks/toolchain.jsonl: a killed benchmark resumes. benchmarks/toolchain.md is written from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from statistics import median

from benchmarks.rows import Row, append, load, version
from torchslim.core.hardware import describe_machine

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "toolchain.jsonl", HERE / "toolchain.md"
COMMAND = "python -m benchmarks.toolchain"
MODELS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "vit_b_16", "bert", "lstm", "unet")
SIZES = ("scan-300", "scan-1000", "scan-3000")
JOBS = {
    "prune": ("Half of the MACs pruned, saved", "torch-pruning", 2.0),
    "onnxruntime": ("int8 for ONNX Runtime", "torch.onnx.export, quant_pre_process, quantize_static", 1.0),
    "openvino": ("int8 for OpenVINO", "openvino.convert_model, nncf.quantize", 1.0),
    "executorch": (
        "int8 for ExecuTorch",
        "torch.export, XNNPACKQuantizer, convert_pt2e, to_edge_transform_and_lower",
        1.0,
    ),
    "nodes": ("An unrolled scan of 300 to 3,000 operations for ONNX Runtime, the batch free", "torch.onnx.export", 1.0),
}
PEERS = {"prune": "peer", "openvino": "nncf", "executorch": "executorch"}  # in `rows.PEERS`, by job
SIDES = ("ours", "peer")
LIMIT_S = 900


def models_of(job: str) -> tuple[str, ...]:
    """Names of the models of a job."""
    return SIZES if job == "nodes" else MODELS


def measure(model: str, job: str, side: str, packages: str = "") -> Row:
    """The row of one fresh process: CPU seconds with its imports, and its peak of memory.

    Args:
        packages: a folder with the peers' packages, which a peer's process alone sees.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.one_toolchain", model, job, side]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if packages and side == "peer":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), packages)))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"cpu_s": None, "reason": f"above {LIMIT_S} s"}
    if done.returncode:
        return {"cpu_s": None, "reason": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    answer: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def page(rows: Iterable[Row]) -> str:
    """The page, from the newest rows of every side."""
    by_place: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_place.setdefault((row["job"], row["model"], row["side"]), []).append(row)
    machine = describe_machine()
    lines = [
        "# Seconds to an artifact",
        "",
        "CPU seconds and peak memory of a process that imports its libraries, makes an artifact of a module of random",
        "weights, and saves it: one thread, each measurement in a fresh process, ours and the peer's in turn, medians.",
        "torchslim checks its results (pruned models against masked ones, artifacts against their programs); peers do",
        f"not. Calibration: 4 batches of 8 samples. Made by `{COMMAND}` on {machine.get('processor', 'a CPU')}.",
        "",
    ]
    for job, (title, peer, bar) in JOBS.items():
        lines += [
            f"## {title}",
            "",
            f"Peer: {peer}. Bar: at most {bar:g} of the peer's CPU seconds.",
            "",
            "| model | ours, CPU s | peer, CPU s | ratio | ours, MiB | peer, MiB | runs | versions |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for model in models_of(job):
            sides = [_newest(by_place.get((job, model, side), [])) for side in SIDES]
            seconds = [_median(side, "cpu_s") for side in sides]
            memory = [_median(side, "peak_mib") for side in sides]
            both = seconds[0] is not None and seconds[1] is not None
            ratio = f"{seconds[0] / seconds[1]:.2f}" if both else "not measured"  # type: ignore[operator]
            cells = [_cell(value, side) for value, side in zip(seconds, sides, strict=True)]
            cells += [ratio, *(f"{value:.0f}" if value is not None else "" for value in memory)]
            versions = ", ".join(dict.fromkeys(row["version"] for side in sides for row in side))
            lines.append(f"| {model} | {' | '.join(cells)} | {min(map(len, sides))} | {versions} |")
        lines.append("")
    return "\n".join(lines)


def peer_version(job: str) -> str:
    """The release of the libraries that a job's peer uses."""
    if job in PEERS:
        return version(PEERS[job])
    return f"torch {metadata.version('torch')}, onnxruntime {metadata.version('onnxruntime')}"


def _newest(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["version"] == rows[-1]["version"]]


def _median(rows: list[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return median(values) if values else None


def _cell(value: float | None, rows: list[Row]) -> str:
    if value is not None:
        return f"{value:.1f}"
    return rows[-1].get("reason", "not measured").replace("|", "/") if rows else "not measured"


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=(*MODELS, *SIZES), choices=(*MODELS, *SIZES))
    parser.add_argument("--jobs", nargs="*", default=tuple(JOBS), choices=tuple(JOBS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="write the page from the rows, without measuring")
    parser.add_argument("--packages", default="", help="a folder with the peers' packages: pip install --target")
    arguments = parser.parse_args()
    if arguments.packages:
        sys.path.append(arguments.packages)  # their versions are read from there
    for run in range(0 if arguments.page else arguments.runs):
        for job in arguments.jobs:
            for model in (name for name in arguments.models if name in models_of(job)):
                for side in SIDES:
                    is_ours = side == "ours"
                    now = version(side) if is_ours else peer_version(job)
                    place = {"model": model, "job": job, "side": side, "version": now}
                    done = [row for row in load(ROWS) if all(row[key] == value for key, value in place.items())]
                    if len(done) > run:
                        continue
                    row = {**place, **measure(model, job, side, arguments.packages)}
                    append(row, ROWS)
                    print(f"{job} {model} {side}: {row['cpu_s']} CPU s {row.get('reason', '')}", flush=True)
    PAGE.write_text(page(load(ROWS)))
    print(PAGE)


if __name__ == "__main__":
    main()
