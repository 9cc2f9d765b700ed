"""Lists the kernels that a runtime really executes for a graph, by the layers that they compute."""

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

# ONNX Runtime's operations on integers, without those that `_onnx_integer` recognizes by their names' beginnings
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
# this optimizer quantizes the weights of layers between quantized ones, also if they were left in float on purpose
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
    """Name of an operation between floats and integers, as `quantize_per_tensor.default`; empty for other nodes.

    The name is compared as text, since torch has these operations only after torchao was imported.
    """
    match = re.fullmatch(r"quantized_decomposed\.(.*)", str(getattr(node, "target", "")))
    return match[1] if match else ""


def unique(names: Sequence[str]) -> list[str]:
    """The names, made unique: a number is appended to all but the first of equal names."""
    counts: Counter[str] = Counter()
    used = set(names)
    unique_names = []
    for name in names:
        counts[name] += 1
        new = name
        while counts[name] > 1 and (new := f"{name}_{counts[name] - 1}") in used:
            counts[name] += 1
        used.add(new)
        unique_names.append(new)
    return unique_names


def eager_kernels(module: GraphModule) -> list[Kernel]:
    """One kernel on floats for each operation, and the integer kernels that `torch_integer_kernels.lower` inserted."""
    kernels = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            operation, integer = str(node.target).removesuffix(".default"), False
        elif node.op == "call_module" and str(node.target).startswith("integer_kernel"):
            operation, integer = type(module.get_submodule(str(node.target))).__name__, True
        else:
            continue
        kernels.append(Kernel(node=f"{layer_of(node)}/{operation}", type=operation, integer=integer))
    return kernels


def onnx_kernels(deployed: Deployed) -> list[Kernel]:
    """Nodes of the optimized graph that ONNX Runtime makes when it loads the model, on the CPU."""
    import onnx

    graph = _optimized(deployed)
    return _onnx_kernels(graph, _Origins(onnx.load_from_string(deployed.payload).graph, graph))


def _onnx_kernels(graph: Any, origins: _Origins) -> list[Kernel]:
    narrow = _narrow(graph)
    kernels = []
    for node in graph.node:
        name, fused = origins.of(node)
        kernels.append(Kernel(node=name, type=node.op_type, integer=_onnx_integer(node, narrow), fused=fused))
    return kernels


def onnx_origins(deployed: Deployed) -> list[tuple[Any, Kernel, tuple[int, ...]]]:
    """Nodes of the optimized graph, each as a kernel and with the places of its makers.

    Its makers are the nodes that compute its inputs; -1 stands for the inputs of the graph.
    """
    import onnx

    graph = _optimized(deployed)
    origins = _Origins(onnx.load_from_string(deployed.payload).graph, graph)
    makers = {value: place for place, node in enumerate(graph.node) for value in node.output}
    makers |= {input_.name: -1 for input_ in graph.input}
    return [
        (node, kernel, tuple(dict.fromkeys(makers[value] for value in node.input if value in makers)))
        for node, kernel in zip(graph.node, _onnx_kernels(graph, origins), strict=True)
    ]


def _optimized(deployed: Deployed) -> Any:
    """The graph that ONNX Runtime makes of a model on the CPU."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        # weights in a file of their own: the model may be above protobuf's limit
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        onnxruntime.InferenceSession(
            deployed.payload, options, providers=["CPUExecutionProvider"], disabled_optimizers=UNWANTED
        )
        return onnx.load(options.optimized_model_filepath, load_external_data=False).graph


class _Origins:
    """Finds the nodes of an ONNX model that became a node of its optimized graph: those between its output and inputs.

    The optimizer keeps the names of most values; it adds a suffix to the names of values in a new memory layout.
    """

    def __init__(self, before: Any, after: Any) -> None:
        self.producers = {name: node for node in before.node for name in node.output}
        self.names = {node.name for node in before.node}
        # a node in another layout has the name of the value that it made
        self.kept = {_plain(name) for node in after.node for name in (*node.output, node.name)}
        self.kept |= {input_.name for input_ in after.input}

    def of(self, node: Any) -> tuple[str, tuple[str, ...]]:
        """Name of the node that does the main work, and names of all nodes that were fused into `node`, if several."""
        own = _plain(node.name).removeprefix("fused ")
        if node.op_type.startswith("Reorder") or (node.op_type == "Transpose" and own not in self.names):
            return own, ()
        queue, originals = [own, *map(_plain, node.output)], []
        while queue:
            producer = self.producers.get(queue.pop(0))
            if producer is not None and producer not in originals:
                originals.append(producer)
                queue += [name for name in producer.input if name not in self.kept]
        if own not in self.names:
            main_names = [original.name for original in originals if original.op_type in ONNX_WORK]
            own = main_names[0] if main_names else originals[0].name if originals else own
        fused = tuple(
            original.name for original in originals if not original.op_type.endswith(("DequantizeLinear", "Constant"))
        )
        return own, fused if own in fused and len(fused) > 1 else ()


def _plain(name: str) -> str:
    return re.sub(r"(_nchwc|_token_\d+|_transpose|_layout_transform|/MatMulAddFusion)+$", "", name)


def _onnx_integer(node: Any, narrow: set[str]) -> bool:
    if node.op_type in ONNX_INTEGER or (node.op_type.startswith("QLinear") or node.op_type.startswith("NhwcMaxPool")):
        return True
    return node.op_type in SAME_NUMBERS and node.input[0] in narrow


def _narrow(graph: Any) -> set[str]:
    """Names of 8-bit integer values: results of quantization, and results of `SAME_NUMBERS` operations on them."""
    narrow: set[str] = set()
    for node in graph.node:
        quantized = node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear", "QGemm") or "QLinear" in node.op_type
        if quantized or (node.op_type in SAME_NUMBERS and node.input[0] in narrow):
            narrow.add(node.output[0])
    return narrow
