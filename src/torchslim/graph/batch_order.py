"""Removal of a sort of the batch that is undone later.

`pack_padded_sequence(enforce_sorted=False)` sorts the batch by length, and `pad_packed_sequence` restores its order;
models that sort by themselves do the same. On padded batches the order does not matter: where every operation between
the two treats all samples alike, the program computes the same values without either.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torchslim.graph.recurrent_shapes import LAYERS

aten = torch.ops.aten
SORTS = (aten.sort.default, aten.sort.stable)
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)
SCATTERS = (aten.scatter_.src, aten.scatter.src)
METADATA = aten._assert_tensor_metadata.default
CONSTANTS = (
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)
SAME = object()  # the value of a node that does not depend on the order of the samples
Axis = Any  # the dimension of the samples, a tuple of them for several results, SAME, or None: unknown


def drop_batch_order(program: ExportedProgram) -> None:
    """Delete each sort of the batch whose effect no output has; the program is changed in place."""
    graph = program.graph
    for sort in [node for node in graph.nodes if node.target in SORTS and node.meta["val"][0].dim() == 1]:
        for node in _without_effect(graph, sort):
            given: Any = node.args[0]
            node.replace_all_uses_with(given.args[0] if given is sort else given)
    _erase_unused(graph)
    program.graph_module.recompile()


def _without_effect(graph: Graph, sort: Node) -> list[Node]:
    """Return the nodes that reorder samples as `sort` does, and back, if their inputs can take their places."""
    orders = {node for node in sort.users if node.args[1] == 1}
    inverses, reordering = set[Node](), list[Node]()
    axes: dict[Node, Axis] = {}
    for node in graph.nodes:
        if node.target in CASTS and node.args[0] in orders:
            orders.add(node)
        elif node.target in SCATTERS and _inverts(node, orders):
            inverses.add(node)
        elif node.target is operator.getitem and node.args == (sort, 0):
            axes[node] = 0
            reordering.append(node)
        elif node.target is aten.index_select.default and node.args[2] in orders and node.args[0] not in axes:
            axes[node] = node.args[1] % node.meta["val"].dim()
            reordering.append(node)
        elif any(axes.get(given, SAME) is not SAME for given in node.all_input_nodes) and node.target is not METADATA:
            if node.target is aten.index_select.default and node.args[2] in inverses:
                if axes.get(node.args[0]) != node.args[1] % node.meta["val"].dim():
                    return []
                reordering.append(node)
            elif (axis := _axis(node, axes)) is None:
                return []
            else:
                axes[node] = axis
    return reordering


def _inverts(node: Node, orders: set[Node]) -> bool:
    """Whether a node is the inverse of an order: the index of each place, scattered to it."""
    arguments: Any = node.args
    _, dim, index, source = arguments[:4]
    if index not in orders or dim != 0 or not isinstance(source, Node):
        return False
    if source.target is not aten.arange.default and (source.target is not aten.arange.start or source.args[0] != 0):
        return False
    return bool(statically_known_true(source.meta["val"].shape[0] == index.meta["val"].shape[0]))


def _axis(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    """Return the dimension of the samples in the value of a node; None if samples are not treated alike."""
    target: Any = node.target
    if target is operator.getitem:
        results, index = axes[node.all_input_nodes[0]], node.args[1]
        return results[index] if isinstance(results, tuple) and isinstance(index, int) else None
    if target is aten.sym_size.int or target in CONSTANTS:
        return SAME
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    if torch.Tag.pointwise in target.tags or target in POINTWISE:
        return _pointwise(node, axes)
    rule = RULES.get(target)
    return rule(node, axes) if rule is not None else None


def _pointwise(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    """Samples stand in the same dimension of all operands, counted from the last; others are the same for all."""
    moved = {axes[given] - _dims(given) for given in node.all_input_nodes if _moves(given, axes)}
    if len(moved) != 1:
        return None
    (axis,) = moved
    rest = [given for given in node.all_input_nodes if not _moves(given, axes)]
    return axis + _dims(node) if all(_uniform(given, axis) for given in rest) else None


def _moves(node: Any, axes: Mapping[Node, Axis]) -> bool:
    return isinstance(node, Node) and isinstance(axes.get(node), int)


def _dims(node: Any) -> int:
    return int(node.meta["val"].dim())


def _uniform(node: Node, axis: int) -> bool:
    """Whether a value is the same for all samples: `axis`, counted from the last dimension, repeats one value."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or node.target in CONSTANTS:
        return True
    if value.dim() < -axis or statically_known_true(value.shape[axis] == 1):
        return True
    return node.target in (aten.slice.Tensor, aten.expand.default, *CASTS) and _uniform(node.args[0], axis)  # type: ignore[arg-type]


