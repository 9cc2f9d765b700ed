"""Units of a prepared graph that can go back to float alone: layers, and operations between layers with a grid."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from torchslim.graph.export import layer_of
from torchslim.quantize.aten_ops import (
    BATCH_NORMS,
    CLAMPS,
    DROPOUTS,
    EMBEDDINGS,
    PRODUCTS,
    RECURRENT,
    TAKES_GRIDS,
    argument,
    behind,
    is_constant,
    op_name,
    shape_of,
    weighted,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Roundings that go back to float together.

    Attributes:
        key: identifies the unit.
        layer: path of the layer, as in its record.
        operation: name of an operation between layers; empty for a layer.
        edges: names of the observers and of the nodes that read them.
    """

    key: str
    layer: str
    operation: str
    edges: tuple[tuple[str, str], ...]


def units_of(program: GraphModule) -> list[Unit]:
    """The units of a prepared graph in the order of execution.

    A layer's unit has the roundings of its inputs and weights, and those of its output for readers in float. An
    operation between layers (an addition, a concatenation, a gate, a pool) has the same. A value that a layer reads
    from an operation belongs to the layer: where every unit behind a place is released, nothing behind it is rounded.
    """
    nodes = {node: place for place, node in enumerate(program.graph.nodes)}
    edges: dict[str, list[tuple[str, str]]] = {}
    owners: dict[str, Node] = {}
    for reader in nodes:
        for observed in reader.all_input_nodes:
            source = argument(observed, 0)
            if source is None or not observes(program, observed):
                continue
            owner = reader if _takes_grids(reader) else _made_by(source)
            key = f"layer {layer_of(owner)}" if _is_layer(owner) else owner.name
            owners.setdefault(key, owner)
            edges.setdefault(key, []).append((observed.name, reader.name))
    places = {node.name: place for node, place in nodes.items()}

    def first(key: str) -> int:
        return min(places[reader] for _, reader in edges[key])

    return [
        Unit(
            key=key,
            layer=layer_of(owners[key]),
            operation="" if _is_layer(owners[key]) else op_name(owners[key]).removeprefix("aten.").partition(".")[0],
            edges=tuple(edges[key]),
        )
        for key in sorted(edges, key=first)
    ]


def release(program: GraphModule, units: Sequence[Unit], keys: Collection[str]) -> None:
    """Make units read and give floats, and remove observers that no node reads any more."""
    named = {node.name: node for node in program.graph.nodes}
    for unit in units:
        if unit.key in keys:
            for observed, reader in unit.edges:
                source = argument(named[observed], 0)
                assert source is not None
                named[reader].replace_input_with(named[observed], source)
    for node in reversed(list(program.graph.nodes)):
        if not node.users and observes(program, node):
            program.graph.erase_node(node)
    program.recompile()


def kinds_of(program: GraphModule, units: Sequence[Unit]) -> dict[str, str]:
    """The kinds of the layers among the units, by key: names in the plural, such as "depthwise convolutions"."""
    kinds: dict[str, str] = {}
    layers = {unit.key for unit in units if not unit.operation}
    for node in program.graph.nodes:
        key = f"layer {layer_of(node)}"
        if key in layers and key not in kinds and _is_layer(node):
            kinds[key] = _kind(node)
    return kinds


def layers_before(program: GraphModule, units: Sequence[Unit]) -> dict[str, frozenset[str]]:
    """For every operation between layers the layers whose results it reads, by keys of units."""
    keys = {unit.key for unit in units}
    operations = {unit.key for unit in units if unit.operation}
    before: dict[Node, frozenset[str]] = {}  # for every node, the layers that its value comes from
    found = {}
    for node in program.graph.nodes:
        sources = frozenset().union(*(before[source] for source in node.all_input_nodes))
        if node.name in operations:
            found[node.name] = sources
        key = f"layer {layer_of(node)}"
        before[node] = frozenset({key}) if _is_layer(node) and key in keys else sources
    return found


def observes(program: GraphModule, node: Node) -> bool:
    """Whether a node is an observer, which rounds once the graph is converted."""
    return node.op == "call_module" and hasattr(program.get_submodule(str(node.target)), "calculate_qparams")


def _is_layer(node: Node) -> bool:
    if weighted(node) is not None or node.target in RECURRENT or node.target in EMBEDDINGS:
        return True
    return node.op == "call_function" and node.target in PRODUCTS and not is_constant(node)


def _kind(node: Node) -> str:
    layout = weighted(node)
    if layout is None:
        if node.target in RECURRENT:
            return "recurrent layers"
        return "embeddings" if node.target in EMBEDDINGS else "products of activations"
    if layout.kind == "linear":
        return "linear layers"
    weight = behind(argument(node, layout.weight))
    outputs, inputs, *kernel = (0, 0) if weight is None else shape_of(weight)
    if "transpose" in layout.kind:
        return "transposed convolutions"
    if inputs == 1 and outputs > 1:
        return "depthwise convolutions"
    return "pointwise convolutions" if set(kernel) == {1} else "convolutions"


def _takes_grids(node: Node) -> bool:
    return _is_layer(node) or TAKES_GRIDS in node.meta


def _made_by(node: Node) -> Node:
    """The operation that computes a value, before the norms, clamps and dropouts behind it."""
    while node.target in (*CLAMPS, *BATCH_NORMS, *DROPOUTS) and not _takes_grids(node):
        before = argument(node, 0)
        if before is None or before.op != "call_function":
            break
        node = before
    return node
