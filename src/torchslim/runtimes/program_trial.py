"""Runs a loaded program once on fake tensors (sizes without numbers), to check its operators and its memory use.

A saved program states the sizes of its values; running its operators on fake tensors shows whether they are true. A
graph whose operators do not fit together is refused before it is used, and so is a graph with enormous values, such as
a constant of a terabyte that is filled from one number.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from torchslim.errors import ArtifactError

LARGEST = 2**30
RELATIVE = 32
"""Bytes of one value: at most `LARGEST`, or `RELATIVE` times the bytes of all weights and inputs, if that is more."""
PIECES = 2**17
"""The longest dimension that an operator may split into a list of tensors."""
UNKNOWN: tuple[type[Exception], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)
"""Exceptions of sizes that depend on data and of operators without fake tensors: the trial of a program ends there."""


def try_program(program: ExportedProgram) -> None:
    """Run a program on fake tensors, with the batch size that it was exported with.

    Raises:
        ArtifactError: its operators do not fit together, or a value is larger than any that a model computes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
    stored = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    if len(specs) != len(nodes):
        raise ArtifactError("the program has other inputs than its signature")
    values = [
        _like(node.meta["val"] if spec.target is None else stored[spec.target], mode)
        for node, spec in zip(nodes, specs, strict=True)
    ]
    size = sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
    with mode, torch.no_grad():
        try:
            _Trial(program.graph_module, max(LARGEST, RELATIVE * size)).run(*values)
        except UNKNOWN:
            return


def _like(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [_concrete(size) for size in value.shape]
    with mode:
        return torch.empty_strided(sizes, [_concrete(stride) for stride in value.stride()], dtype=value.dtype)


def _concrete(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    if not isinstance(hint, int):
        raise ArtifactError("an input of the program has a size without an example")
    return hint


class _Trial(Interpreter):
    """Runs a program node by node and checks the size of every value."""

    def __init__(self, module: Any, limit: int) -> None:
        super().__init__(module)
        self.limit = limit

    def run_node(self, n: Node) -> Any:
        if _cuts(n.target):
            for node in n.all_input_nodes:
                value = self.env.get(node)
                longest = max((size for size in getattr(value, "shape", ()) if isinstance(size, int)), default=0)
                if longest > PIECES:
                    raise ArtifactError(f"{n.target} would cut a dimension of {longest:,} into pieces")
        value = super().run_node(n)
        torch.utils._pytree.tree_map_only(FakeTensor, self._look, value)
        return value

    def _look(self, value: FakeTensor) -> None:
        size = value.untyped_storage().nbytes()
        if isinstance(size, int) and size > self.limit:
            raise ArtifactError(f"a value of the program would take {size:,} bytes, at most {self.limit:,} are allowed")


def _cuts(target: Any) -> bool:
    returns = getattr(getattr(target, "_schema", None), "returns", ())
    return any(re.fullmatch(r"List\[.*\]", str(return_.type)) for return_ in returns)
