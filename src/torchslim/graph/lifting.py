"""A graph that was changed after its capture, as an exported program: without tracing it once more.

The nodes of a captured program hold fake tensors, whose free sizes are symbols. A pass that inserts nodes leaves gaps;
running the graph on the fake inputs fills them. Weights, which such a graph reads as attributes, become inputs again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from torchslim.core.isolation import quiet
from torchslim.core.step import Inputs
from torchslim.errors import TorchslimError
from torchslim.graph.calling import bind, examples_of
from torchslim.graph.capture_sizes import other_sizes
from torchslim.graph.dynamic_sizes import lists_dimensions, normalized, sampled_as
from torchslim.graph.export import WRAPPED, Captured, capture, own
from torchslim.graph.io_structure import build, flatten
from torchslim.graph.recurrent_shapes import recurrent_kept_whole

PREFIXES = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b", InputKind.CONSTANT_TENSOR: "c"}
INSIDE = f"{WRAPPED}program."  # where the weights stand in the wrapped model that an export would see


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How the graph of a quantized model was captured.

    Attributes:
        frame: the capture; its program holds the graph of the float model without weights.
        dynamic_shapes: the argument of the capture; None, "batch", "auto" or lists of dimensions.
    """

    frame: Captured
    dynamic_shapes: str | Mapping[str, Sequence[int]] | None

    @classmethod
    def of(cls, captured: Captured, dynamic_shapes: Any) -> Origin | None:
        """The origin of a capture; None where the caller named the free sizes, which deployment must export anew."""
        dynamic_shapes = normalized(dynamic_shapes)
        if dynamic_shapes is not None and not isinstance(dynamic_shapes, str) and not lists_dimensions(dynamic_shapes):
            return None
        light = copy.copy(captured.program)
        light._state_dict, light._constants = {}, {}
        return cls(frame=replace(captured, program=light), dynamic_shapes=dynamic_shapes)

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # fake tensors cannot be pickled; deployment then exports again


@runtime_checkable
class HasOrigin(Protocol):
    """A model whose `program`, with flat tensors in and out and weights as attributes, was captured before."""

    program: GraphModule
    origin: Origin | None


def captured_of(model: nn.Module, example_inputs: Inputs | list[Inputs], dynamic_shapes: Any) -> Captured:
    """The program of a model: made from the capture that it holds, else exported.

    Args, errors: as of `capture`.
    """
    return lifted(model, example_inputs, dynamic_shapes) or capture(model, example_inputs, dynamic_shapes)


def lifted(model: nn.Module, example_inputs: Inputs | list[Inputs], dynamic_shapes: Any) -> Captured | None:
    """The program of a model that holds the graph of a capture; None where the model must be exported.

    Args:
        model: not modified.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        dynamic_shapes: as of `capture`.
    """
    if not isinstance(model, HasOrigin) or model.origin is None:
        return None
    captured_as, dynamic_shapes = model.origin.dynamic_shapes, normalized(dynamic_shapes)
    if dynamic_shapes != captured_as and (dynamic_shapes, captured_as) != ("batch", "auto"):
        return None
    frame, graph = model.origin.frame, model.program
    examples = [_leaves(model, frame, example) for example in examples_of(example_inputs)]
    if any(leaves is None for leaves in examples):
        return None
    leaves, *others = [leaves for leaves in examples if leaves is not None]
    copied = _copy(graph)
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    modes = {id(value.fake_mode): value.fake_mode for value in values if isinstance(value, FakeTensor)}
    if copied is None or len(modes) != 1 or not all(isinstance(value, FakeTensor) for value in values):
        return None
    (mode,) = modes.values()
    sampled = _sampled(frame, leaves)
    no_guards = mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext()
    with quiet(), torch.no_grad(), no_guards, enable_python_dispatcher(), recurrent_kept_whole():
        FakeTensorProp(copied, mode).propagate_dont_convert_inputs(*values)
        program = _program(copied, frame.program, mode, sampled)
    return replace(
        frame,
        program=own(program),
        example=build(frame.inputs, sampled, frame.classes),
        given=build(frame.inputs, leaves, frame.classes),
        variants=other_sizes(sampled, (_sampled(frame, variant) for variant in others)),
    )


