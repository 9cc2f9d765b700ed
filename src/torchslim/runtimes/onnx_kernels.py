"""Integer kernels of ONNX Runtime that QDQ patterns do not reach: dynamic linear and LSTM, weights of 8 and 4 bits.

`lower` rewrites a program before its export, at the patterns of `torchslim.graph.integer_patterns`.

Weights are reordered as integers, so that the file holds them as integers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from torchslim.graph.integer_patterns import Int4Weight, Linear, Recurrent, find_linear, find_recurrent, int4_weights
from torchslim.graph.layers import stored_tensors
from torchslim.graph.rewrite import graft
from torchslim.graph.row_ranges import LEVELS, ZERO_POINT, row_magnitudes

MICROSOFT = "com.microsoft::"
PACKED = "Int4Weight"  # our own marker: the passes over the ONNX model replace it
GATES = (0, 3, 1, 2)  # ONNX has i, o, f, c; torch i, f, g, o
BLOCKS = (256, 128, 64, 32, 16)  # number of 8-bit weights that share a scale in MatMulNBits: larger is faster
GROUPS = (16, 32, 64, 128, 256)  # numbers of 4-bit weights that may share a scale in MatMulNBits
GRID = (torch.tensor(1 / LEVELS), torch.tensor(ZERO_POINT, dtype=torch.uint8))
ACCURACY = 4  # MatMulNBits may round a block of activations to 8 bits: twice as fast as float, 46 dB and more


def lower(program: ExportedProgram) -> ExportedProgram:
    """The program with ONNX Runtime's own operations where they are better; `program` itself if none is."""
    editor = Editor(program)
    for node in list(editor.graph.nodes):
        linear, recurrent = find_linear(node, editor.constant), find_recurrent(node, editor.constant)
        if linear is not None:
            _linear(editor, node, linear)
        elif recurrent is not None and recurrent.kind == "LSTM" and recurrent.source is not None:
            _lstm(editor, node, recurrent)
    editor.graph.eliminate_dead_code()
    # remaining 4-bit weights: those of convolutions, recurrent layers and embeddings
    for node, weight in int4_weights(editor.graph, editor.constant).items():
        stored = [editor.store(weight.packed, "packed"), editor.store(weight.scale, "scale")]
        editor.replace(node, _four_bits(weight), stored)
    return editor.finished()


