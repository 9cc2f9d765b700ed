"""The layers of a captured program: their MACs, bits of weights, and types of activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from torchslim.core.files import digest
from torchslim.graph.export import layer_of
from torchslim.graph.integer_patterns import Int8Weight, find_dynamic, find_int4, find_int8

aten = torch.ops.aten
Sizes = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """An operation that multiplies: a layer with weights, or a product of two activations.

    Attributes:
        layer: path of the operation's module; the node's name where there is no module.
        operation: the ATen operation.
        macs: multiply-accumulates of one sample.
        weight_bits: bits of a stored weight: 8, 4, or those of the float type; None for a product of activations.
        activations: numbers that the layer is meant to compute with: "static" or "dynamic" integers, or "float".
    """

    layer: str
    operation: str
    macs: int
    weight_bits: int | None
    activations: str

    @property
    def asks_for_integers(self) -> bool:
        """Whether the layer is meant to compute on integers."""
        return self.activations != "float"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict."""
        return asdict(self)


def _convolution(sizes: Sizes, out: tuple[int, ...]) -> int:
    return math.prod(out) * math.prod(sizes[1][1:])


def _transposed(sizes: Sizes, out: tuple[int, ...]) -> int:
    return math.prod(sizes[0]) * math.prod(sizes[1][1:])


def _product(sizes: Sizes, out: tuple[int, ...]) -> int:
    return math.prod(out) * sizes[-2][-1]


def _linear(sizes: Sizes, out: tuple[int, ...]) -> int:
    return math.prod(out) * sizes[1][-1]


def _attention(sizes: Sizes, out: tuple[int, ...]) -> int:
    query, key, value = sizes[:3]
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(sizes: Sizes, out: tuple[int, ...]) -> int:
    steps = math.prod(sizes[0][:-1])
    return steps * sum(math.prod(size) for size in sizes[1:] if len(size) == 2)


MULTIPLY: Mapping[str, Callable[[Sizes, tuple[int, ...]], int]] = {
    **{f"aten::conv{rank}d": _convolution for rank in (1, 2, 3)},
    **{f"aten::conv_transpose{rank}d": _transposed for rank in (1, 2, 3)},
    "aten::convolution": _convolution,
    "aten::linear": _linear,
    "aten::addmm": _product,
    "aten::mm": _product,
    "aten::bmm": _product,
    "aten::baddbmm": _product,
    "aten::matmul": _product,
    "aten::scaled_dot_product_attention": _attention,
    "aten::lstm": _recurrent,
    "aten::gru": _recurrent,
}
WEIGHTS = {"linear": 1, "addmm": 2, "mm": 1, "matmul": 1, "bmm": 1, "baddbmm": 2}  # index of the argument; others: 1


def layers_of(program: ExportedProgram, batch_axis: int | None) -> list[Layer]:
    """List the layers of a captured program in graph order; MACs are for one sample of the example inputs."""
    stored = stored_tensors(program)
    samples = _samples(program, batch_axis)
    layers = []
    for node in program.graph.nodes:
        if not multiplies(node):
            continue
        name = _name(node)
        sizes = [size for tensor in _tensors(node) if (size := _size(tensor))]
        out = _size(node)
        weight, bits = _weight(node, name, stored)
        source = node.args[1] if name in ("aten::addmm", "aten::baddbmm") else node.args[0]
        layers.append(
            Layer(
                layer=layer_of(node),
                operation=name.removeprefix("aten::"),
                macs=MULTIPLY[name](sizes, out) // samples,
                weight_bits=bits,
                activations=_activations(source) if weight else _both(node),
            )
        )
    return layers


