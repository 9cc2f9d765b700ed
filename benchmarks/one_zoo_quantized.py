"""One model of the zoo quantized by one side, in a process of its own: used by benchmarks.coverage_quantize."""

from __future__ import annotations

import time
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import torchslim as ts
from benchmarks.one_model import timed
from benchmarks.outputs import main_outputs, settle_norms
from benchmarks.zoo import VOCABULARY, Entry, Inputs
from torchslim.artifact.integer_coverage import LayerKernel, lowered
from torchslim.core.batches import call
from torchslim.core.isolation import quiet
from torchslim.core.step import LayerRecord
from torchslim.errors import ExportError, TorchslimError
from torchslim.quantize import convert, prepare, sqnr
from torchslim.runtimes import kernels
from torchslim.runtimes.openvino import no_telemetry

SAMPLES = 8  # to calibrate on
BAR_DB = 20.0
NOISE_DB = 40.0  # what a rounding to 8 bits leaves, about
SCHEME, RUNTIME = "int8", "onnxruntime"
PHONE, PHONE_FLOAT = "executorch", "executorch-float"
STEPS = ("exports", "quantizes", "runs")
EMPTY = {
    "exports": None, "quantizes": None, "runs": None, "sqnr_db": None, "integer_share": None, "silent": [],
    "left": [], "kind": None, "counts": False, "reason": "", "worst_db": None, "worst": "", "rolled_back": [],
}  # fmt: skip


