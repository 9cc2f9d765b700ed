"""What really runs on integers: the layers of a program beside the kernels that a runtime made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchslim.core.reason import Reason
from torchslim.core.step import LayerRecord
from torchslim.graph.layers import Layer
from torchslim.runtimes import Deployed, Kernel, kernels
from torchslim.runtimes.kernel_listing import SAME_NUMBERS

CONVERSIONS = ("quantizelinear", "dequantizelinear", "quantize_per_tensor", "dequantize_per_tensor", "reorder")
# what computes a layer: a kernel that moves, adds or pools on integers beside it says nothing about the layer
MULTIPLIES = re.compile(r"conv(?!ert)|gemm|matmul|linear|lstm|gru|attention|fullyconnected|innerproduct|mm\b", re.I)
OTHERS = re.compile(r"QLinear(?!Conv|MatMul)")  # QLinearAdd and the like
IN_FLOAT = "computing in float"  # how a reason ends where only the weights are integers
LEAST_SHARE = 0.5  # of the multiply-accumulates on integers before int8 can pay


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKernel(Layer):
    """A layer, the kernel that computes it, and whether that works on integers; if not, why not."""

    kernel: str
    integer: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """All layers of a deployed model, the share of multiply-accumulates on integers, and what to be warned of."""

    runtime: str
    layers: Sequence[LayerKernel]
    integer_share: float
    warnings: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)

    def table(self) -> str:
        """For people: a line for each layer, those in float first."""
        total = sum(each.macs for each in self.layers) or 1
        lines = [
            f"{100 * self.integer_share:.1f} % of the multiply-accumulates run on integers on {self.runtime}",
            "",
            f"{'layer':<40} {'operation':<14} {'MACs':>6}  {'bits':>4}  {'kernel':<28} computes in",
        ]
        for each in sorted(self.layers, key=lambda layer: layer.integer):
            bits = each.weight_bits if each.weight_bits is not None else "-"
            where = "integers" if each.integer else f"float: {each.why}"
            lines.append(
                f"{each.layer[-40:]:<40} {each.operation[:14]:<14} {100 * each.macs / total:>5.1f}%  {bits:>4}  "
                f"{each.kernel[:28]:<28} {where}"
            )
        return "\n".join(
            [*lines, *("", "warnings:") * bool(self.warnings), *(f"  {warning}" for warning in self.warnings)]
        )


def lowered(deployed: Deployed, records: Iterable[LayerRecord] = ()) -> Lowered:
    """What a deployed model really executes, layer by layer.

    Args:
        deployed: of any runtime.
        records: of the quantization, whose reasons are told where a layer is in float; of the
            layers that verification left in float, those of the deployed model come first.
    """
    working = kernels(deployed)
    returned = [
        each for each in deployed.records if each.action == "refused" and Reason.BACK_IN_FLOAT.given_in(each.reason)
    ]
    reasons = {record.layer: record.reason for record in (*records, *returned) if record.reason}
    given = [Layer(**each) for each in deployed.spec.layers]
    layers = [
        _described(layer, candidates, reasons, deployed.runtime)
        for layer, candidates in zip(given, share_kernels(given, working), strict=True)
    ]
    total = sum(each.macs for each in layers)
    share = sum(each.macs for each in layers if each.integer) / total if total else 0.0
    warnings = _warnings(deployed, layers, working, share, reasons) if deployed.quantized else []
    return Lowered(runtime=deployed.runtime, layers=layers, integer_share=share, warnings=warnings)


def executed(records: Iterable[Mapping[str, Any]], found: Lowered) -> list[dict[str, Any]]:
    """Records of layers, as plain dicts, with the kernels that compute them.

    A record of rounded activations gets a reason where the runtime computes the layer in float all the same. Of a
    module with several operations, the one in float counts.
    """
    layers = {kernel.layer: kernel for kernel in sorted(found.layers, key=lambda kernel: not kernel.integer)}
    merged = []
    for record in records:
        told, layer = dict(record), layers.get(record["layer"])
        if layer is not None:
            told |= {"kernel": layer.kernel, "integer": layer.integer}
            if not layer.integer and told.get("activation_bits") is not None and not told.get("reason"):
                told["reason"] = layer.why
        merged.append(told)
    return merged


def share_kernels(layers: Sequence[Layer], executed: Iterable[Kernel]) -> list[Sequence[Kernel]]:
    """For each layer the kernels that may compute it: its own, where a module has as many as its layers take."""
    by_path: dict[str, list[Kernel]] = {}
    for kernel in executed:
        for path in kernel.layers or (kernel.node.rpartition("/")[0],):
            by_path.setdefault(path, []).append(kernel)
    found: list[Sequence[Kernel]] = [()] * len(layers)
    for path in {layer.layer for layer in layers}:
        places = [index for index, layer in enumerate(layers) if layer.layer == path]
        of_path = [each for each in by_path.get(path, ()) if not _converts(each) and each.type not in SAME_NUMBERS]
        working = [each for each in of_path if MULTIPLIES.search(each.type) and not OTHERS.match(each.type)]
        counts = [2 if layers[index].operation == "scaled_dot_product_attention" else 1 for index in places]
        alone, rest = len(working) == sum(counts), iter(working)
        for index, count in zip(places, counts, strict=True):
            found[index] = [next(rest) for _ in range(count)] if alone else working or of_path
    return found


def _described(layer: Layer, candidates: Sequence[Kernel], reasons: Mapping[str, str], runtime: str) -> LayerKernel:
    # where nothing of it was made integers, an integer kernel of the same module is another layer's
    meant = layer.asks_for_integers or layer.weight_bits in (4, 8)
    integer = [candidate for candidate in candidates if candidate.integer] if meant else []
    works = integer or candidates
    why = ""
    if not integer:
        if not layer.asks_for_integers and layer.weight_bits in (4, 8):
            why = "only its weights are integers"
        elif not layer.asks_for_integers and layer.weight_bits is None:
            why = "a product of two activations, in float"
        elif not layer.asks_for_integers:
            why = "not quantized"
        else:
            why = f"{runtime} has no integer kernel for it here"
        why = reasons.get(layer.layer, why)
    return LayerKernel(**layer.to_dict(), kernel=works[0].type if works else "not seen", integer=bool(integer), why=why)


def _warnings(
    deployed: Deployed,
    layers: Sequence[LayerKernel],
    executed: Sequence[Kernel],
    share: float,
    reasons: Mapping[str, str],
) -> list[str]:
    found = []
    kept = [layer.layer for layer in layers if not layer.integer and reasons.get(layer.layer, "").endswith(IN_FLOAT)]
    if kept and share == 0:
        found.append(
            f"no layer runs on integers on {deployed.runtime} ({kept[0]}: {reasons[kept[0]]}): smaller, not faster"
        )
    if deployed.runtime == "eager" and any(layer.integer and "lstm" in layer.operation for layer in layers):
        found.append(
            "PyTorch's integer LSTM is slower than its float one on some processors: measure it, or deploy on another "
            "runtime"
        )
    silent = [layer for layer in layers if layer.asks_for_integers and not layer.integer]
    if silent and deployed.runtime != "eager":
        names = ", ".join(each.layer for each in silent[:5]) + (" ..." if len(silent) > 5 else "")
        found.append(
            f"{len(silent)} layers are quantized but computed in float on {deployed.runtime} ({names}); quantize for "
            "this runtime, or leave them in float"
        )
    if deployed.runtime == "eager" and any(layer.activations == "static" for layer in layers):
        found.append(
            "PyTorch computes static int8 on dequantized floats: smaller, but slower; deploy on another runtime"
        )
    asked = any(layer.asks_for_integers for layer in layers)
    if asked and deployed.runtime != "eager" and share < LEAST_SHARE:
        found.append(
            f"only {100 * share:.0f} % of the multiply-accumulates run on integers; int8 will hardly be faster here"
        )
    integer = sum(each.integer for each in executed)
    conversions = sum(_converts(each) for each in executed)
    if asked and integer and conversions > integer:
        found.append(
            f"numbers are converted {conversions} times around {integer} integer kernels: for small layers "
            "that costs more than int8 saves; measure it, or take another runtime"
        )
    return found


def _converts(kernel: Kernel) -> bool:
    return kernel.type.lower().startswith(CONVERSIONS)
