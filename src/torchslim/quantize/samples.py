"""A few samples of a prepared model's calibration data, and graph outputs on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from torchslim.core.trees import device_of

MOST = 64  # samples that are stored
FEWEST = 2  # batches
INPUTS = 2**23  # bytes up to which small batches are joined into one call; its activations take many times that
OUTPUTS = 2**26  # bytes of outputs that are stored
PICKLED = 2**22  # bytes of samples in a pickle; a trainer writes one after every epoch, and a model may have many parts

Run = list[Tensor]
"""Flat input tensors of one call."""


class Samples:
    """The first samples of the first batches that a model is called with.

    Args:
        axes: batch dimension of each flat input; None where it has none.
        answer: bytes of all outputs for one sample.
    """

    def __init__(self, axes: Sequence[int | None], answer: int = 0) -> None:
        self.axes, self.answer = tuple(axes), answer
        self.batches: list[Run] = []
        self.closed = False  # after calibration: later batches are training data

    def add(self, leaves: Sequence[Tensor]) -> None:
        """Store a batch, or its first samples, where there is room."""
        if self.closed or (len(self.batches) >= FEWEST and (not self._joins or self._held >= MOST)):
            return
        self.batches.append(_first(leaves, self.axes, MOST // FEWEST))

    def runs(self, count: int) -> list[Run]:
        """About `count` samples of all batches as one call; as two calls, of two batches, if they cannot be joined."""
        if not self.batches:
            return []
        count = min(count, self._affordable)
        per_batch = -(-count // len(self.batches))
        pieces = [_first(batch, self.axes, per_batch) for batch in self.batches[:count]]
        if not self._joins or any(not _alike(pieces[0], piece, self.axes) for piece in pieces[1:]):
            return pieces[:FEWEST]
        leaves = zip(self.axes, *pieces, strict=True)
        return [[parts[0] if axis is None else torch.cat(parts, axis) for axis, *parts in leaves]]

    def __deepcopy__(self, memo: Any) -> Samples:
        copied = Samples(self.axes, self.answer)
        copied.batches, copied.closed = list(self.batches), self.closed
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        size = sum(leaf.nbytes for batch in self.batches for leaf in batch)
        if size > PICKLED:
            first = self.batches[:FEWEST]
            most = max(samples_in(batch, self.axes) for batch in first)
            count = max(1, most * PICKLED // sum(leaf.nbytes for batch in first for leaf in batch))
            state["batches"] = [_first(batch, self.axes, count) for batch in first]
        return state

    @property
    def _joins(self) -> bool:
        return any(axis is not None for axis in self.axes)

    @property
    def _affordable(self) -> int:
        """Number of samples whose inputs and outputs stay small; inputs as large as the largest batch are fine."""
        sizes = [samples_in(batch, self.axes) for batch in self.batches]
        sample_bytes = sum(leaf.nbytes for leaf in self.batches[0]) // max(sizes[0], 1)
        inputs = max(INPUTS // max(sample_bytes, 1), *sizes)
        return max(FEWEST, min(inputs, OUTPUTS // max(self.answer, 1)))

    @property
    def _held(self) -> int:
        return sum(samples_in(batch, self.axes) for batch in self.batches)


def batch_axes(program: ExportedProgram, axis: int | None) -> tuple[list[int | None], list[int | None], int]:
    """Batch dimensions of the flat inputs and outputs of a captured program, and the output bytes of one sample.

    The dimension is None where an input or output has none.

    Args:
        program: program from `capture`.
        axis: the dimension of the inputs that is free.
    """
    signature = program.graph_signature
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = [nodes[name].meta["val"] for name in signature.user_inputs if isinstance(name, str)]
    input_axes = [
        axis if axis is not None and value.dim() > axis and not isinstance(value.shape[axis], int) else None
        for value in inputs
    ]
    symbols = {str(value.shape[dim]) for value, dim in zip(inputs, input_axes, strict=True) if dim is not None}
    output_axes: list[int | None] = []
    total = 0
    for name in signature.user_outputs:
        value = nodes[name].meta.get("val") if isinstance(name, str) and name in nodes else None
        shape = value.shape if isinstance(value, Tensor) else ()
        output_axes.append(next((dim for dim, size in enumerate(shape) if str(size) in symbols), None))
        if isinstance(value, Tensor):
            total += math.prod(hint(n) for dim, n in enumerate(shape) if dim != output_axes[-1]) * value.element_size()
    return input_axes, output_axes, total


def hint(size: Any) -> int:
    """A size as an integer: that of the example where the size is free."""
    value = size if isinstance(size, int) else size.node.hint
    return 1 if value is None else int(value)


def float_outputs(program: GraphModule, runs: Sequence[Run]) -> list[list[Tensor]]:
    """Outputs of a prepared graph in evaluation mode, without rounding or observing."""
    switches = sum(node.op == "placeholder" for node in program.graph.nodes) - len(runs[0]) if runs else 0
    device = device_of(program)

    class Float(Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return args[0] if args else None  # observers return their input, guards have no readers

    with torch.no_grad():
        answers = [Float(program).run(*_on(run, device), *[False] * switches) for run in runs]
        return [[tensor.detach().cpu() for tensor in answer] for answer in answers]


def outputs(program: GraphModule, runs: Sequence[Run], *switches: bool) -> list[list[Tensor]]:
    """Outputs of a graph for each run."""
    device = device_of(program)
    run_graph = _Rounding(program).run
    with torch.no_grad():
        return [[tensor.detach().cpu() for tensor in run_graph(*_on(run, device), *switches)] for run in runs]


class _Rounding(Interpreter):
    """Runs a converted graph, with one operation for a quantization and its dequantization.

    The numbers are the same. The two operations compute eight tensors in turn, which took twice the time of all
    convolutions of a U-Net.
    """

    def __init__(self, program: GraphModule) -> None:
        super().__init__(program)
        self.rounded = {node for node in program.graph.nodes if _is_rounding(node)}

    def run_node(self, n: Node) -> Any:
        source = n.args[0] if n.args else None
        if n in self.rounded:
            value, scale, zero_point, low, high, _ = self.fetch_args_kwargs_from_env(n)[0]
            if value.dtype == torch.float32:
                # beyond 64-bit integers the operation overflows; masks hold the largest float
                value = value.clamp((low - zero_point - 1) * scale, (high - zero_point + 1) * scale)
                return torch.fake_quantize_per_tensor_affine(value, scale, zero_point, low, high)
        elif isinstance(source, Node) and source in self.rounded and self.env[source].is_floating_point():
            return self.env[source]
        return super().run_node(n)


def _is_rounding(node: Node) -> bool:
    """Whether a node quantizes a tensor for readers that all dequantize it on the same grid to float32."""
    operations = torch.ops.quantized_decomposed if "quantized_decomposed" in str(node.target) else None
    return (
        operations is not None
        and node.target == operations.quantize_per_tensor.default
        and len(node.args) == 6
        and all(
            user.target == operations.dequantize_per_tensor.default
            and user.args == (node, *node.args[1:])
            and not user.kwargs
            for user in node.users
        )
    )


def part(run: Run, axes: Sequence[int | None], start: int, count: int) -> Run:
    """`count` samples of a run from `start` on; behind the last sample the first one follows."""
    leaves = []
    for leaf, axis in zip(run, axes, strict=True):
        if axis is None:
            leaves.append(leaf)
        else:
            order = (torch.arange(count) + start) % leaf.shape[axis]
            leaves.append(leaf.index_select(axis, order))
    return leaves


def _first(leaves: Sequence[Tensor], axes: Sequence[int | None], count: int) -> Run:
    return [
        (leaf if axis is None else leaf.narrow(axis, 0, min(count, leaf.shape[axis]))).detach().cpu().clone()
        for leaf, axis in zip(leaves, axes, strict=True)
    ]


def samples_in(batch: Run, axes: Sequence[int | None]) -> int:
    """Number of samples in a run; 1 where it has no batch dimension."""
    return next((leaf.shape[axis] for leaf, axis in zip(batch, axes, strict=True) if axis is not None), 1)


def _alike(one: Run, other: Run, axes: Sequence[int | None]) -> bool:
    """Whether two runs can be joined."""
    for a, b, axis in zip(one, other, axes, strict=True):
        if axis is None:
            if a.shape != b.shape or not torch.equal(a, b):
                return False
        elif a.dtype != b.dtype or a.select(axis, 0).shape != b.select(axis, 0).shape:
            return False
    return True


def _on(run: Run, device: torch.device) -> list[Tensor]:
    return [leaf.to(device) for leaf in run]
