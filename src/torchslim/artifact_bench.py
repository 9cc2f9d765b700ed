"""Times the model in this folder on this machine: python bench.py [--threads N] [--rounds N] [--batch N]

Needs numpy and the runtime of the model (onnxruntime for model.onnx, openvino for model.xml, torch for model.pt2 and
model.aoti.pt2), and nothing else. The last is machine code: run it only if you trust who made it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[list[Any]], list[Any]]
HERE = Path(__file__).resolve().parent


def load_onnx(path: Path, threads: int | None) -> Run:
    """A function from a list of arrays to a list of arrays."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
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


def main() -> None:
    """Check the outputs against those recorded when the model was saved, then time it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=None, help="default: what the model was saved with")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch", type=int, default=None, help="samples a call; default 1 where the batch is free")
    arguments = parser.parse_args()
    if any(each is not None and each < 1 for each in (arguments.rounds, arguments.batch, arguments.threads)):
        parser.error("rounds, batch and threads must be at least 1")
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
    axis, sizes = spec["batch_axis"], spec["sizes"]
    if axis is not None:
        index = np.arange(arguments.batch or 1)
        arrays = [
            np.take(each, index % each.shape[axis], axis) if len(size) > axis and size[axis] is None else each
            for each, size in zip(arrays, sizes, strict=True)
        ]
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
