"""Which layers really run on integers: a program's layers matched with the kernels of a runtime."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torchslim.artifact.assembled import AnyDeployed, DeployedParts
from torchslim.core.parts import inside, under
from torchslim.core.program_names import split_name
from torchslim.core.reason import Reason
from torchslim.core.step import LayerRecord
from torchslim.graph.layers import Layer
from torchslim.runtimes import Deployed, Kernel, kernels
from torchslim.runtimes.kernel_listing import SAME_NUMBERS

CONVERSIONS = ("quantizelinear", "dequantizelinear", "quantize_per_tensor", "dequantize_per_tensor", "reorder")
# kernels that compute a layer: those that move, add or pool on integers beside it say nothing about the layer
MULTIPLIES = re.compile(r"conv(?!ert)|gemm|matmul|linear|lstm|gru|attention|fullyconnected|innerproduct|mm\b", re.I)
OTHERS = re.compile(r"QLinear(?!Conv|MatMul)")  # QLinearAdd and the like
IN_FLOAT = "computing in float"  # end of a reason where only the weights are integers
LEAST_SHARE = 0.5  # of the multiply-accumulates must run on integers for int8 to pay


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKernel(Layer):
    """A layer, its kernel, and whether the kernel computes on integers; if not, why not."""

    kernel: str
    integer: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """All layers of a deployed model, the share of multiply-accumulates on integers, and warnings."""

    runtime: str
    layers: Sequence[LayerKernel]
    integer_share: float
    warnings: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict."""
        return asdict(self)

    def table(self) -> str:
        """A text table with a line for each layer, those in float first."""
        total = sum(layer.macs for layer in self.layers) or 1
        lines = [
            f"{100 * self.integer_share:.1f} % of the multiply-accumulates run on integers on {self.runtime}",
            "",
            f"{'layer':<40} {'operation':<14} {'MACs':>6}  {'bits':>4}  {'kernel':<28} computes in",
        ]
        for layer in sorted(self.layers, key=lambda layer: layer.integer):
            bits = layer.weight_bits if layer.weight_bits is not None else "-"
            where = "integers" if layer.integer else f"float: {layer.why}"
            lines.append(
                f"{layer.layer[-40:]:<40} {layer.operation[:14]:<14} {100 * layer.macs / total:>5.1f}%  {bits:>4}  "
                f"{layer.kernel[:28]:<28} {where}"
            )
        return "\n".join(
            [*lines, *("", "warnings:") * bool(self.warnings), *(f"  {warning}" for warning in self.warnings)]
        )


def lowered(deployed: AnyDeployed, records: Iterable[LayerRecord] = ()) -> Lowered:
    """Match the layers of a deployed model, or of its parts, with the kernels that execute them.

    Args:
        deployed: a model on any runtime.
        records: of the quantization, with the reasons for layers in float; for layers that verification left in float,
            the records of the deployed model take precedence.
    """
    if isinstance(deployed, DeployedParts):
        return lowered_parts(deployed.parts, list(records))
    working = kernels(deployed)
    returned = [
        record
        for record in deployed.records
        if record.action == "refused" and Reason.BACK_IN_FLOAT.given_in(record.reason)
    ]
    reasons = {record.layer: record.reason for record in (*records, *returned) if record.reason}
    spec_layers = [Layer(**entry) for entry in deployed.spec.layers]
    layers = [
        _described(layer, candidates, reasons, deployed.runtime)
        for layer, candidates in zip(spec_layers, share_kernels(spec_layers, working), strict=True)
    ]
    total = sum(layer.macs for layer in layers)
    share = sum(layer.macs for layer in layers if layer.integer) / total if total else 0.0
    warnings = _warnings(deployed, layers, working, share, reasons) if deployed.quantized else []
    return Lowered(runtime=deployed.runtime, layers=layers, integer_share=share, warnings=warnings)


def lowered_parts(parts: Mapping[str, Deployed], records: Sequence[LayerRecord] = ()) -> Lowered:
    """`lowered` for deployed parts by their path, with the names of the whole model."""
    layers: list[LayerKernel] = []
    warnings: list[str] = []
    for path, piece in parts.items():
        own = [replace(record, layer=name) for record in records if (name := inside(path, record.layer)) is not None]
        found = lowered(piece, own)
        if split_name(path)[1] == 1:  # further programs of a part have the same layers
            layers += [replace(layer, layer=under(path, layer.layer)) for layer in found.layers]
        warnings += [f"{path}: {warning}" if path else warning for warning in found.warnings]
    total = sum(layer.macs for layer in layers)
    share = sum(layer.macs for layer in layers if layer.integer) / total if total else 0.0
    runtime = next(iter(parts.values())).runtime
    return Lowered(runtime=runtime, layers=layers, integer_share=share, warnings=warnings)


