"""Decomposition of single nodes of a program, in place of a trace of the whole program.

`ExportedProgram.run_decompositions` runs the whole program once more on fake tensors, which takes several times as long
as its capture. A converter that has translations for most operations needs few nodes decomposed; here these nodes alone
are traced, and in-place operations become ones that return new tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import _Namespace
from torch.fx.node import map_arg

from torchslim.graph.program_editor import Editor
from torchslim.graph.rewrite import graft

DEPTH = 16  # decompositions inside one another: torch's own nest less than half as deep
IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd
ASSERTIONS = (
    torch.ops.aten._assert_async.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
)
Table = Mapping[Any, Callable[..., Any]]


class NotLocal(Exception):
    """The program cannot be decomposed node by node: only a trace of the whole program knows what it computes."""


def decompose_nodes(program: ExportedProgram, known: Callable[[Node], bool], table: Table) -> ExportedProgram:
    """Return a copy of the program whose operations are known to a converter and change no tensor in place.

    Args:
        program: not modified.
        known: whether the converter translates the operation of a node.
        table: decompositions by operation; composite operations without an entry have their own.

    Raises:
        NotLocal: the program has graphs inside, changes inputs or aliased tensors, or has an operation that is not
            known and cannot be decomposed.
    """
    _check(program)
    editor = Editor(program)
    editor.changed = True
    graph = editor.graph
    for node in [node for node in graph.nodes if node.target in ASSERTIONS]:
        graph.erase_node(node)
    graph.eliminate_dead_code()
    _without_mutation(graph)
    with torch.no_grad():
        for node in [node for node in graph.nodes if node.op == "call_function"]:
            _decompose(editor, node, known, table, DEPTH)
    _name_by_operation(graph)
    return editor.finished()


def _name_by_operation(graph: Graph) -> None:
    """Name nodes after their operations, as a trace does: files then depend on no pass that inserted nodes."""
    graph.eliminate_dead_code()
    names = _Namespace()
    for node in graph.nodes:
        name = node.name
        if node.op == "call_function":
            name = node.target._opname if isinstance(node.target, OpOverload) else node.target.__name__
        node.name = names.create_name(name, node)
    graph._graph_namespace = names


def _check(program: ExportedProgram) -> None:
    signature = program.graph_signature
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in signature.output_specs):
        raise NotLocal("a call changes inputs or buffers")
    if any(spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN) for spec in signature.input_specs):
        raise NotLocal("inputs are no tensors")
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise NotLocal(f"{node} is a graph inside the program")


def _decompose(editor: Editor, node: Node, known: Callable[[Node], bool], table: Table, depth: int) -> None:
    """Replace a node that is not known by its decomposition, until all its parts are known."""
    if node.target is operator.getitem or known(node):
        return
    if not isinstance(node.target, OpOverload) or not depth or node.target._schema.is_mutable:
        raise NotLocal(f"{node.target} has no decomposition")
    implicit = node.target.has_kernel_for_dispatch_key(IMPLICIT)
    function = node.target.decompose if implicit else table.get(node.target)
    if function is None:
        raise NotLocal(f"{node.target} has no decomposition")
    inputs = node.all_input_nodes
    # composite operations inside a decomposition stay whole where possible: the converter may know them
    traced = _trace(node, inputs, function, whole=not implicit)
    if any(part.op == "get_attr" for part in traced.nodes):
        raise NotLocal(f"the decomposition of {node.target} stores tensors")
    _without_mutation(traced)
    last = node.prev
    result = graft(editor.graph, traced, inputs, node, node)
    parts = list(_between(last, node))
    _substitute(editor.graph, node, result)
    for part in parts:
        if part.op == "call_function":
            _decompose(editor, part, known, table, depth - 1)


def _trace(node: Node, inputs: list[Node], function: Callable[..., Any], *, whole: bool) -> Graph:
    """Trace one level of a node's decomposition on its fake inputs; with `whole` no composite operation is opened."""
    values = [input_.meta["val"] for input_ in inputs]
    tensors = [value for value in _tensors(values) if hasattr(value, "fake_mode")]
    mode = tensors[0].fake_mode if tensors else None

    def call(*given: Any) -> Any:
        by_node = dict(zip(inputs, given, strict=True))
        return function(*map_arg(node.args, by_node.__getitem__), **map_arg(node.kwargs, by_node.__getitem__))

    symbols = mode is not None and mode.shape_env is not None
    unguarded = mode.shape_env.suppress_guards() if symbols else nullcontext()  # type: ignore[union-attr]
    try:
        with mode or nullcontext(), unguarded:
            return make_fx(call, tracing_mode="symbolic" if symbols else "real", pre_dispatch=whole)(*values).graph
    except Exception as error:
        raise NotLocal(f"{node.target} cannot be traced: {type(error).__name__}: {error}") from error


