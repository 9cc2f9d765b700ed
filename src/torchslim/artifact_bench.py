"""Times the model in this folder on this machine: python bench.py [--threads N] [--rounds N] [--batch N]

In a folder that `torchslim latency` packed, all its programs are timed against the whole model, in turn, and
latency.json is written, which `latency_table` of a recipe takes.

Needs numpy and the runtime of the model (onnxruntime for model.onnx, openvino for model.xml, torch for model.pt2 and
model.aoti.pt2), and nothing else. The last is machine code: run it only if you trust who made it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[list[Any]], list[Any]]
HERE = Path(__file__).resolve().parent
ROUND_SECONDS = 0.002  # a round repeats short calls until it lasts this long
TOGETHER = 8  # programs in memory at a time, besides the whole model


def load_onnx(path: Path, threads: int | None, without: Sequence[str] | None = None) -> Run:
    """A function from a list of arrays to a list of arrays; `without` some optimizers and idle spinning, if given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    if without is not None:  # as torchslim runs it
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without or ())
    )
    names = [each.name for each in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def load_xml(path: Path, threads: int | None) -> Run:
    """The same for OpenVINO; floats stay float32 on processors that have bfloat16 as well."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # else the import reports to its makers
    import openvino

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"ENABLE_CPU_PINNING": False} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    model = openvino.Core().compile_model(path, "CPU", settings)
    request = model.create_infer_request()

    def run(arrays: list[Any]) -> list[Any]:
        found = request.infer(arrays, share_inputs=True)
        return [found[index] for index in range(len(model.outputs))]

    return run


def load_pt2(path: Path, threads: int | None, dtypes: list[str]) -> Run:
    """The same for an exported program or its machine code; both take flat tensors by position."""
    import torch

    with contextlib.suppress(ImportError):
        import torchao.quantization.pt2e  # noqa: F401 - the operations of quantized programs
    if threads:
        torch.set_num_threads(threads)
    if path.name.endswith(".aoti.pt2"):
        program = torch._inductor.aoti_load_package(str(path))
    else:
        program = torch.export.load(path).module()

    def run(arrays: list[Any]) -> list[Any]:
        with torch.no_grad():
            tensors = [
                torch.from_numpy(array).to(getattr(torch, dtype)) for array, dtype in zip(arrays, dtypes, strict=True)
            ]
            outputs = program(*tensors)
        # numpy has no bfloat16
        return [(each.float() if each.dtype == torch.bfloat16 else each).numpy() for each in outputs]

    return run


def difference(found: Any, recorded: Any) -> float:
    """The largest difference of two arrays; NaN equals NaN."""
    found, recorded = np.asarray(found, np.float64), np.asarray(recorded, np.float64)
    same = (found == recorded) | (np.isnan(found) & np.isnan(recorded))
    return float(np.abs(found[~same] - recorded[~same]).max(initial=0.0))


def resized(arrays: list[Any], spec: dict[str, Any], batch: int | None) -> list[Any]:
    """The example inputs with `batch` samples, by default one, where the batch is free."""
    axis, sizes = spec["batch_axis"], spec["sizes"]
    if axis is None:
        return arrays
    index = np.arange(batch or 1)
    return [
        np.take(each, index % each.shape[axis], axis) if len(size) > axis and size[axis] is None else each
        for each, size in zip(arrays, sizes, strict=True)
    ]


def in_turn(runs: dict[str, Run], arrays: list[Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, A B A B ..., so that a machine that drifts drifts for all; short calls are repeated."""
    repeats = {}
    for name, run in runs.items():
        fastest = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            run(arrays)
            fastest = min(fastest, time.perf_counter() - start)
        repeats[name] = max(1, round(ROUND_SECONDS / max(fastest, 1e-7)))
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run(arrays)
            took[name].append((time.perf_counter() - start) / repeats[name])
    return took


def time_pack(pack: dict[str, Any], threads: int | None, rounds: int, batch: int | None) -> dict[str, Any]:
    """The table of a packed folder: by row and width, the time over the whole model's, from paired rounds."""
    about, spec = dict(pack["about"]), pack["spec"]
    about["threads"] = threads or about["threads"]
    example = np.load(HERE / "example.npz", allow_pickle=False)
    arrays = resized([example[name] for name in sorted(example.files)], spec, batch)

    def load(name: str) -> Run:
        path = HERE / name
        if path.suffix == ".onnx":
            return load_onnx(path, about["threads"], pack["disabled_optimizers"])
        return (
            load_xml(path, about["threads"])
            if path.suffix == ".xml"
            else load_pt2(path, about["threads"], spec["dtypes"])
        )

    whole = load(pack["whole"])
    rows: dict[str, dict[str, float]] = {}
    programs = pack["programs"]
    for start in range(0, len(programs), TOGETHER):
        group = programs[start : start + TOGETHER]
        runs = {"whole": whole} | {each["file"]: load(each["file"]) for each in group}
        took = in_turn(runs, arrays, rounds)
        for each in group:
            ratio = float(np.median(np.array(took[each["file"]]) / np.array(took["whole"])))
            rows.setdefault(each["row"], {})[str(each["width"])] = ratio
        print(f"{start + len(group)} of {len(programs)} programs timed", file=sys.stderr)
    return {"format": pack["gives"], "about": about, "machine": processor(), "rows": rows}


def processor() -> str:
    """What this machine calls its processor."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Check the outputs against those recorded when the model was saved, then time it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=None, help="default: what the model was saved with")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch", type=int, default=None, help="samples a call; default 1 where the batch is free")
    arguments = parser.parse_args()
    if any(each is not None and each < 1 for each in (arguments.rounds, arguments.batch, arguments.threads)):
        parser.error("rounds, batch and threads must be at least 1")
    if (HERE / "pack.json").is_file():
        pack = json.loads((HERE / "pack.json").read_text())
        found = time_pack(pack, arguments.threads, arguments.rounds, arguments.batch)
        (HERE / "latency.json").write_text(json.dumps(found, indent=1) + "\n")
        print(HERE / "latency.json")
        return
    manifest = json.loads((HERE / "artifact.json").read_text())
    threads = arguments.threads or manifest["threads"]
    example = np.load(HERE / "example.npz", allow_pickle=False)
    arrays = [example[name] for name in sorted(example.files) if name.startswith("in")]
    expected = [example[name] for name in sorted(example.files) if name.startswith("out")]
    spec = manifest["spec"]
    if "model.onnx" in manifest["files"]:
        run = load_onnx(HERE / "model.onnx", threads)
    elif "model.xml" in manifest["files"]:
        run = load_xml(HERE / "model.xml", threads)
    else:
        name = "model.aoti.pt2" if "model.aoti.pt2" in manifest["files"] else "model.pt2"
        run = load_pt2(HERE / name, threads, spec["dtypes"])
    worst = max(difference(*pair) for pair in zip(run(arrays), expected, strict=True))
    arrays = resized(arrays, spec, arguments.batch)
    for _ in range(20):
        run(arrays)
    milliseconds = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        run(arrays)
        milliseconds.append((time.perf_counter() - start) * 1e3)
    p10, median, p90 = np.percentile(milliseconds, [10, 50, 90])
    print(
        json.dumps(
            {
                "latency_ms": {"median": median, "p10": p10, "p90": p90, "rounds": arguments.rounds},
                "threads": threads,
                "inputs": [list(each.shape) for each in arrays],
                "largest_difference_to_recorded_outputs": worst,
            }
        )
    )


if __name__ == "__main__":
    main()
