"""What really runs on integers: the layers of a program beside the kernels that a runtime made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchslim.layers import Layer
from torchslim.runtimes import Deployed, Kernel, kernels
from torchslim.steps import LayerRecord

CONVERSIONS = ("quantizelinear", "dequantizelinear", "quantize_per_tensor", "dequantize_per_tensor", "reorder")
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

    def to_json(self) -> dict[str, Any]:
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
        return "\n".join([*lines, *("", "warnings:") * bool(self.warnings), *(f"  {each}" for each in self.warnings)])


def lowered(deployed: Deployed, records: Iterable[LayerRecord] = ()) -> Lowered:
    """What a deployed model really executes, layer by layer.

    Args:
        deployed: of any runtime.
        records: of the quantization, whose reasons are told where a layer is in float.
    """
    executed = kernels(deployed)
    by_layer: dict[str, list[Kernel]] = {}
    for kernel in executed:
        for path in kernel.layers or (kernel.node.rpartition("/")[0],):
            by_layer.setdefault(path, []).append(kernel)
    reasons = {record.layer: record.reason for record in records if record.reason}
    layers = [_described(Layer(**each), by_layer, reasons, deployed.runtime) for each in deployed.spec.layers]
    total = sum(each.macs for each in layers)
    share = sum(each.macs for each in layers if each.integer) / total if total else 0.0
    warnings = _warnings(deployed, layers, executed, share) if deployed.quantized else []
    return Lowered(runtime=deployed.runtime, layers=layers, integer_share=share, warnings=warnings)


def _described(
    layer: Layer, by_layer: Mapping[str, Sequence[Kernel]], reasons: Mapping[str, str], runtime: str
) -> LayerKernel:
    candidates = [each for each in by_layer.get(layer.layer, ()) if not _converts(each)]
    integer = [each for each in candidates if each.integer]
    works = integer or candidates
    why = ""
    if not integer:
        if not layer.asks_for_integers and layer.weight_bits in (4, 8):
            why = "only its weights are integers"
        elif not layer.asks_for_integers:
            why = "not quantized"
        else:
            why = f"{runtime} has no integer kernel for it here"
        why = reasons.get(layer.layer, why)
    return LayerKernel(**layer.to_json(), kernel=works[0].type if works else "not seen", integer=bool(integer), why=why)


def _warnings(deployed: Deployed, layers: Sequence[LayerKernel], executed: Sequence[Kernel], share: float) -> list[str]:
    found = []
    silent = [each for each in layers if each.asks_for_integers and not each.integer]
    if silent and deployed.runtime != "eager":
        names = ", ".join(each.layer for each in silent[:5]) + (" ..." if len(silent) > 5 else "")
        found.append(
            f"{len(silent)} layers are quantized but computed in float on {deployed.runtime} ({names}); quantize for "
            "this runtime, or leave them in float"
        )
    if deployed.runtime == "eager" and any(each.activations == "static" for each in layers):
        found.append(
            "PyTorch computes static int8 on dequantized floats: smaller, but slower; deploy on another runtime"
        )
    asked = any(each.asks_for_integers for each in layers)
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