def _substitute(graph: Graph, node: Node, result: Any) -> None:
    """Use the result of a decomposition in place of a node."""
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    elif isinstance(result, (tuple, list)):
        for user in list(node.users):
            place: Any = user.args[1] if user.target is operator.getitem else None
            if place is None or not isinstance(result[place], Node):
                raise NotLocal(f"{user} reads all results of {node} at once")
            user.replace_all_uses_with(result[place])
            graph.erase_node(user)
    else:
        raise NotLocal(f"{node} is a number")
    graph.erase_node(node)


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _tensors(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            found += _tensors(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


# ----------------------------------------------------------------------------------------------------------------------


def _without_mutation(graph: Graph) -> None:
    """Replace in-place operations by those that return a new tensor; later readers read that.

    Raises:
        NotLocal: the changed memory is an input's, or has other names that are read later.
    """
    nodes = list(graph.nodes)
    if not any(_is_mutable(node) for node in nodes):
        return
    order = {node: place for place, node in enumerate(nodes)}
    memory: dict[Node, list[Node]] = {}  # the nodes that share a node's memory, itself included
    for node in nodes:
        shared = [node]
        if _is_mutable(node):
            _return_new(node, order, memory)
        else:
            for source in _viewed(node):
                if memory[source] is not shared:
                    shared = _joined(memory, memory[source], shared)
        memory[node] = shared


def _joined(memory: dict[Node, list[Node]], one: list[Node], other: list[Node]) -> list[Node]:
    one += other
    for node in other:
        memory[node] = one
    return one


def _return_new(node: Node, order: Mapping[Node, int], memory: Mapping[Node, list[Node]]) -> None:
    target, source = node.target, node.args[0] if node.args else None
    assert isinstance(target, OpOverload)
    schema = target._schema
    changed = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    twin = _twin(target)
    if twin is None or not isinstance(source, Node) or changed != [schema.arguments[0].name]:
        raise NotLocal(f"{target} changes its inputs")
    for name in memory[source]:
        read_later = any(order[user] > order[node] for user in name.users)
        if name.op == "placeholder" or (name is not source and read_later):
            raise NotLocal(f"{node} changes a tensor that has another name")
    node.target = twin
    source.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])


def _is_mutable(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _twin(target: OpOverload) -> OpOverload | None:
    """Return `aten.relu` for `aten.relu_`: the same arguments and a new tensor; None where there is none."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    twin = getattr(packet, target._overloadname, None)
    if twin is None or twin._schema.is_mutable:
        return None
    # the first argument may have another name: `input` of dropout is `self` of dropout_
    names = [[argument.name for argument in schema.arguments[1:]] for schema in (twin._schema, target._schema)]
    return twin if names[0] == names[1] and len(twin._schema.returns) == 1 else None


def _viewed(node: Node) -> list[Node]:
    """Return the inputs whose memory the result of a node shares, or may share."""
    if node.op != "call_function":
        return []
    if not isinstance(node.target, OpOverload):
        return node.all_input_nodes if node.target is operator.getitem else []
    schema = node.target._schema
    if any(value.alias_info for value in schema.returns):
        return node.all_input_nodes
    if not node.target.has_kernel_for_dispatch_key(IMPLICIT):
        return []
    # a composite operation may return its input, as dropout does, which its schema does not say
    result = node.meta.get("val")
    alike = []
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        both = isinstance(value, Tensor) and isinstance(result, Tensor)
        if not both or (value.dtype == result.dtype and str(value.numel()) == str(result.numel())):  # type: ignore[union-attr]
            alike.append(source)
    return [source for source in alike if _shares_memory(node, source)]


def _shares_memory(node: Node, source: Node) -> bool:
    """Run a node on its fake inputs and compare the memory of its result with that of one input."""
    values = {input_: input_.meta.get("val") for input_ in node.all_input_nodes}
    fakes = [value for value in _tensors(values.values()) if hasattr(value, "fake_mode")]
    if not fakes:
        return True
    mode = fakes[0].fake_mode
    unguarded = mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext()
    try:
        with mode, unguarded, torch.no_grad():
            args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - what cannot be run may share its memory
        return True
    memories = {tensor.untyped_storage()._cdata for tensor in _tensors([values[source]])}
    return any(tensor.untyped_storage()._cdata in memories for tensor in _tensors([result]))
