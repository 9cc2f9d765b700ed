"""How many models of the zoo can be quantized, beside torchao and nncf: python -m benchmarks.coverage_quantize

Every model and side runs in a process of its own with a time limit. Rows are appended to
benchmarks/coverage_quantize.jsonl, so a killed benchmark goes on where it stopped; benchmarks/coverage_quantize.md is
written from them.
"""

from __future__ import annotations

from typing import Any

from benchmarks.coverage import BENCHMARK as PRUNING
from benchmarks.one_zoo_quantized import EMPTY, PHONE, PHONE_FLOAT
from benchmarks.quantize_page import BARS, SETTLED, group, whole_page, why
from benchmarks.rows import load
from benchmarks.runner import Benchmark, latest, main
from benchmarks.zoo import names

# what loads for longer than most models take
LIBRARIES = (
    "onnx", "onnxscript", "onnxruntime", "timm", "torchvision", "torchao.quantization.pt2e.quantize_pt2e",
    "torch.onnx._internal.exporter._core", "transformers.models.bert.modeling_bert", "torchslim.quantize.quantizer",
)  # fmt: skip


def _smallest_first() -> Any:
    """Groups with a bar first, by the work that the pruning benchmark counted: a run cut short has seen the most."""
    work = {name: row.get("macs_before") for (name, _), row in latest(load(PRUNING.rows)).items()}
    return lambda name: (group(name) not in BARS, work.get(name) or float("inf"))


BENCHMARK = Benchmark(
    module="benchmarks.coverage_quantize",
    measure="benchmarks.one_zoo_quantized:measure",
    sides=("ours", "torchao", "nncf", SETTLED, PHONE, PHONE_FLOAT),
    time_limit=120.0,
    grace=60.0,
    empty=EMPTY,
    page=whole_page(names),
    why=why,
    order=_smallest_first(),
    preload=("benchmarks.one_zoo_quantized", *LIBRARIES),
)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