def _leaves(model: nn.Module, frame: Captured, example_inputs: Inputs) -> list[Tensor] | None:
    """The flat inputs, if the captured program takes them as they are."""
    named = bind(model, example_inputs)
    if tuple(named) != frame.names:
        return None
    try:
        leaves = [leaf.detach().cpu().clone() for leaf in flatten(frame.inputs, named, "inputs")]
    except TorchslimError:  # another structure of inputs is another program
        return None
    pairs = zip(leaves, frame.inputs_of_program(), strict=True)
    alike = all((leaf.dtype, leaf.dim()) == (value.dtype, value.dim()) for leaf, value in pairs)
    return leaves if alike and frame.takes(leaves) else None


def _sampled(frame: Captured, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The leaves with as many samples as the program was captured with."""
    return sampled_as(flatten(frame.inputs, frame.example), leaves, frame.batch_axis, frame.batched)


def _copy(graph: GraphModule) -> GraphModule | None:
    """A copy of the nodes that shares the weights; None where they hold more than operations on tensors."""
    copied = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in copied.graph.nodes:
        if node.op == "call_module" or "unbacked_bindings" in node.meta:
            return None
        if node.op == "get_attr" and not isinstance(_attribute(graph, node.target), Tensor):
            return None  # the body of a loop or a branch
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "get_attr":
            return None  # state that a call changes
    copied.recompile()
    return copied


def _program(graph: GraphModule, captured: ExportedProgram, mode: Any, example: Sequence[Tensor]) -> ExportedProgram:
    """The program of a graph whose nodes hold their values; its weights become inputs."""
    nodes: Graph = graph.graph
    specs, lifted_nodes = [], {}
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    first = next(iter(nodes.nodes))
    for kind, target in _weights(graph):
        value = _attribute(graph, target)
        name = INSIDE + target
        with nodes.inserting_before(first):
            node = nodes.placeholder(f"{PREFIXES[kind]}_{name.replace('.', '_')}")
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        persistent = None if kind != InputKind.BUFFER else _persists(graph, target)
        (state if kind == InputKind.PARAMETER or persistent else constants)[name] = value
        specs.append(InputSpec(kind, TensorArgument(name=node.name), name, persistent))
        lifted_nodes[target] = node
    for node in list(nodes.nodes):
        if node.op == "get_attr":
            node.replace_all_uses_with(lifted_nodes[node.target])
            nodes.erase_node(node)
    return ExportedProgram(
        root={},
        graph=nodes,
        graph_signature=ExportGraphSignature(
            [*specs, *captured.graph_signature.input_specs[-len(example) :]],
            [OutputSpec(OutputKind.USER_OUTPUT, _argument(value), None) for value in _outputs(nodes)],
        ),
        state_dict=state,
        range_constraints=dict(captured.range_constraints),
        module_call_graph=captured.module_call_graph,
        example_inputs=(tuple(example), {}),
        constants=constants,
        verifiers=list(captured.verifiers),
    )


def _weights(graph: GraphModule) -> list[tuple[InputKind, str]]:
    """Kinds and names of the attributes that the nodes read: parameters, then buffers, then constants."""
    targets = dict.fromkeys(node.target for node in graph.graph.nodes if node.op == "get_attr")
    buffers = {name for name, _ in graph.named_buffers(remove_duplicate=False)}

    def kind(target: str) -> InputKind:
        if isinstance(_attribute(graph, target), nn.Parameter):
            return InputKind.PARAMETER
        return InputKind.BUFFER if target in buffers else InputKind.CONSTANT_TENSOR

    order = list(PREFIXES)
    return sorted(((kind(target), target) for target in targets), key=lambda pair: order.index(pair[0]))


def _persists(graph: GraphModule, target: str) -> bool:
    path, _, name = target.rpartition(".")
    return name not in graph.get_submodule(path)._non_persistent_buffers_set


def _attribute(module: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


def _outputs(nodes: Graph) -> Sequence[Any]:
    output: Node = next(node for node in reversed(nodes.nodes) if node.op == "output")
    outputs: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    return outputs


def _argument(value: Any) -> Any:
    return TensorArgument(name=value.name) if isinstance(value, Node) else ConstantArgument(name="", value=value)