def measure(entry: Entry, side: str, seconds: float) -> dict[str, Any]:
    """The row of one model and side.

    Args:
        entry: of the zoo.
        side: "ours", "torchao" or "nncf"; "settled" is ours, once batch norms have the statistics of the calibration
            inputs; `PHONE` is ours for ExecuTorch, and `PHONE_FLOAT` the float model there.
        seconds: how long all of it may take, but for the building.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, inputs = entry.build()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(zlib.crc32(f"{entry.name} calibration".encode()))
        batches = [another(inputs) for _ in range(SAMPLES)]
    if side == "settled":
        settle_norms(model, batches)
    for module in model.modules():  # a decoder inside has a configuration of its own
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False  # type: ignore[union-attr] # as for any export: a cache is no tensor
    with torch.no_grad():
        expected = call(model, inputs)
    row: dict[str, Any] = dict(EMPTY)
    work = {
        "ours": ours, "torchao": torchao, "nncf": nncf, "settled": ours,
        PHONE: partial(ours, runtime="executorch"), PHONE_FLOAT: in_float,
    }[side]  # fmt: skip
    _, found = timed(lambda: work(model, inputs, batches, expected, row), seconds)
    row |= {key: found[key] for key in ("seconds", "peak_bytes")}
    row["reason"] = found["reason"] or row["reason"]
    if row["sqnr_db"] is not None and row["sqnr_db"] < BAR_DB:
        row["noisy_db"] = noisy(model, inputs, expected)
    first = next((step for step in STEPS if row[step] is None), None)
    if row["reason"] and first:
        row[first] = False
    return row | {"counts": counts(row)}


def counts(row: dict[str, Any]) -> bool:
    """Is it exported, quantized, run, and near the float model?"""
    return all(row.get(step) for step in STEPS) and (row.get("sqnr_db") or 0.0) >= BAR_DB


def another(inputs: Any) -> Any:
    """Inputs drawn as the example was: normal, from 0 to 1, or tokens; what is all ones stays."""

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or bool((leaf == 1).all()):
            return leaf
        if not leaf.is_floating_point():
            return torch.randint_like(leaf, 5, VOCABULARY)
        return torch.randn_like(leaf) if bool((leaf < 0).any()) else torch.rand_like(leaf)

    return tree_map(draw, inputs)


def ours(
    model: nn.Module,
    inputs: Inputs,
    batches: Sequence[Inputs],
    expected: Any,
    row: dict[str, Any],
    runtime: str = RUNTIME,
) -> None:
    """Static int8 for ONNX Runtime, or another runtime; the row is filled as far as it comes."""
    try:
        prepared = prepare(model, inputs, runtime=runtime, scheme=SCHEME)
    except ExportError:
        raise
    except TorchslimError:
        row["exports"] = True
        raise
    row["exports"] = True
    prepared.calibrate(batches)
    quantized = convert(prepared)
    row["quantizes"] = True
    deployed = ts.deploy(quantized, inputs, runtime=runtime, threads=1)
    row |= verified(deployed.made_from or quantized)
    answer = call(deployed, inputs)
    row["runs"] = True
    found = lowered(deployed, prepared.records)
    row["integer_share"] = found.integer_share
    row["kind"] = kind(found.layers)
    row |= left_in_float(found.layers, prepared.records)
    row |= portable(deployed)
    compare(expected, answer, row)


def in_float(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], expected: Any, row: dict[str, Any]) -> None:
    """The float model on ExecuTorch: what its lowering takes, whatever the quantization does."""
    deployed = ts.deploy(model, inputs, runtime="executorch", threads=1)
    row["exports"] = row["quantizes"] = True
    answer = call(deployed, inputs)
    row["runs"] = True
    row |= portable(deployed)
    compare(expected, answer, row)


def portable(deployed: Any) -> dict[str, Any]:
    """Operations that XNNPACK leaves to portable kernels, with their reasons; nothing for other runtimes."""
    if deployed.runtime != "executorch":
        return {}
    found = Counter(
        f"{kernel.type.removeprefix('portable: ')}: {kernel.why}"
        for kernel in kernels(deployed)
        if kernel.type.startswith("portable")
    )
    return {"portable": [[reason, count] for reason, count in found.most_common()]}


def verified(quantized: nn.Module) -> dict[str, Any]:
    """The worst channel of any output, on samples that were calibrated on, and what verification left in float."""
    evidence = quantized.evidence
    if evidence is None:
        return {}
    worst = evidence.worst
    return {
        "worst_db": None if worst is None else round(min(worst.decibels, 200.0), 2),
        "worst": "" if worst is None else worst.place.named(evidence.names),
        "rolled_back": list(quantized.notes),
    }


def kind(layers: Sequence[LayerKernel]) -> str:
    """A network of convolutions, where they make more than half of the work; else a transformer, say."""
    work = sum(layer.macs for layer in layers)
    return "convolutions" if 2 * sum(layer.macs for layer in layers if "conv" in layer.operation) > work else "products"


def left_in_float(layers: Sequence[LayerKernel], records: Sequence[LayerRecord]) -> dict[str, Any]:
    """Why layers are in float, with their share of the work, and the names of those that no reason is recorded of."""
    total = sum(each.macs for each in layers) or 1
    told = {record.layer for record in records if record.reason}
    reasons: Counter[str] = Counter()
    silent = []
    for layer in layers:
        if not layer.integer:
            reasons[f"{layer.operation}: {layer.why}"] += layer.macs
            if layer.layer not in told:
                silent.append(f"{layer.layer} ({layer.operation})")
    left = [[reason, macs / total] for reason, macs in reasons.most_common()]
    return {"left": left, "silent": sorted(set(silent))[:20], "layers": len(layers)}


def compare(expected: Any, answer: Any, row: dict[str, Any]) -> None:
    """The agreement with the float model, or why there is none."""
    want, got = main_outputs(expected), main_outputs(answer)
    if [each.shape for each in want] != [each.shape for each in got]:
        row["reason"] = f"outputs {_shapes(got)} instead of {_shapes(want)}"
        return
    decibels = sqnr(want, got)
    if any(bool(each.isnan().any()) for each in got):
        row["reason"] = "outputs that are not numbers"
        return
    row["sqnr_db"] = round(min(decibels, 200.0), 2)
    if decibels < BAR_DB:
        row["reason"] = f"only {decibels:.1f} dB from the float model"


def noisy(model: nn.Module, inputs: Inputs, expected: Any) -> float | None:
    """Decibels that the float model's own answer keeps where its inputs have noise 40 dB below them.

    None where no input is a floating-point tensor, or the outputs are of other shapes.
    """
    floats = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not floats:
        return None

    def add(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf + torch.randn_like(leaf) * leaf.square().mean().sqrt() * 10 ** (-NOISE_DB / 20)

    torch.manual_seed(0)
    with torch.no_grad():
        want, got = main_outputs(expected), main_outputs(call(model, tree_map(add, inputs)))
    same = [each.shape for each in want] == [each.shape for each in got]
    return round(min(sqnr(want, got), 200.0), 2) if same else None


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join("x".join(map(str, tensor.shape)) or "()" for tensor in tensors[:6])


# the peers ------------------------------------------------------------------------------------------------------------


def torchao(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], expected: Any, row: dict[str, Any]) -> None:
    """torchao's quantizer for x86, as its documentation uses it; the converted graph is run."""
    with quiet():
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        with torch.no_grad():
            program = torch.export.export(model, tuple(args), dict(kwargs)).module()
        row["exports"] = True
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(program, quantizer)
        with torch.no_grad():
            for batch in batches:
                call(prepared, batch)
            quantized = convert_pt2e(prepared)
            row["quantizes"] = True
            answer = call(quantized, inputs)
        row["runs"] = True
    compare(expected, answer, row)


def nncf(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], expected: Any, row: dict[str, Any]) -> None:
    """nncf on the model as OpenVINO converts it, with its preset for transformers where the model is one."""
    with quiet(), no_telemetry():
        import nncf as library
        import openvino
    with quiet():
        start = time.perf_counter()
        converted = openvino.convert_model(model, example_input=inputs)
        row["exports"] = True
        row["converted_seconds"] = time.perf_counter() - start
        data = library.Dataset([batch if isinstance(batch, dict) else list(batch) for batch in batches], _arrays)
        attends = any(isinstance(module, nn.MultiheadAttention) for module in model.modules()) or any(
            "attention" in type(module).__name__.lower() for module in model.modules()
        )
        options = {"model_type": library.ModelType.TRANSFORMER} if attends else {}
        quantized = library.quantize(converted, data, subset_size=len(batches), **options)
        row["quantizes"] = True
        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.compile_model(quantized, "CPU", settings)
        answer = [torch.from_numpy(value) for value in compiled(_arrays(inputs)).values()]
        row["runs"] = True
    want = [leaf for leaf in main_outputs(expected) if leaf.is_floating_point()]
    floats = [each for each in answer if each.is_floating_point()]
    compare(want, floats[: len(want)], row)


def _arrays(inputs: Any) -> Any:
    return tree_map(lambda leaf: leaf.numpy() if isinstance(leaf, Tensor) else leaf, inputs)
