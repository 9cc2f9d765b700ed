"""An ONNX graph that passes edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Graph:
    """An ONNX graph to edit: its nodes in order, its constants, and the ranks of its values."""

    proto: Any
    nodes: list[Any] = field(init=False)
    constants: dict[str, Any] = field(init=False)
    ranks: dict[str, int] = field(init=False)  # of the values whose shapes are in the model, by name
    fixed: bool = field(init=False)  # whether all inputs have fixed sizes
    changed: bool = False

    def __post_init__(self) -> None:
        self.nodes = list(self.proto.node)
        self.constants = {initializer.name: initializer for initializer in self.proto.initializer}
        values = (*self.proto.value_info, *self.proto.output)
        self.ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
        sizes = (size for input_ in self.proto.input for size in input_.type.tensor_type.shape.dim)
        self.fixed = all(size.HasField("dim_value") for size in sizes)

    def makers(self) -> Mapping[str, Any]:
        """Nodes, by the names of the values that they make."""
        return {name: node for node in self.nodes for name in node.output}

    def array(self, name: str) -> Any:
        """Values of a constant, as a NumPy array."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name])

    def store(self, array: Any, name: str) -> str:
        """Add a constant; return its name."""
        from onnx import numpy_helper

        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def insert(self, before: Any, *nodes: Any) -> None:
        """Insert `nodes` in front of the node `before`."""
        place = next(index for index, node in enumerate(self.nodes) if node is before)
        self.nodes[place:place] = nodes
        self.changed = True

    def replace(self, node: Any, *nodes: Any) -> None:
        """Replace `node` by `nodes`."""
        self.insert(node, *nodes)
        self.nodes = [other for other in self.nodes if other is not node]

    def write(self) -> None:
        """Write the nodes and the constants that are read to the model."""
        nodes, proto = [type(node).FromString(node.SerializeToString()) for node in self.nodes], self.proto
        read_names = {name for node in nodes for name in node.input} | {output.name for output in proto.output}
        constants = [constant for name, constant in self.constants.items() if name in read_names]
        constants = [type(constant).FromString(constant.SerializeToString()) for constant in constants]
        del proto.node[:], proto.initializer[:]
        proto.node.extend(nodes)
        proto.initializer.extend(constants)

    def readers(self) -> dict[str, list[Any]]:
        """Nodes that read a value, by its name."""
        readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return readers
