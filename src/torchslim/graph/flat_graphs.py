"""Graphs as flat lists of nodes, which can be pickled.

A node of `torch.fx` refers to its neighbors: pickling follows them until the recursion limit. `GraphModule` therefore
pickles Python code, which loses what a conversion reads about the nodes, such as the layers that they belong to.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from torchslim.core.isolation import quiet
from torchslim.errors import ModelError

VALUE = "val"  # the key in `Node.meta` of what a node returned in its capture
REGISTERED_BY = {"quantized_decomposed": "torchao.quantization.pt2e"}
STATE = ("training", "_parameters", "_buffers", "_non_persistent_buffers_set")  # without hooks
PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, slots=True)
class NodeName:
    """Stands for a node in the arguments of another."""

    name: str


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of PyTorch, by its path under `torch.ops`."""

    path: str


@dataclass(frozen=True, slots=True)
class Value:
    """Shape and type of a tensor; a free size is that of the example of the capture."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatNode:
    """A node without references to others."""

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    meta: Mapping[str, Any]


class FlatGraph(nn.Module):
    """Stands for a `GraphModule` in a pickle, which restores the graph itself.

    Kept: the nodes with their names, order and arguments, plain data in `Node.meta`, weights, submodules, and the
    entries of the module's own `meta` that are asked for. Fake tensors of the capture become shapes and types.
    Unpickling runs code, as that of every module: only load files that you trust.
    """

    def __init__(self, module: GraphModule, kept_meta: Sequence[str]) -> None:
        super().__init__()
        self.nodes = [_flat_node(node) for node in module.graph.nodes]
        ordinary = vars(GraphModule(nn.Module(), Graph())).keys() | {"train", "eval"}  # torchao replaces these two
        attributes = {name: value for name, value in vars(module).items() if name not in ordinary}
        attributes |= {name: vars(module)[name] for name in STATE}
        attributes["_modules"] = {name: flat_module(child, kept_meta) for name, child in module._modules.items()}
        attributes["meta"] = {key: module.meta[key] for key in kept_meta if key in module.meta}
        self.attributes = attributes

    def __reduce__(self) -> tuple[Callable[..., GraphModule], tuple[Any, ...]]:
        return restored, (self.nodes, self.attributes)


def flat_module(module: Any, kept_meta: Sequence[str]) -> Any:
    """The module with a `FlatGraph` in place of every graph in it; the module itself if it holds none."""
    if isinstance(module, GraphModule):
        return FlatGraph(module, kept_meta)
    if not isinstance(module, nn.Module) or not any(isinstance(inner, GraphModule) for inner in module.modules()):
        return module
    copied = module.__class__.__new__(module.__class__)
    vars(copied).update(vars(module))
    vars(copied)["_modules"] = {name: flat_module(child, kept_meta) for name, child in module._modules.items()}
    return copied


def restored(nodes: Sequence[FlatNode], attributes: Mapping[str, Any]) -> GraphModule:
    """The graph that a `FlatGraph` was made from.

    Raises:
        ModelError: an operation is missing in this process, such as one of another version of PyTorch.
    """
    graph = Graph()
    made: dict[str, Node] = {}

    def real(argument: Any) -> Any:
        return made[argument.name] if isinstance(argument, NodeName) else argument

    for flat in nodes:
        target = _found(flat.target) if isinstance(flat.target, Operation) else flat.target
        args, kwargs = _mapped(flat.args, real), _mapped(flat.kwargs, real)
        made[flat.name] = node = graph.create_node(flat.op, target, args, kwargs, name=flat.name)
        node.meta = {key: _filled(value) if key == VALUE else value for key, value in flat.meta.items()}
    module = GraphModule(nn.Module(), Graph())
    vars(module).update(attributes)
    module.graph = graph
    return module


def _flat_node(node: Node) -> FlatNode:
    def named(argument: Any) -> Any:
        return NodeName(argument.name) if isinstance(argument, Node) else argument

    meta = {key: value for key, value in node.meta.items() if key != VALUE and _is_plain(value)}
    if VALUE in node.meta:
        meta[VALUE] = _value(node.meta[VALUE])
    return FlatNode(
        name=node.name,
        op=node.op,
        target=_named(node.target),
        args=_mapped(node.args, named),
        kwargs=_mapped(node.kwargs, named),
        meta=meta,
    )


def _mapped(arguments: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments of a node as ordinary tuples, lists and dicts, with every leaf changed."""
    if isinstance(arguments, tuple):
        return tuple(_mapped(item, change) for item in arguments)
    if isinstance(arguments, list):
        return [_mapped(item, change) for item in arguments]
    if isinstance(arguments, dict):
        return {key: _mapped(item, change) for key, item in arguments.items()}
    return map_aggregate(arguments, change)


def _named(target: Any) -> Any:
    if isinstance(target, OpOverload):
        return Operation(f"{target.namespace}.{target._opname}.{target._overloadname}")
    if isinstance(target, HigherOrderOperator):
        return Operation(f"higher_order.{target.name()}")
    return target


def _found(operation: Operation) -> Any:
    library = REGISTERED_BY.get(operation.path.partition(".")[0])
    try:
        if library is not None:
            with quiet():
                __import__(library)
        return reduce(getattr, operation.path.split("."), torch.ops)
    except (AttributeError, ImportError) as error:
        raise ModelError(
            f"the pickled graph calls torch.ops.{operation.path}, which this process lacks; load it with the versions "
            "of torch and torchao that wrote it, and import the library that defines the operation first"
        ) from error


def _is_plain(value: Any) -> bool:
    """Whether a value is numbers and text, in tuples, lists and dicts."""
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return all(map(_is_plain, value)) if type(value) in (tuple, list) else type(value) in PLAIN


def _value(value: Any) -> Any:
    """What is known about a node's value: tensors without their numbers, sizes of the example."""
    if isinstance(value, Tensor):
        return Value(tuple(map(_size, value.shape)), value.dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(map(_value, value)) if type(value) in (tuple, list) else tuple(map(_value, value))
    return value if type(value) in PLAIN else None


def _size(size: Any) -> int:
    """A size; for a free one, that of the example, and 2 where it depends on values."""
    hint = size if isinstance(size, int) else size.node.hint
    return 2 if hint is None else operator.index(hint)


def _filled(value: Any) -> Any:
    """The value of a node for code that looks at its shape and type: a tensor without memory."""
    if isinstance(value, Value):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return type(value)(map(_filled, value)) if type(value) in (tuple, list) else value
