"""Edits of a program before its export to ONNX: values with operations in their place, and stored tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from torchslim.graph.program_editor import Editor as ProgramEditor
from torchslim.graph.row_ranges import LEVELS, ZERO_POINT

MICROSOFT = "com.microsoft::"
GRID = (torch.tensor(1 / LEVELS), torch.tensor(ZERO_POINT, dtype=torch.uint8))


class Editor(ProgramEditor):
    """Rewrites a copy of an exported program; quantizes a value once for all layers that read it."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program)
        self.activations: dict[Node, Sequence[Node]] = {}

    def quantize(self, source: Node, owner: Node, rounded: Callable[..., Any]) -> Sequence[Node]:
        """Bytes of a value's rows, and their magnitudes, computed once for all layers that read it."""
        if source not in self.activations:
            operations = (node for node in self.graph.nodes if node.op != "placeholder")
            before = next(operations) if source.op == "placeholder" else source.next
            self.activations[source] = self.trace(before, rounded, [source, *self.grid()], owner)
        return self.activations[source]

    def grid(self) -> list[Node]:
        """Scale and zero point of rows over their largest magnitudes."""
        return [self.store(GRID[0], "row_scale"), self.store(GRID[1], "row_zero_point")]
