"""Reshapes of free sizes without the operations that read these sizes at every call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from torchslim.runtimes.onnx_graph import Graph

Size = str | int | None  # a free size by its name, a fixed one, or an unknown one


def copied_sizes(graph: Graph) -> None:
    """Write 0, which copies the size at the same place of the input, where a reshape is given that size as a value.

    The exporter reads each free size by a `Shape` and joins them by a `Concat`, at every call. Where the target is the
    input's own size at each place or a constant, the target is a constant. Sizes are compared by their names in the
    model; a reshape with a target that is not known in this way stays as it is.
    """
    sizes, makers = sizes_of(graph), graph.makers()
    for node in graph.nodes:
        if node.op_type != "Reshape" or (target := _target(node, graph, makers, sizes)) is None:
            continue
        node.input[1] = graph.store(np.array(target, np.int64), f"{node.output[0]}_target")
        del node.attribute[:]  # with allowzero a 0 is a size of 0
        graph.changed = True
    if graph.changed:
        _drop_unread(graph)


def sizes_of(graph: Graph) -> Mapping[str, list[Size]]:
    """Sizes of the values whose shapes are in the model, by name."""
    return {
        value.name: [
            size.dim_param or (size.dim_value if size.HasField("dim_value") else None)
            for size in value.type.tensor_type.shape.dim
        ]
        for value in (*graph.proto.input, *graph.proto.value_info, *graph.proto.output)
        if value.type.tensor_type.HasField("shape")
    }


def _target(node: Any, graph: Graph, makers: Mapping[str, Any], sizes: Mapping[str, list[Size]]) -> list[int] | None:
    """The target of a reshape as constants, or None where one of its sizes is not known."""
    joined, source = makers.get(node.input[1]), sizes.get(node.input[0])
    if joined is None or joined.op_type != "Concat" or source is None:
        return None
    target = list[int]()
    for name in joined.input:
        if name in graph.constants:
            fixed = graph.array(name).reshape(-1).tolist()
            if min(fixed, default=0) <= 0:  # -1 is what the other sizes leave, and 0 may be a size of 0
                return None
            target += fixed
            continue
        size = _read_size(makers.get(name), sizes)
        if size is None or len(target) >= len(source) or source[len(target)] != size:
            return None
        target.append(0)
    return target


def _read_size(maker: Any, sizes: Mapping[str, list[Size]]) -> Size:
    """The size that a `Shape` of one place reads, None for any other node."""
    if maker is None or maker.op_type != "Shape":
        return None
    places = {attribute.name: attribute.i for attribute in maker.attribute}
    start, end, known = places.get("start", 0), places.get("end"), sizes.get(maker.input[0])
    return known[start] if known is not None and end == start + 1 and 0 <= start < len(known) else None


def _drop_unread(graph: Graph) -> None:
    """Drop the operations that only made targets."""
    readers = graph.readers()
    outputs = {output.name for output in graph.proto.output}
    for kind in ("Concat", "Shape"):
        idle = [
            node
            for node in graph.nodes
            if node.op_type == kind and not any(readers.get(name) or name in outputs for name in node.output)
        ]
        for node in idle:
            for name in node.input:
                readers[name] = [reader for reader in readers[name] if reader is not node]
        graph.nodes = [node for node in graph.nodes if not any(node is other for other in idle)]
