"""Runs of a prepared, calibrated graph with one layer at a time on integers.

All changes share the computation in front of the changed layer. The live values there, the frontier, are stored for
every batch and moved forward from change to change, so that a change costs only the operations behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchslim.core.infinities import difference, energy
from torchslim.graph.calling import tensors_of
from torchslim.graph.export import layer_of
from torchslim.graph.io_structure import build
from torchslim.graph.row_ranges import rounded_by_row
from torchslim.quantize.aten_ops import EMBEDDINGS, PRODUCTS, RECURRENT, along, is_constant, tensor_of, weighted
from torchslim.quantize.modules import Prepared

LIMIT = 2**30  # bytes of the values that are stored between runs
Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Single:
    """The roundings that put one layer alone on integers.

    Attributes:
        layer: path of the layer, as in the records of the quantizer.
        place: index of its first operation among the nodes of the graph; values before it do not change.
        reads: by operation, the observed values that it reads rounded.
        gives: observers whose readers all get a rounded value.
    """

    layer: str
    place: int
    reads: Mapping[Node, Mapping[Node, Rounding]]
    gives: Mapping[Node, Rounding]


def singles(prepared: Prepared) -> list[Single]:
    """The change for each layer that the scheme quantizes, in the order of execution.

    Products of two activations, as in attention, have no record; their changes have the path of their module.
    """
    from torchslim.quantize.annotation_ends import end_of_layer

    program = prepared.program
    quantized = {record.layer for record in prepared.records if record.action == "quantized"}
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    operations: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        layer = layer_of(node)
        has_weights = weighted(node) is not None or node.target in RECURRENT or node.target in EMBEDDINGS
        product = node.target in PRODUCTS and not has_weights and not is_constant(node)
        if ((has_weights and layer in quantized) or product) and any(
            _observer(program, source) for source in node.all_input_nodes
        ):
            operations.setdefault(layer, []).append(node)
    changes = []
    for layer, nodes in operations.items():
        reads: dict[Node, dict[Node, Rounding]] = {}
        gives: dict[Node, Rounding] = {}
        for node in nodes:
            reads[node] = {
                source: rounding(program, source) for source in node.all_input_nodes if _observer(program, source)
            }
            layout = weighted(node)
            if layout is not None and layout.kind.startswith("conv"):  # a linear layer can return float
                users = end_of_layer(node).users
                gives |= {user: rounding(program, user) for user in users if _observer(program, user)}
        changes.append(Single(layer=layer, place=min(places[node] for node in nodes), reads=reads, gives=gives))
    return sorted(changes, key=lambda change: change.place)


def rounding(program: GraphModule, observed: Node) -> Rounding:
    """The function that rounds to the grid of the observer `observed`."""
    from torchslim.quantize.fake_quantize import UNSIGNED, GroupWeights, RangeOfEachCall

    module: Any = program.get_submodule(str(observed.target))
    if isinstance(module, GroupWeights):
        grouped: Rounding = module.rounded
        return grouped
    low, high = module.quant_min, module.quant_max
    if getattr(module, "is_dynamic", False):
        linear = any(user.target is torch.ops.aten.linear.default for user in observed.users)
        return rounded_by_row if linear else RangeOfEachCall(torch.uint8, *UNSIGNED, torch.per_tensor_affine)
    scale, zero_point = module.calculate_qparams()
    if scale.numel() > 1 or module.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine):
        axis = module.ch_axis

        def per_channel(value: Tensor) -> Tensor:
            step = along(scale.to(value.dtype), value, axis)
            rounded: Tensor = (value / step).round().clamp(low, high) * step
            return rounded

        return per_channel

    def per_tensor(value: Tensor) -> Tensor:
        offset = zero_point.to(value.dtype)
        step = scale.to(value.dtype)
        rounded: Tensor = (((value / step).round() + offset).clamp(low, high) - offset) * step
        return rounded

    return per_tensor


@dataclass
class Passes:
    """Runs of a prepared graph on several inputs, in float except for one change.

    Args:
        prepared: a calibrated model, not for training; its observers are skipped.
        inputs: model inputs, one for each run.
        limit: bytes of live values that may be stored; where they would take more, runs start at an earlier node.

    `operations` counts the operations that were computed, over all runs.
    """

    prepared: Prepared
    inputs: Sequence[Any]
    limit: int = LIMIT
    operations: int = 0
    place: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        program = self.prepared.program
        self.nodes: list[Node] = list(program.graph.nodes)
        last = {source: place for place, node in enumerate(self.nodes) for source in node.all_input_nodes}
        self.dies: list[list[Node]] = [[] for _ in self.nodes]
        for node, place in last.items():
            self.dies[place].append(node)
        self.in_place = max((place for place, node in enumerate(self.nodes) if _mutates(node)), default=-1)
        self.live: list[int] = []  # bytes of live values before each node, of the first run
        self.frontier = [self._begin(input_) for input_ in self.inputs]

    def outputs(self, change: Single | None = None) -> Iterator[Any]:
        """The model's outputs on each of the inputs; passing changes in the order of their places is cheapest."""
        if change is not None:
            self._advance(change.place)
        for number, values in enumerate(self.frontier):
            measuring = number == 0 and not self.live and change is None
            yield self._finish(self._forked(values), change, measuring=measuring)

    def answer(self, change: Single | None, inputs: Any) -> Any:
        """The model's outputs on any inputs, computed from the start."""
        return self._finish(self._begin(inputs), change, start=0)

    @torch.no_grad()
    def _finish(
        self, values: dict[Node, Any], change: Single | None, start: int | None = None, *, measuring: bool = False
    ) -> Any:
        leaves = self._run(values, self.place if start is None else start, len(self.nodes), change, measuring=measuring)
        return build(self.prepared.outputs, list(leaves), self.prepared.classes)

    def _begin(self, inputs: Any) -> dict[Node, Any]:
        leaves = iter(self.prepared.leaves(inputs))
        return {node: next(leaves) for node in self.nodes if node.op == "placeholder"}

    @torch.no_grad()
    def _advance(self, place: int) -> None:
        """Move the frontier to `place`, or as far as memory allows."""
        if not self.live and self.frontier:
            self._finish(self._forked(self.frontier[0]), None, measuring=True)
        allowed = self.limit / max(len(self.frontier), 1)
        while place > self.place and self.frontier and self.live[place] > allowed:
            place -= 1
        if place > self.place:
            for values in self.frontier:
                self._run(values, self.place, place, None)
            self.place = place

    def _run(
        self, values: dict[Node, Any], start: int, stop: int, change: Single | None, *, measuring: bool = False
    ) -> Any:
        result: Any = ()
        for place in range(start, stop):
            node = self.nodes[place]
            if measuring:
                self.live.append(_size(values))
            if node.op == "output":
                result = map_arg(node.args[0], values.__getitem__)
            elif node.op != "placeholder":
                values[node] = self._value(node, values, change)
            for dead in self.dies[place]:
                values.pop(dead, None)
        return result

    def _value(self, node: Node, values: Mapping[Node, Any], change: Single | None) -> Any:
        program = self.prepared.program
        if node.op == "get_attr":
            return tensor_of(program, node)
        if node.op == "call_module":
            # observers return their input, guards have no readers
            value: Any = values[node.all_input_nodes[0]] if node.all_input_nodes else None
            return change.gives[node](value) if change is not None and node in change.gives else value
        self.operations += 1
        rounded = change.reads.get(node, {}) if change is not None else {}

        def read(argument: Node) -> Any:
            return rounded[argument](values[argument]) if argument in rounded else values[argument]

        function: Any = node.target
        return function(*map_arg(node.args, read), **map_arg(node.kwargs, read))

    def _forked(self, values: dict[Node, Any]) -> dict[Node, Any]:
        """Copy `values` for another run where needed: operations in place must not change the frontier."""
        if self.in_place < self.place:
            return dict(values)
        storages: dict[int, Any] = {}

        def copied(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:  # views of one another stay views
                storages[storage._cdata] = storage.clone()
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            return view.set_(storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())

        def forked(node: Node, value: Any) -> Any:
            if node.op == "get_attr":
                return value
            if isinstance(value, (tuple, list)):
                return type(value)(forked(node, item) for item in value)
            return copied(value) if isinstance(value, Tensor) else value

        return {node: forked(node, value) for node, value in values.items()}


def _observer(program: GraphModule, node: Node) -> bool:
    if node.op != "call_module":
        return False
    return hasattr(program.get_submodule(str(node.target)), "calculate_qparams")


def _size(values: Mapping[Node, Any]) -> int:
    """Bytes of `values`, without tensors that are stored with the model."""
    tensors = [tensor for node, value in values.items() if node.op != "get_attr" for tensor in _tensors(value)]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema is not None and bool(schema.is_mutable)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)] if isinstance(value, (tuple, list)) else []


def noise_of(reference: Sequence[Any], outputs: Iterator[Any]) -> float:
    """Energy of the difference over that of the reference, over all floating-point outputs of all runs."""
    signal = noise = 0.0
    for before, after in zip(reference, outputs, strict=True):
        for expected, actual in zip(tensors_of(before), tensors_of(after), strict=True):
            if expected.is_floating_point():
                signal += energy(expected)
                noise += float(difference(expected, actual).square().sum())
    return noise / signal if signal else (0.0 if noise == 0 else float("inf"))


def damages(prepared: Prepared, inputs: Sequence[Any]) -> dict[str, float]:
    """Noise over signal of the outputs by layer, with that layer alone on integers; see `noise_of`."""
    passes = Passes(prepared, inputs)
    reference = list(passes.outputs())
    return {change.layer: noise_of(reference, passes.outputs(change)) for change in singles(prepared)}
