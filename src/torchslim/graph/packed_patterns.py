"""Recognition of recurrent layers over packed sequences in a captured program, where padded batches stand for them.

`torchslim.graph.packed_sequences` describes the operations that the capture has in their place. A runtime with an
operation that takes the lengths can compute the same with one of it: both directions, without reversed copies of the
batch. The match is exact, wherever the operations come from: nothing may read a step of padding before it is set to 0.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from torchslim.graph.integer_patterns import find_one_range
from torchslim.graph.packed_sequences import SHUT
from torchslim.graph.recurrent_shapes import LAYERS

aten = torch.ops.aten
ZEROS = (aten.zeros.default, aten.full.default)
CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One direction of one layer: `node` calls the recurrent operation on a padded batch (steps, batch, features).

    Args:
        node: the operation.
        x: the batch before it is reversed.
        source: the input of the operation before its dynamic rounding, if it is rounded.
        lengths: the lengths (batch,).
        backward: whether the operation reads the sequences from their ends.
        natural: its output in the order of the batch, if anything reads it.
        merged: the concatenation of this output with that of the other direction, if there is one.
        outputs: outputs with padding set to 0, (steps, batch, hidden) or, if merged, (steps, batch, 2 * hidden).
        last: hidden states after the last valid step, (1, batch, hidden).
        cells: cell states after the last valid step, (1, batch, hidden).
    """

    node: Node
    x: Node
    source: Node | None
    lengths: Node
    backward: bool
    natural: Node | None
    merged: Node | None
    outputs: tuple[Node, ...]
    last: tuple[Node, ...]
    cells: tuple[Node, ...] = ()

    @property
    def states(self) -> tuple[Node, ...]:
        """Initial states, each (1, batch, hidden)."""
        states: Any = self.node.args[1]
        return tuple(states) if isinstance(states, (list, tuple)) else (states,)

    @property
    def parameters(self) -> Sequence[Node]:
        """Two weights, and two biases if the layer has them."""
        return self.node.args[2]  # type: ignore[return-value]

    @property
    def hidden(self) -> int:
        """Size of the hidden state."""
        return int(self.parameters[1].meta["val"].shape[1])

    def joins(self, other: Direction) -> bool:
        """Whether this forward and the `other` backward direction can be one operation in the place of `other`."""
        merged = ([self.natural, other.natural], -1) if self.merged is not None else None
        return (
            (other.backward and not self.backward)
            and (self.node.target, self.x, self.lengths) == (other.node.target, other.x, other.lengths)
            and (self.hidden, len(self.parameters)) == (other.hidden, len(other.parameters))
            and (self.source is None) == (other.source is None)
            and self.merged is other.merged
            and (self.merged is None or self.merged.args == merged)
            and (self.merged is not None or not (self.outputs or other.outputs))
            and all(other.node < user for result in (*self.last, *self.cells) for user in result.users)
        )


def find_packed(graph: Graph) -> Iterator[tuple[Direction, ...]]:
    """Yield the layers of a graph that read packed sequences: a direction, or the forward and the backward one."""
    nodes = [node for node in graph.nodes if node.target in LAYERS]
    runs = [replace(run, cells=_cells(run, nodes)) for node in nodes if (run := _direction(node)) is not None]
    joined = set[Node]()
    for run in runs:
        if run.node in joined:
            continue
        partner = next((other for other in runs if other.node not in joined and run.joins(other)), None)
        if partner is not None:
            joined.add(partner.node)
            yield run, partner
        elif run.merged is None and not any(other.joins(run) for other in runs):
            yield (run,)


def _direction(node: Node) -> Direction | None:
    """Return the direction that an operation computes, if it reads a packed sequence."""
    x, _, parameters, biased, layers, _, train, bidirectional, batch_first = node.args
    if train or layers != 1 or bidirectional or batch_first or len(parameters) != (4 if biased else 2):  # type: ignore[arg-type]
        return None
    source = find_one_range(x)
    given: Any = source or x
    reverse = _reversed(given)
    if len(node.users) > 1 or any(_taken(user) != 0 for user in node.users):
        return None
    last, naturals, lengths = list[Node](), list(node.users), [] if reverse is None else [reverse]
    readers = [user for output in node.users for user in output.users]
    last = [reader for reader in readers if _last(reader) is not None]
    readers = [reader for reader in readers if reader not in last]
    lengths += [_last(reader) for reader in last]  # type: ignore[misc]
    if reverse is not None:
        naturals = readers
        lengths += [_reversed(natural) for natural in naturals]  # type: ignore[misc]
        readers = [user for natural in naturals for user in natural.users]
    merged = [reader for reader in readers if reader.target is aten.cat.default]
    outputs = [user for cat in merged for user in cat.users] if merged else readers
    lengths += [cleared_lengths(output) for output in outputs]  # type: ignore[misc]
    if (
        len(naturals) > 1
        or len(merged) > 1
        or (merged and len(readers) > 1)
        or len(set(lengths)) != 1
        or None in lengths
    ):
        return None
    return Direction(
        node=node,
        x=given.args[0] if reverse is not None else given,
        source=source,
        lengths=lengths[0],
        backward=reverse is not None,
        natural=naturals[0] if naturals else None,
        merged=merged[0] if merged else None,
        outputs=tuple(outputs),
        last=tuple(last),
    )


