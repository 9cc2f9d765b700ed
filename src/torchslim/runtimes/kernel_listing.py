"""What a deployed model really executes: the kernels that a runtime made of a graph, by the layers they compute."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from torchslim.graph.export import layer_of
from torchslim.runtimes.spec import Kernel

if TYPE_CHECKING:
    from torchslim.runtimes.base import Deployed

# of ONNX Runtime's operations, those whose names alone do not tell that they compute on integers
ONNX_INTEGER = (
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "QAttention",
    "QEmbedLayerNormalization",
    "QGemm",
    "MatMulNBits",
    "MatMulBnb4",
    "GatherBlockQuantized",
)
# it quantizes the weights of layers between quantized ones, also of those that were left in float on purpose
UNWANTED = ["WeightBiasQuantization"]
ONNX_WORK = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Attention")
SAME_NUMBERS = (
    "MaxPool",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "Slice",
    "Split",
    "Gather",
)


def decomposed(node: Any) -> str:
    """The name of an operation between floats and integers, `quantize_per_tensor.default`; empty for any other.

    By name, since torch knows these operations only where torchao was imported.
    """
    found = re.fullmatch(r"quantized_decomposed\.(.*)", str(getattr(node, "target", "")))
    return found[1] if found else ""


def unique(names: Sequence[str]) -> list[str]:
    """The names, with a number behind all but the first of those that repeat."""
    count: Counter[str] = Counter()
    taken = set(names)
    found = []
    for name in names:
        count[name] += 1
        new = name
        while count[name] > 1 and (new := f"{name}_{count[name] - 1}") in taken:
            count[name] += 1
        taken.add(new)
        found.append(new)
    return found


def eager_kernels(module: GraphModule) -> list[Kernel]:
    """Op by op, on floats that were dequantized, but for the integer kernels that `integer_kernels.lower` put in."""
    found = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            operation, integer = str(node.target).removesuffix(".default"), False
        elif node.op == "call_module" and str(node.target).startswith("integer_kernel"):
            operation, integer = type(module.get_submodule(str(node.target))).__name__, True
        else:
            continue
        found.append(Kernel(node=f"{layer_of(node)}/{operation}", type=operation, integer=integer))
    return found


def onnx_kernels(deployed: Deployed) -> list[Kernel]:
    """The nodes of the graph that ONNX Runtime makes of the model when it loads it, on the CPU."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        # weights beside the model: it may be above protobuf's limit
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        onnxruntime.InferenceSession(
            deployed.payload, options, providers=["CPUExecutionProvider"], disabled_optimizers=UNWANTED
        )
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    narrow, names = _narrow(graph), _Origins(onnx.load_from_string(deployed.payload).graph, graph)
    found = []
    for node in graph.node:
        name, fused = names.of(node)
        found.append(Kernel(node=name, type=node.op_type, integer=_onnx_integer(node, narrow), fused=fused))
    return found


class _Origins:
    """Which nodes of an ONNX model became a node of its optimized graph: those between its output and its inputs.

    The optimizer keeps the names of most values; to those that it lays out anew it adds an ending.
    """

    def __init__(self, before: Any, after: Any) -> None:
        self.producers = {name: node for node in before.node for name in node.output}
        self.names = {node.name for node in before.node}
        # a node in another layout is called like the value that it gave
        self.kept = {_plain(name) for node in after.node for name in (*node.output, node.name)}
        self.kept |= {input_.name for input_ in after.input}

    def of(self, node: Any) -> tuple[str, tuple[str, ...]]:
        """The name of the node that does the work, and of all that it is made of."""
        own = _plain(node.name).removeprefix("fused ")
        if node.op_type.startswith("Reorder") or (node.op_type == "Transpose" and own not in self.names):
            return own, ()
        todo, nodes = [own, *map(_plain, node.output)], []
        while todo:
            producer = self.producers.get(todo.pop(0))
            if producer is not None and producer not in nodes:
                nodes.append(producer)
                todo += [name for name in producer.input if name not in self.kept]
        if own not in self.names:
            works = [each.name for each in nodes if each.op_type in ONNX_WORK]
            own = works[0] if works else nodes[0].name if nodes else own
        made = tuple(each.name for each in nodes if not each.op_type.endswith(("DequantizeLinear", "Constant")))
        return own, made if own in made and len(made) > 1 else ()


def _plain(name: str) -> str:
    return re.sub(r"(_nchwc|_token_\d+|_transpose|_layout_transform|/MatMulAddFusion)+$", "", name)


def _onnx_integer(node: Any, narrow: set[str]) -> bool:
    if node.op_type in ONNX_INTEGER or (node.op_type.startswith("QLinear") or node.op_type.startswith("NhwcMaxPool")):
        return True
    return node.op_type in SAME_NUMBERS and node.input[0] in narrow


def _narrow(graph: Any) -> set[str]:
    """The names of values that are 8-bit integers: what is quantized, and what follows from it unchanged."""
    narrow: set[str] = set()
    for node in graph.node:
        quantized = node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear", "QGemm") or "QLinear" in node.op_type
        if quantized or (node.op_type in SAME_NUMBERS and node.input[0] in narrow):
            narrow.add(node.output[0])
    return narrow