def _view(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    """The dimension of the same size behind as many elements."""
    given: Any = node.args[0]
    axis, before, after = axes[given], given.meta["val"].shape, node.meta["val"].shape
    return next(
        (
            place
            for place, size in enumerate(after)
            if statically_known_true(size == before[axis])
            and statically_known_true(math.prod(after[:place]) == math.prod(before[:axis]))
        ),
        None,
    )


def _transpose(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    given, *dims = node.args
    first, second = (dim % _dims(given) for dim in dims)  # type: ignore[operator]
    axis = axes[given]  # type: ignore[index]
    return {first: second, second: first}.get(axis, axis)


def _permute(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    given, dims = node.args[:2]
    return [dim % _dims(given) for dim in dims].index(axes[given])  # type: ignore[union-attr, operator, index]


def _along(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    """The samples' own dimension, for an operation along another."""
    given, dim = (*node.args, 0)[:2]
    return axes[given] if dim % _dims(given) != axes[given] else None  # type: ignore[index, operator]


def _select(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    axis = _along(node, axes)
    return None if axis is None else axis - (node.args[1] % _dims(node.args[0]) < axis)  # type: ignore[operator]


def _cat(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    parts: Any = node.args[0]
    dim = (*node.args, 0)[1] % _dims(node)  # type: ignore[operator]
    moved = {axes[part] for part in parts if _moves(part, axes)}
    alike = all(_moves(part, axes) or _uniform(part, next(iter(moved)) - _dims(node)) for part in parts)
    return moved.pop() if len(moved) == 1 and dim not in moved and alike else None


def _gather(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    given, dim, index = node.args[:3]
    both = _moves(given, axes) and _moves(index, axes) and axes[given] == axes[index]  # type: ignore[index]
    return axes[given] if both and dim % _dims(given) != axes[given] else None  # type: ignore[index, operator]


def _reduce(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    """A sum of integers over the samples is the same in any order; one of floats is so but for its rounding."""
    given, dims, keep = (*node.args, None, False)[:3]
    size, axis = _dims(given), axes[given]  # type: ignore[index]
    reduced = range(size) if not dims else [dim % size for dim in dims]  # type: ignore[operator, union-attr]
    if axis in reduced:
        return None if given.meta["val"].is_floating_point() else SAME  # type: ignore[union-attr]
    return axis if keep else axis - sum(dim < axis for dim in reduced)


def _rows(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    """A layer over the last dimension, with the same weights for all samples."""
    given, *rest = node.args
    alone = _moves(given, axes) and not any(_moves(other, axes) for other in rest)
    return axes[given] if alone and axes[given] != _dims(given) - 1 else None  # type: ignore[index]


def _recurrent(node: Node, axes: Mapping[Node, Axis]) -> Axis:
    given, states, parameters = node.args[:3]
    initial: Any = states if isinstance(states, (list, tuple)) else [states]
    axis = 0 if node.args[8] else 1
    fits = axes.get(given) == axis and not any(_moves(parameter, axes) for parameter in parameters)  # type: ignore[arg-type, union-attr]
    fits = fits and all(axes[state] == 1 if _moves(state, axes) else _uniform(state, -2) for state in initial)
    return (axis, *[1] * len(initial)) if fits else None


POINTWISE = (*CASTS, aten.expand.default, aten.clone.default, aten.contiguous.default, aten.dropout.default)
VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
REDUCTIONS = (aten.sum.default, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
Rule = Callable[[Node, Mapping[Node, Axis]], Axis]
RULES: dict[Any, Rule] = {
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _along,
    aten.softmax.int: _along,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.gather.default: _gather,
    aten.linear.default: _rows,
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(LAYERS, _recurrent),
}


def _erase_unused(graph: Graph) -> None:
    """Delete orders that nothing reads; checks of their types and writes into new tensors are no readers."""
    graph.eliminate_dead_code()
    targets = (*SORTS, *SCATTERS, *CASTS, operator.getitem)
    while unread := [
        node for node in graph.nodes if node.target in targets and all(user.target is METADATA for user in node.users)
    ]:
        for node in unread:
            for check in list(node.users):
                graph.erase_node(check)
            graph.erase_node(node)
        graph.eliminate_dead_code()
