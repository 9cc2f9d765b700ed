"""Changes to weights and biases before quantization: equalization, smoothing and bias correction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from torchslim.graph.export import layer_of
from torchslim.quantize.aten_ops import (
    DROPOUTS,
    Weighted,
    add_tensor,
    along,
    argument,
    aten,
    behind,
    set_tensor,
    shape_of,
    tensor_of,
    weighted,
)

# f(s x) = s f(x) for every channel and s > 0
HOMOGENEOUS = (
    *DROPOUTS,
    aten.relu.default,
    aten.relu_.default,
    aten.leaky_relu.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
)
SMALLEST = 1e-8


def watch(model: GraphModule, nodes: Iterable[Node], see: Callable[[Node, Tensor], None], runs: Iterable[Any]) -> None:
    """Run the graph on flat inputs and call `see` with the values of some nodes, without storing them."""
    watched = set(nodes)
    if not watched:
        return

    class Watching(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n in watched:
                see(n, value)
            return value

    with torch.no_grad():
        for leaves in runs:
            Watching(model).run(*leaves)


# cross-layer equalisation ---------------------------------------------------------------------------------------------


def equalize(model: GraphModule, iterations: int = 10) -> list[tuple[str, str]]:
    """Even out the ranges of channels between layers that follow each other; the model's function stays the same.

    Between two layers with weights W1, W2 and a piecewise linear activation, channel i is divided by
    s_i = sqrt(r1_i r2_i) / r2_i in W1 (and its bias) and multiplied by s_i in W2; r are the largest magnitudes.
    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
    arXiv:1906.04721, eq. 11.

    Returns the paths of the pairs of layers.
    """
    pairs = [pair for node in model.graph.nodes if (pair := _pair(model, node)) is not None]
    for first, second in pairs:
        for node in (first, second):
            for stored in _stored_arguments(node):
                set_tensor(model, stored, tensor_of(model, stored).detach().clone())
    for _ in range(iterations):
        change = 0.0
        for first, second in pairs:
            change = max(change, _equalize_pair(model, first, second))
        if change < 1e-3:
            break
    model.recompile()
    return [(layer_of(first), layer_of(second)) for first, second in pairs]


def _pair(model: GraphModule, second: Node) -> tuple[Node, Node] | None:
    """The layer before `second`, and `second`, where nothing else reads the values between them; else None."""
    layer = weighted(second)
    source = argument(second, layer.source) if layer else None
    if layer is None or source is None or not _own_weight(second, layer):
        return None
    while source.target in HOMOGENEOUS and len(source.users) == 1:
        before = argument(source, 0)
        if before is None:
            return None
        source = before
    first = weighted(source)
    if first is None or len(source.users) != 1 or not _own_weight(source, first):
        return None
    if first.kind != layer.kind or "transpose" in first.kind:  # channels must lie on the same axis
        return None
    outputs = shape_of(_weight(source))[first.axis]
    weight = shape_of(_weight(second))
    inputs = weight[1 - layer.axis] if layer.kind == "linear" else weight[1]
    if inputs == outputs or (inputs == 1 and weight[0] == outputs):
        return source, second
    return None


def _equalize_pair(model: GraphModule, first: Node, second: Node) -> float:
    """Equalize a pair of layers once; returns the largest relative change."""
    op1, op2 = weighted(first), weighted(second)
    assert op1 is not None
    assert op2 is not None
    w1, w2 = tensor_of(model, _weight(first)), tensor_of(model, _weight(second))
    depthwise = op2.kind != "linear" and w2.shape[1] == 1 and w2.shape[0] == w1.shape[op1.axis] and w2.shape[0] > 1
    axis = 0 if depthwise else (1 - op2.axis if op2.kind == "linear" else 1)
    r1, r2 = _largest(w1, op1.axis), _largest(w2, axis)
    scale = torch.where((r1 > SMALLEST) & (r2 > SMALLEST), (r1 * r2).sqrt() / r2.clamp(min=SMALLEST), 1.0)
    w1.div_(along(scale, w1, op1.axis))
    bias = argument(first, op1.bias)
    if bias is not None:
        tensor_of(model, bias).div_(scale)
    w2.mul_(along(scale, w2, axis))
    return float((scale - 1).abs().max())


# smoothing ------------------------------------------------------------------------------------------------------------


def smooth(model: GraphModule, runs: Sequence[Any], strength: float = 0.5) -> list[str]:
    """Move the outliers of activations behind a norm into the weights of the linear layers that read it.

    Channel j of the norm is divided by s_j = max|x_j|^a / max|w_j|^(1 - a), and the weights are multiplied by s_j.
    Source: Xiao et al. 2023, "SmoothQuant", arXiv:2211.10438, eq. 4.

    Args:
        model: an exported graph, changed in place.
        runs: flat inputs of the graph.
        strength: a; 0 leaves the difficulty with the activations, 1 moves all of it to the weights.

    Returns the paths of the norms.
    """
    norms = [normed for node in model.graph.nodes if (normed := _normed(node)) is not None]
    ranges: dict[Node, Tensor] = {}

    def see(node: Node, value: Tensor) -> None:
        largest = value.detach().abs().flatten(0, -2).amax(0)
        ranges[node] = torch.maximum(ranges[node], largest) if node in ranges else largest

    watch(model, [normed.norm for normed in norms], see, runs)
    for normed in norms:
        weights = [(_weight(node), weighted(node)) for node in normed.readers]
        rows = torch.stack([_largest(tensor_of(model, weight), 1 - layer.axis) for weight, layer in weights if layer])
        weight_ranges = rows.amax(0)
        x = ranges[normed.norm].to(weight_ranges.dtype)
        scale = x.clamp(min=SMALLEST).pow(strength) / weight_ranges.clamp(min=SMALLEST).pow(1 - strength)
        scale = torch.where((x > SMALLEST) & (weight_ranges > SMALLEST), scale, 1.0)
        for affine in normed.affine:
            set_tensor(model, affine, tensor_of(model, affine).detach() / scale)
        for weight, layer in weights:
            assert layer is not None
            value = tensor_of(model, weight).detach()
            set_tensor(model, weight, value * along(scale, value, 1 - layer.axis))
    model.recompile()
    return [layer_of(normed.norm) for normed in norms]


@dataclass(frozen=True, slots=True)
class _Normed:
    """A norm, its scale and shift, and the linear layers that are its only readers."""

    norm: Node
    affine: tuple[Node, ...]
    readers: tuple[Node, ...]


def _normed(norm: Node) -> _Normed | None:
    affine: list[Node | None]
    if norm.target is aten.layer_norm.default:
        affine = [argument(norm, 2), argument(norm, 3)]
        affine = affine if affine[0] is not None else [None]
    elif norm.target is aten.rms_norm.default:
        affine = [argument(norm, 2)]
    elif norm.target is aten.mul.Tensor:  # a norm written by hand ends in weight * normalized
        affine = [node for node in norm.all_input_nodes if node.op == "get_attr" and len(shape_of(node)) == 1]
    else:
        return None
    scales = [node for node in affine if node is not None]
    width = shape_of(norm)[-1] if shape_of(norm) else None
    if not scales or any(scale.op != "get_attr" or shape_of(scale) != (width,) for scale in scales):
        return None
    if any(len(scale.users) != 1 for scale in scales) or not norm.users:
        return None
    readers = []
    for user in norm.users:
        layer = weighted(user)
        if layer is None or layer.kind != "linear" or argument(user, layer.source) is not norm:
            return None
        if not _own_weight(user, layer):
            return None
        readers.append(user)
    return _Normed(norm, tuple(scales), tuple(readers))


# bias correction ------------------------------------------------------------------------------------------------------


def correct_biases(
    model: GraphModule,
    runs: Sequence[Any],
    rounded: Callable[[Node, Tensor], Tensor | None],
    before: Mapping[Node, Tensor] | None = None,
) -> list[str]:
    """Correct biases by the shift of the mean output that the rounding of weights causes: b -= (W_q - W) E[x].

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 (empirical means of the inputs).

    Args:
        model: a prepared, calibrated graph, changed in place.
        runs: flat inputs of the graph.
        rounded: returns a layer's weight as it will be stored; None where it is not quantized.
        before: original weights by layer, where a rounding method has replaced them.

    Returns the paths of the layers.
    """
    layers = [node for node in model.graph.nodes if (layer := weighted(node)) and "transpose" not in layer.kind]
    sums: dict[Node, tuple[Tensor, int]] = {}
    readers: dict[Node, list[Node]] = {}
    for node in layers:
        source = argument(node, weighted(node).source)  # type: ignore[union-attr]
        if source is not None:
            readers.setdefault(source, []).append(node)

    def see(node: Node, value: Tensor) -> None:
        kind = weighted(readers[node][0]).kind  # type: ignore[union-attr]
        channels = value.detach().double().movedim(-1 if kind == "linear" else 1, 0).flatten(1)
        total, count = sums.get(node, (torch.zeros(len(channels), dtype=torch.float64), 0))
        sums[node] = (total + channels.sum(1).cpu(), count + channels.shape[1])

    watch(model, readers, see, runs)
    paths = []
    for source, nodes in readers.items():
        total, count = sums[source]
        for node in nodes:
            if _correct(model, node, total / max(count, 1), rounded, (before or {}).get(node)):
                paths.append(layer_of(node))
    model.recompile()
    return paths


def _correct(
    model: GraphModule,
    node: Node,
    mean: Tensor,
    rounded: Callable[[Node, Tensor], Tensor | None],
    before: Tensor | None,
) -> bool:
    layer = weighted(node)
    assert layer is not None
    weight_input = argument(node, layer.weight)
    stored = behind(weight_input)
    if weight_input is None or stored is None:
        return False
    weight = tensor_of(model, stored).detach()
    grid = rounded(weight_input, weight)
    if grid is None or (layer.bias is None):
        return False
    error = (grid.double() - (weight if before is None else before.detach()).double()).cpu()
    if layer.kind == "linear":
        shift = (error if layer.axis == 0 else error.T) @ mean
    else:
        groups = len(mean) // error.shape[1]
        per_group = error.flatten(2).sum(2).view(groups, -1, error.shape[1])
        shift = (per_group @ mean.view(groups, -1, 1)).flatten()
    bias = argument(node, layer.bias)
    old = tensor_of(model, bias).detach() if bias is not None else torch.zeros_like(shift)
    new = (old.double().cpu() - shift).to(weight.dtype).to(weight.device)
    if bias is not None:
        set_tensor(model, bias, new)
    else:
        while len(node.args) <= layer.bias:
            node.args = (*node.args, None)
        node.update_arg(layer.bias, add_tensor(model, node, f"_{node.name}_bias", new))
    return True


# ----------------------------------------------------------------------------------------------------------------------


def _weight(node: Node) -> Node:
    layer = weighted(node)
    assert layer is not None
    weight = argument(node, layer.weight)
    assert weight is not None
    return weight


def _own_weight(node: Node, layer: Weighted) -> bool:
    """Whether weight and bias are stored tensors that nothing else reads."""
    return all(
        stored is None or (stored.op == "get_attr" and len(stored.users) == 1)
        for stored in (argument(node, layer.weight), argument(node, layer.bias))
    )


def _stored_arguments(node: Node) -> Iterator[Node]:
    layer = weighted(node)
    assert layer is not None
    for index in (layer.weight, layer.bias):
        if (stored := argument(node, index)) is not None:
            yield stored


def _largest(value: Tensor, axis: int) -> Tensor:
    """The largest magnitude of each slice along an axis."""
    return value.detach().abs().movedim(axis, 0).flatten(1).amax(1)
