"""A run record by hand: the content of `run.json` without a run."""

from __future__ import annotations

from typing import Any


def number(value: float, unit: str, *, spread: float = 0.0, **extra: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"value": value, "unit": unit, "repeats": 60 if spread else 1}
    if spread:
        found |= {"low": value * (1 - spread), "high": value * (1 + spread), "machine": "this"}
    return found | extra


def layer(name: str, action: str, **more: Any) -> dict[str, Any]:
    empty = {"reason": "", "sparsity": None, "weight_bits": None, "activation_bits": None}
    return {"version": 1, "layer": name, "action": action, **empty, **more}


def make_row(
    name: str, kind: str, *, accuracy: float, size: int, latency: float, nonzero: int, metric_unit: str = "%"
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "metric": {"val": number(accuracy + 0.25, metric_unit), "test": number(accuracy, metric_unit)},
        "parameters": number(11_689_512, "count"),
        "nonzero": number(nonzero, "count"),
        "macs": number(1_814_073_344, "MACs per sample"),
        "size_bytes": number(size, "bytes"),
        "seconds": number(12.5, "s", machine="this") if kind == "step" else {"not_measured": "no work was done"},
        "layers": [],
        "warnings": [],
        "history": [],
        "latency_ms": {
            "onnxruntime": number(latency, "ms", spread=0.07),
            "eager": number(latency * 3.1, "ms", spread=0.11),
        },
        "speedup": {},
        "shrink": {},
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Fill in the ratios between rows, as a run does."""
    for index, row in enumerate(rows):
        for key, base in (("over_baseline", rows[0]), ("over_previous", rows[max(index - 1, 0)])):
            fast, slow = (each["latency_ms"]["onnxruntime"]["value"] for each in (row, base))
            ratio = slow / fast
            verdict = "no difference" if abs(ratio - 1) <= 0.1 else "faster" if ratio > 1 else "slower"
            row["speedup"][key] = number(ratio, "x", spread=0.1, verdict=verdict)
            row["shrink"][key] = number(base["size_bytes"]["value"] / row["size_bytes"]["value"], "x")


def make_run(*, metric: str = "accuracy", unit: str = "%") -> dict[str, Any]:
    """Prune, distill, quantize: a step gains nothing and layers are refused."""
    rows = [
        make_row("baseline", "baseline", accuracy=92.4375, size=46_804_351, latency=12.875, nonzero=11_689_000),
        make_row("prune", "step", accuracy=90.0625, size=46_804_351, latency=12.5, nonzero=5_844_756),
        make_row("distill", "step", accuracy=92.125, size=46_804_425, latency=12.625, nonzero=5_844_756),
        make_row("quantize", "step", accuracy=91.9375, size=12_197_585, latency=5.0625, nonzero=5_790_000),
        make_row("artifact", "artifact", accuracy=91.875, size=12_197_585, latency=5.0625, nonzero=5_790_000),
    ]
    for row in rows:
        for entry in row["metric"].values():
            entry["unit"] = unit
    compare(rows)
    rows[1]["layers"] = [
        layer("conv1.weight", "refused", reason="its 3 input channels do not divide into blocks of 4"),
        *(layer(f"layer{i}.conv.weight", "pruned", sparsity=0.125 * i) for i in range(1, 8)),
    ]
    rows[1]["warnings"] = ["not pruned: conv1.weight: its 3 input channels do not divide into blocks of 4"]
    rows[2]["layers"] = [layer("", "trained", reason="best epoch 3")]
    rows[2]["history"] = [
        {"epoch": float(i), "loss_response": 2.0 / i, "loss_label": 0.5 / i, "lr": 0.01 / i, "val": 88.0 + i}
        for i in range(1, 5)
    ]
    rows[3]["layers"] = [
        layer("conv1", "quantized", weight_bits=8, activation_bits=8),
        *(layer(f"layer{i}.conv", "quantized", weight_bits=8, activation_bits=8) for i in range(1, 7)),
        layer("layer7.conv", "refused", reason="its output goes to an operator that has no int8 kernel here"),
    ]
    rows[3]["warnings"] = ["operations without a MAC count: aten.lstm"]
    rows[4]["warnings"] = ["operations without a MAC count: aten.lstm"]
    return {
        "format": 1,
        "torchslim": "0.1.0",
        "recipe": {
            "steps": [
                {"do": "torchslim.prune.step:Prune", "sparsity": 0.5, "criterion": "l1"},
                {
                    "do": "torchslim.distill.step:Distill",
                    "epochs": 4,
                    "response": {"do": "kd", "temperature": 4.0},
                },
                {"do": "torchslim.quantize.step:Quantize", "scheme": "int8", "mode": "ptq"},
            ],
            "target": {"runtime": "onnxruntime", "threads": None},
            "seed": 0,
        },
        "metric": {"name": metric, "unit": unit, "higher_is_better": True},
        "target": {"runtime": "onnxruntime", "threads": None},
        "selected_on": "val",
        "reported_on": "test",
        "batch": 1,
        "machines": {
            "this": {
                "processor": "Made-up 9000",
                "instruction_set": "avx2",
                "cores": 2,
                "threads": 2,
                "memory_gib": 23.5,
                "system": "Linux",
                "python": "3.11.7",
                "versions": {"torchslim": "0.1.0", "torch": "2.14.1"},
            }
        },
        "rows": rows,
    }