def _cells(run: Direction, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return the last cell states of a direction: of a second run over inputs that say where padding is."""
    given: Any = run.node.args[0]
    found = list[Node]()
    for node in nodes:
        arguments: Any = node.args
        padded, states, parameters = arguments[:3]
        parts, weights = _concatenated(padded, (-1, 2)), _concatenated(parameters[0], (1,))
        if parts is None or weights is None or len(parts) != 2 or len(weights) != 2:
            continue
        same = parts[0] is given and states == run.node.args[1] and weights[0] is run.parameters[0]
        rest = list(parameters[1:]) == list(run.parameters[1:])
        if same and rest and _padding(parts[1]) is run.lengths and _shut(weights[1], run.hidden):
            found += [user for user in node.users if _taken(user) == 2]
    return tuple(found)


def _taken(node: Node) -> Any:
    """Return the index of the result that a node takes."""
    return node.args[1] if node.target is operator.getitem else None


def _arguments(node: Any, *targets: Any) -> Sequence[Any]:
    """Return the arguments of a node that calls one of `targets`, else as many times None as may be needed."""
    return node.args if isinstance(node, Node) and node.target in targets else (None,) * 4


def _concatenated(node: Any, dims: Sequence[int]) -> Sequence[Any] | None:
    parts, dim = (*_arguments(node, aten.cat.default), 0)[:2]
    return parts if parts is not None and dim in dims else None


def _times(node: Any) -> bool:
    """Whether a node is the index of each step, (steps, 1)."""
    arange, dim = _arguments(node, aten.unsqueeze.default)[:2]
    start, *_ = _arguments(arange, aten.arange.start)
    return dim in (1, -1) and (start == 0 or _arguments(arange, aten.arange.default)[0] is not None)


def _valid(node: Any) -> Node | None:
    """Return the lengths, if a node is True where a step is not padding: (steps, batch)."""
    times, lengths = _arguments(node, aten.lt.Tensor)[:2]
    return lengths if _times(times) else None


def _before(node: Any) -> Node | None:
    """Return `n` of a node that is `n - 1`."""
    lengths, one = (*_arguments(node, aten.sub.Tensor), None)[:2]
    return lengths if one == 1 and not node.kwargs else None


def cleared_lengths(node: Any) -> Node | None:
    """Return the lengths, if a node is a padded batch whose padding is set to 0."""
    condition, x, zero = _arguments(node, aten.where.self)[:3]
    valid, dim = _arguments(condition, aten.unsqueeze.default)[:2]
    sizes, fill = (*_arguments(zero, *ZEROS), 0)[:2]
    scalar = (sizes == [] and fill == 0) or _arguments(zero, aten.new_zeros.default)[1] == []
    return _valid(valid) if dim in (-1, 2) and scalar and _alike(node, x) else None


def _reversed(node: Any) -> Node | None:
    """Return the lengths, if a node reverses the sequences of a padded batch within their lengths."""
    x, dim, expanded = _arguments(node, aten.gather.default)[:3]
    index, dim_of_features = _arguments(_arguments(expanded, aten.expand.default)[0], aten.unsqueeze.default)[:2]
    valid, mirrored, times = _arguments(index, aten.where.self)[:3]
    end, same_times = _arguments(mirrored, aten.sub.Tensor)[:2]
    lengths = _valid(valid)
    matches = dim == 0 and dim_of_features in (-1, 2) and _times(times) and same_times is times and _alike(node, x)
    return lengths if matches and lengths is not None and _before(end) is lengths else None


def _last(node: Any) -> Node | None:
    """Return the lengths, if a node takes the last valid step of each sequence."""
    _, dim, expanded = _arguments(node, aten.gather.default)[:3]
    view, _ = _arguments(expanded, aten.expand.default)[:2]
    end, shape = _arguments(view, aten.view.default, aten.reshape.default)[:2]
    return _before(end) if dim == 0 and shape is not None and (shape[0], shape[-1]) == (1, 1) else None


def _padding(node: Any) -> Node | None:
    """Return the lengths, if a node is 1 on steps of padding and 0 on others: (steps, batch, 1)."""
    inverse, dim = _arguments(_arguments(node, *CASTS)[0], aten.unsqueeze.default)[:2]
    return (
        _valid(_arguments(inverse, aten.bitwise_not.default, aten.logical_not.default)[0]) if dim in (-1, 2) else None
    )


def _shut(node: Any, hidden: int) -> bool:
    """Whether a node holds the weights that keep the cell on steps of padding: (4 * hidden, 1)."""
    parts = _concatenated(node, (0,)) or ()
    if len(parts) != 3:
        return False
    close, keep, neither = parts
    sizes, value = _arguments(keep, aten.new_full.default)[1:3]
    nothing = _arguments(neither, aten.new_zeros.default)[1]
    return _arguments(close, aten.neg.default)[0] is keep and (sizes, value, nothing) == (
        [hidden, 1],
        SHUT,
        [2 * hidden, 1],
    )


def _alike(one: Node, other: Node) -> bool:
    """Whether two values have the same shape, free sizes included."""
    return str(one.meta["val"].shape) == str(other.meta["val"].shape)
