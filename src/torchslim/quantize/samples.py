"""A few samples of what a prepared model was calibrated on, and its answers to them in float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter

from torchslim.core.trees import device_of

MOST = 64  # samples that are held
FEWEST = 2  # batches
INPUTS = 2**23  # bytes that samples of small batches are joined up to in one call; its activations are many times that
OUTPUTS = 2**26  # bytes of answers that are held

Run = list[Tensor]
"""Flat input tensors of one call."""


class Samples:
    """The first samples of the first batches that a model is called with.

    Args:
        axes: the dimension of the samples of each flat input; None where it has none.
        answer: bytes of all outputs for one sample.
    """

    def __init__(self, axes: Sequence[int | None], answer: int = 0) -> None:
        self.axes, self.answer = tuple(axes), answer
        self.batches: list[Run] = []
        self.closed = False  # calibrated: what comes later is training

    def add(self, leaves: Sequence[Tensor]) -> None:
        """Hold a batch, or its first samples, where room is left."""
        if self.closed or (len(self.batches) >= FEWEST and (not self._joins or self._held >= MOST)):
            return
        self.batches.append(_first(leaves, self.axes, MOST // FEWEST))

    def runs(self, count: int) -> list[Run]:
        """About `count` samples of all batches as one call; a call for each of two where they cannot be joined."""
        if not self.batches:
            return []
        count = min(count, self._affordable)
        each = -(-count // len(self.batches))
        taken = [_first(batch, self.axes, each) for batch in self.batches[:count]]
        if not self._joins or any(not _alike(taken[0], other, self.axes) for other in taken[1:]):
            return taken[:FEWEST]
        leaves = zip(self.axes, *taken, strict=True)
        return [[parts[0] if axis is None else torch.cat(parts, axis) for axis, *parts in leaves]]

    def __deepcopy__(self, memo: Any) -> Samples:
        copied = Samples(self.axes, self.answer)
        copied.batches, copied.closed = list(self.batches), self.closed
        return copied

    @property
    def _joins(self) -> bool:
        return any(axis is not None for axis in self.axes)

    @property
    def _affordable(self) -> int:
        """Samples whose inputs and answers are small, or no more than those of the largest batch that was seen."""
        sizes = [samples_in(batch, self.axes) for batch in self.batches]
        one = sum(leaf.nbytes for leaf in self.batches[0]) // max(sizes[0], 1)
        inputs = max(INPUTS // max(one, 1), *sizes)
        return max(FEWEST, min(inputs, OUTPUTS // max(self.answer, 1)))

    @property
    def _held(self) -> int:
        return sum(samples_in(batch, self.axes) for batch in self.batches)


def batch_axes(program: ExportedProgram, axis: int | None) -> tuple[list[int | None], list[int | None], int]:
    """The dimension of the samples of each flat input and output of a captured program, None where it has none.

    And the bytes of all outputs for one sample.

    Args:
        program: as `capture` gives it.
        axis: the dimension of the inputs that is free.
    """
    signature = program.graph_signature
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = [nodes[name].meta["val"] for name in signature.user_inputs if isinstance(name, str)]
    free = [
        axis if axis is not None and value.dim() > axis and not isinstance(value.shape[axis], int) else None
        for value in inputs
    ]
    symbols = {str(value.shape[at]) for value, at in zip(inputs, free, strict=True) if at is not None}
    given: list[int | None] = []
    answer = 0
    for name in signature.user_outputs:
        value = nodes[name].meta.get("val") if isinstance(name, str) and name in nodes else None
        shape = value.shape if isinstance(value, Tensor) else ()
        given.append(next((at for at, size in enumerate(shape) if str(size) in symbols), None))
        if isinstance(value, Tensor):
            answer += math.prod(hint(size) for at, size in enumerate(shape) if at != given[-1]) * value.element_size()
    return free, given, answer


def hint(size: Any) -> int:
    """A size, of the example where it is free."""
    known = size if isinstance(size, int) else size.node.hint
    return 1 if known is None else int(known)


def float_outputs(program: GraphModule, runs: Sequence[Run]) -> list[list[Tensor]]:
    """What a prepared graph answers where nothing is rounded and nothing observed; in evaluation."""
    switches = sum(node.op == "placeholder" for node in program.graph.nodes) - len(runs[0]) if runs else 0
    device = device_of(program)

    class Float(Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return args[0] if args else None  # observers hand on what they see, guards have no readers

    with torch.no_grad():
        answers = [Float(program).run(*_on(run, device), *[False] * switches) for run in runs]
        return [[each.detach().cpu() for each in answer] for answer in answers]


def outputs(program: GraphModule, runs: Sequence[Run], *switches: bool) -> list[list[Tensor]]:
    """What a graph answers."""
    device = device_of(program)
    with torch.no_grad():
        return [[each.detach().cpu() for each in program(*_on(run, device), *switches)] for run in runs]


def part(run: Run, axes: Sequence[int | None], start: int, count: int) -> Run:
    """Some samples of a run; those that have run out begin again."""
    found = []
    for leaf, axis in zip(run, axes, strict=True):
        if axis is None:
            found.append(leaf)
        else:
            order = (torch.arange(count) + start) % leaf.shape[axis]
            found.append(leaf.index_select(axis, order))
    return found


def _first(leaves: Sequence[Tensor], axes: Sequence[int | None], count: int) -> Run:
    return [
        (leaf if axis is None else leaf.narrow(axis, 0, min(count, leaf.shape[axis]))).detach().cpu().clone()
        for leaf, axis in zip(leaves, axes, strict=True)
    ]


def samples_in(batch: Run, axes: Sequence[int | None]) -> int:
    """How many samples a run has; 1 where it has no dimension for them."""
    return next((leaf.shape[axis] for leaf, axis in zip(batch, axes, strict=True) if axis is not None), 1)


def _alike(one: Run, other: Run, axes: Sequence[int | None]) -> bool:
    """Can two runs become one?"""
    for a, b, axis in zip(one, other, axes, strict=True):
        if axis is None:
            if a.shape != b.shape or not torch.equal(a, b):
                return False
        elif a.dtype != b.dtype or a.select(axis, 0).shape != b.select(axis, 0).shape:
            return False
    return True


def _on(run: Run, device: torch.device) -> list[Tensor]:
    return [leaf.to(device) for leaf in run]