def executed(records: Iterable[Mapping[str, Any]], found: Lowered) -> list[dict[str, Any]]:
    """The records as plain dicts, with the kernels that compute their layers.

    A record of rounded activations gets a reason if the runtime computes the layer in float all the same. If a module
    has several operations, the one in float counts.
    """
    layers = {kernel.layer: kernel for kernel in sorted(found.layers, key=lambda kernel: not kernel.integer)}
    merged = []
    for record in records:
        row, layer = dict(record), layers.get(record["layer"])
        if layer is not None:
            row |= {"kernel": layer.kernel, "integer": layer.integer}
            if not layer.integer and row.get("activation_bits") is not None and not row.get("reason"):
                row["reason"] = layer.why
        merged.append(row)
    return merged


def share_kernels(layers: Sequence[Layer], executed: Iterable[Kernel]) -> list[Sequence[Kernel]]:
    """Kernels that may compute each layer: its own if the module has as many as its layers take, else all of them."""
    by_path: dict[str, list[Kernel]] = {}
    for kernel in executed:
        for path in kernel.layers or (kernel.node.rpartition("/")[0],):
            by_path.setdefault(path, []).append(kernel)
    shares: list[Sequence[Kernel]] = [()] * len(layers)
    for path in {layer.layer for layer in layers}:
        places = [index for index, layer in enumerate(layers) if layer.layer == path]
        of_path = [
            kernel for kernel in by_path.get(path, ()) if not _converts(kernel) and kernel.type not in SAME_NUMBERS
        ]
        working = [kernel for kernel in of_path if MULTIPLIES.search(kernel.type) and not OTHERS.match(kernel.type)]
        counts = [2 if layers[index].operation == "scaled_dot_product_attention" else 1 for index in places]
        alone, rest = len(working) == sum(counts), iter(working)
        for index, count in zip(places, counts, strict=True):
            shares[index] = [next(rest) for _ in range(count)] if alone else working or of_path
    return shares


def _described(layer: Layer, candidates: Sequence[Kernel], reasons: Mapping[str, str], runtime: str) -> LayerKernel:
    # if nothing of the layer was made integers, an integer kernel of its module belongs to another layer
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
    warnings = []
    floats = [layer.layer for layer in layers if not layer.integer and reasons.get(layer.layer, "").endswith(IN_FLOAT)]
    if floats and share == 0:
        warnings.append(
            f"no layer runs on integers on {deployed.runtime} ({floats[0]}: {reasons[floats[0]]}): smaller, not faster"
        )
    if deployed.runtime == "eager" and any(layer.integer and "lstm" in layer.operation for layer in layers):
        warnings.append(
            "PyTorch's integer LSTM is slower than its float one on some processors: measure it, or deploy on another "
            "runtime"
        )
    silent = [layer for layer in layers if layer.asks_for_integers and not layer.integer]
    if silent and deployed.runtime != "eager":
        names = ", ".join(layer.layer for layer in silent[:5]) + (" ..." if len(silent) > 5 else "")
        warnings.append(
            f"{len(silent)} layers are quantized but computed in float on {deployed.runtime} ({names}); quantize for "
            "this runtime, or leave them in float"
        )
    if deployed.runtime == "eager" and any(layer.activations == "static" for layer in layers):
        warnings.append(
            "PyTorch computes static int8 on dequantized floats: smaller, but slower; deploy on another runtime"
        )
    asked = any(layer.asks_for_integers for layer in layers)
    if asked and deployed.runtime != "eager" and share < LEAST_SHARE:
        warnings.append(
            f"only {100 * share:.0f} % of the multiply-accumulates run on integers; int8 will hardly be faster here"
        )
    integer = sum(kernel.integer for kernel in executed)
    conversions = sum(_converts(kernel) for kernel in executed)
    if asked and integer and conversions > integer:
        warnings.append(
            f"numbers are converted {conversions} times around {integer} integer kernels: for small layers "
            "that costs more than int8 saves; measure it, or take another runtime"
        )
    return warnings


def _converts(kernel: Kernel) -> bool:
    return kernel.type.lower().startswith(CONVERSIONS)