class Editor:
    """Rewrites a copy of an exported program."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.module = copy.deepcopy(program.graph_module)  # operations only: the weights are in the state
        self.graph = self.module.graph
        self.state: dict[str, Any] = dict(program.state_dict)
        signature = program.graph_signature
        self.specs = list(signature.input_specs)
        self.stored = stored_tensors(program)
        self.added: dict[tuple[int, str], Node] = {}
        self.alive: list[Tensor] = []
        self.changed = False
        self.activations: dict[Node, Sequence[Node]] = {}

    def constant(self, node: Node) -> Tensor | None:
        """The stored tensor that a node stands for, if any."""
        return self.stored.get(node.name) if node.op == "placeholder" else None

    def store(self, value: Tensor, purpose: str, make: Callable[[Tensor], Tensor] = lambda value: value) -> Node:
        """Input node of a tensor made from a stored one; the same node for the same tensor and `purpose`."""
        key = (id(value), purpose)
        if key not in self.added:
            first = next(iter(self.graph.nodes))
            tensor = make(value).contiguous()
            mode = next(
                node.meta["val"].fake_mode for node in self.graph.nodes if hasattr(node.meta.get("val"), "fake_mode")
            )
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(f"{purpose}_{len(self.added)}")
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            self.state[node.name] = tensor
            self.stored[node.name] = tensor
            spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), target=node.name, persistent=True)
            self.specs.insert(0, spec)
            self.added[key] = node
            self.alive.append(value)  # keep it alive, so that no other tensor gets its id
        return self.added[key]

    def trace(self, before: Node, function: Callable[..., Any], inputs: Sequence[Node | None], owner: Node) -> Any:
        """Insert the operations of `function` on `inputs` into the layer of `owner`; return the result's nodes."""
        nodes = [input_ for input_ in inputs if input_ is not None]
        values = [node.meta["val"] for node in nodes]

        def positional(*tensors: Any) -> Any:
            rest = iter(tensors)
            return function(*(None if input_ is None else next(rest) for input_ in inputs))

        mode = next(value.fake_mode for value in values if hasattr(value, "fake_mode"))
        with mode:
            traced = make_fx(positional)(*values)
        self.changed = True
        return graft(self.graph, traced.graph, nodes, before, owner)

    def replace(self, node: Node, function: Callable[..., Any], inputs: Sequence[Node | None]) -> None:
        """Replace `node` by `function` of `inputs`."""
        result = self.trace(node, function, inputs, node)
        if isinstance(result, Node):
            node.replace_all_uses_with(result)
        else:
            for user in list(node.users):
                user.replace_all_uses_with(result[user.args[1]])
                self.graph.erase_node(user)
        self.graph.erase_node(node)

    def quantize(self, source: Node, owner: Node) -> Sequence[Node]:
        """Bytes of a value's rows, and their magnitudes, computed once for all layers that read it."""
        if source not in self.activations:
            operations = (node for node in self.graph.nodes if node.op != "placeholder")
            before = next(operations) if source.op == "placeholder" else source.next
            self.activations[source] = self.trace(before, _quantized, [source, *self.grid()], owner)
        return self.activations[source]

    def grid(self) -> list[Node]:
        """Scale and zero point of rows over their largest magnitudes."""
        return [self.store(GRID[0], "row_scale"), self.store(GRID[1], "row_zero_point")]

    def finished(self) -> ExportedProgram:
        """The rewritten program, without weights that are no longer read; the original if nothing changed."""
        if not self.changed:
            return self.program
        program = self.program
        self.graph.eliminate_dead_code()
        used_names = {node.name for node in self.graph.nodes if node.op != "placeholder" or node.users}
        kept_specs = [spec for spec in self.specs if spec.kind == InputKind.USER_INPUT or spec.arg.name in used_names]
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users and node.name not in {spec.arg.name for spec in kept_specs}:
                self.graph.erase_node(node)
        targets = {spec.target for spec in kept_specs}
        results: Sequence[Any] = self.graph.output_node().args[0]
        outputs = [
            replace(spec, arg=TensorArgument(name=result.name)) if isinstance(result, Node) else spec
            for spec, result in zip(program.graph_signature.output_specs, results, strict=True)
        ]
        self.module.recompile()
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(kept_specs, outputs),
            state_dict={name: value for name, value in self.state.items() if name in targets},
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            constants={name: value for name, value in program.constants.items() if name in targets},
            verifiers=program.verifiers,
        )


def _linear(editor: Editor, node: Node, linear: Linear) -> None:
    weight = linear.weight
    if isinstance(weight, Int4Weight):
        if weight.group_size in GROUPS and linear.source is None:
            rows, groups = weight.scale.shape
            packed = editor.store(weight.packed, "weight", lambda packed: packed.view(rows, groups, -1))
            sizes = {"K": weight.length, "N": rows, "bits": 4, "block_size": weight.group_size}
            _nbits(editor, node, linear, [packed, editor.store(weight.scale, "scale")], sizes)
        return
    rows, columns = weight.values.shape
    if linear.source is not None:
        stored = [editor.store(weight.values, "weight", Tensor.t), editor.store(weight.scale, "scale", Tensor.float)]
        inputs = [*editor.quantize(linear.source, node), *editor.grid(), *stored, linear.bias]
        editor.replace(node, _integer_product, inputs)
        return
    block = next((size for size in BLOCKS if columns % size == 0), None)
    if block is None:
        return
    stored = [
        editor.store(weight.values, "weight", lambda values: (values.short() + 128).byte().view(rows, -1, block)),
        editor.store(weight.scale, f"scale_{block}", lambda scale: scale.float()[:, None].repeat(1, columns // block)),
    ]
    _nbits(editor, node, linear, stored, {"K": columns, "N": rows, "bits": 8, "block_size": block})


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor) -> Sequence[Tensor]:
    """Bytes of the rows over their largest magnitudes, and these magnitudes."""
    magnitudes = row_magnitudes(x)
    q = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x / magnitudes, scale, zero_point), dtype=torch.uint8, shape=x.shape, version=18
    )
    return q, magnitudes