def structure_of(program: ExportedProgram) -> str:
    """Return a digest of a program's operations, sizes and types, without the values of its tensors.

    Two programs with the same digest take the same time on the same runtime.
    """
    places: dict[Node, int] = {}  # numbered by first use: the order in which tensors are stored must not matter

    def shown(value: Any) -> str:
        if isinstance(value, Node):
            suffix = "" if value.op == "call_function" or value in places else f" {kind(value.meta.get('val'))}"
            return f"%{places.setdefault(value, len(places))}{suffix}"
        if isinstance(value, (list, tuple)):
            return f"[{','.join(map(shown, value))}]"
        return "float" if isinstance(value, float) else "?" if isinstance(value, torch.SymInt) else repr(value)

    def kind(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype}{[size if isinstance(size, int) else '?' for size in value.shape]}"
        return f"[{','.join(map(kind, value))}]" if isinstance(value, (list, tuple)) else type(value).__name__

    parts = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        name = str(node.target) if node.op == "call_function" else node.op
        # scales and zero points depend on the calibration data
        inputs = node.all_input_nodes if "quantized_decomposed" in name else [*node.args, *sorted(node.kwargs.items())]
        parts.append(f"{shown(node)} {name}({shown(inputs)}) {kind(node.meta.get('val'))}")
    return digest(parts)


def multiplies(node: Node) -> bool:
    """Whether `layers_of` lists the node."""
    return _name(node) in MULTIPLY and bool(_size(node)) and any(_size(tensor) for tensor in _tensors(node))


def stored_tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """Return parameters, buffers and constants by the names of their placeholders."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    owners = {**program.constants, **program.state_dict}
    return {name: value for name, key in names.items() if isinstance(value := owners.get(key), Tensor)}


def _name(node: Node) -> str:
    target = node.target
    return target.name().partition(".")[0] if isinstance(target, torch._ops.OpOverload) else ""


def _tensors(node: Node) -> list[Node]:
    flat: list[Node] = []
    for argument in node.args:
        flat += [
            item for item in (argument if isinstance(argument, (list, tuple)) else [argument]) if isinstance(item, Node)
        ]
    return flat


def _size(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return tuple(_hint(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _hint(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size.node.hint or 1)


def _samples(program: ExportedProgram, batch_axis: int | None) -> int:
    if batch_axis is None:
        return 1
    input_names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in input_names or not isinstance(value, Tensor):
            continue
        if value.dim() > batch_axis and isinstance(value.shape[batch_axis], torch.SymInt):
            return max(1, _hint(value.shape[batch_axis]))
    return 1


def _weight(node: Node, name: str, stored: Mapping[str, Tensor]) -> tuple[bool, int | None]:
    """Whether the node has a stored weight, and the bits of that weight."""

    def constant(value: Any) -> Tensor | None:
        return stored.get(value.name) if isinstance(value, Node) else None

    short = name.removeprefix("aten::")
    if short == "scaled_dot_product_attention":
        return False, None
    argument: Any = node.args[2] if short in ("lstm", "gru") else node.args[WEIGHTS.get(short, 1)]
    argument = argument[0] if isinstance(argument, (list, tuple)) else argument
    visited: set[Any] = set()
    while isinstance(argument, Node) and argument not in visited:
        visited.add(argument)
        if isinstance(find_int8(argument, constant), Int8Weight):
            return True, 8
        if find_int4(argument, constant) is not None:
            return True, 4
        if (value := constant(argument)) is not None:
            return True, 8 * value.element_size()
        if len(argument.all_input_nodes) != 1:
            return False, None
        argument = argument.all_input_nodes[0]  # a transpose, a view, a cast
    return False, None


def _activations(source: Any) -> str:
    if not isinstance(source, Node):
        return "float"
    if find_dynamic(source) is not None:
        return "dynamic"
    return "static" if "dequantize_per_tensor" in _name(source) else "float"


def _both(node: Node) -> str:
    factors = _tensors(node)[1:3] if _name(node) == "aten::baddbmm" else _tensors(node)[:2]
    kinds = {_activations(factor) for factor in factors}
    return kinds.pop() if len(kinds) == 1 else "float"