def _integer_product(
    q: Tensor,
    magnitudes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    product = torch.onnx.ops.symbolic(
        f"{MICROSOFT}MatMulIntegerToFloat",
        (q, weight, scale, weight_scale, zero_point, None, None),
        dtype=torch.float32,
        shape=(*q.shape[:-1], weight.shape[1]),
        version=1,
    )
    scaled = product * magnitudes
    return scaled if bias is None else scaled + bias


def _nbits(editor: Editor, node: Node, linear: Linear, stored: Sequence[Node], sizes: dict[str, int]) -> None:
    def compute(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{MICROSOFT}MatMulNBits",
            (x, weight, scale, None, None, bias),
            {**sizes, "accuracy_level": ACCURACY},
            dtype=torch.float32,
            shape=(*x.shape[:-1], sizes["N"]),
            version=1,
        )

    editor.replace(node, compute, [linear.x, *stored, linear.bias])


def _four_bits(weight: Int4Weight) -> Callable[[Tensor, Tensor], Tensor]:
    def compute(packed: Tensor, scale: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"torchslim::{PACKED}",
            (packed, scale),
            {"shape": list(weight.shape)},
            dtype=torch.float32,
            shape=weight.shape,
            version=1,
        )

    return compute


def _lstm(editor: Editor, node: Node, lstm: Recurrent) -> None:
    """Replace a dynamic LSTM by a `DynamicQuantizeLSTM` per layer, which quantizes input and hidden state itself."""
    assert lstm.source is not None
    directions, hidden = lstm.directions, lstm.hidden
    stored: list[Node | None] = []
    for layer in range(lstm.layers):
        cells = lstm.cells[layer * directions : (layer + 1) * directions]
        for weights in ([cell[0] for cell in cells], [cell[1] for cell in cells]):
            scale = torch.stack([_gates(weight.scale.float()) for weight in weights])
            stored += [
                editor.store(torch.stack([_gates(weight.values).t() for weight in weights]), "weight"),
                editor.store(scale, "scale"),
                editor.store(torch.zeros(scale.shape, dtype=torch.int8), "zero_point"),
            ]
        biases = [
            torch.cat([_gates(bias) for bias in cell[2:] if bias is not None]) for cell in cells if cell[2] is not None
        ]
        stored.append(editor.store(torch.stack(biases), "bias") if biases else None)

    def compute(x: Tensor, h: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.transpose(0, 1) if lstm.batch_first else x
        finals = []
        for layer in range(lstm.layers):
            w, w_scale, w_zero, r, r_scale, r_zero, bias = rest[7 * layer : 7 * layer + 7]
            layer_states = slice(layer * directions, (layer + 1) * directions)
            steps, batch = y.shape[:2]
            y, *last = torch.onnx.ops.symbolic_multi_out(
                f"{MICROSOFT}DynamicQuantizeLSTM",
                (y, w, r, bias, None, h[layer_states], c[layer_states], None, w_scale, w_zero, r_scale, r_zero),
                {"direction": "bidirectional" if lstm.bidirectional else "forward", "hidden_size": hidden},
                dtypes=(torch.float32,) * 3,
                shapes=((steps, directions, batch, hidden), *[(directions, batch, hidden)] * 2),
                version=1,
            )
            y = y.transpose(1, 2).reshape(steps, batch, directions * hidden)
            finals.append(last)
        h, c = (torch.cat([final[index] for final in finals]) for index in range(2))
        return y.transpose(0, 1) if lstm.batch_first else y, h, c

    editor.replace(node, compute, [lstm.source, *lstm.states, *stored])


def _gates(rows: Tensor) -> Tensor:
    """Rows of the four gates, moved from torch's order to ONNX's."""
    gates = rows.chunk(4)
    return torch.cat([gates[index] for index in GATES])
