"""Integer kernels of ONNX Runtime that QDQ patterns do not reach: dynamic linear and LSTM, weights of 8 and 4 bits.

`lower` rewrites a program before its export, at the patterns of `torchslim.graph.integer_patterns`.

Weights are reordered as integers, so that the file holds them as integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from torchslim.graph.integer_patterns import Int4Weight, Linear, find_linear, int4_weights
from torchslim.graph.row_ranges import row_magnitudes
from torchslim.runtimes.onnx_editor import MICROSOFT, Editor
from torchslim.runtimes.onnx_recurrent import lower_recurrent

PACKED = "Int4Weight"  # our own marker: the passes over the ONNX model replace it
BLOCKS = (256, 128, 64, 32, 16)  # number of 8-bit weights that share a scale in MatMulNBits: larger is faster
GROUPS = (16, 32, 64, 128, 256)  # numbers of 4-bit weights that may share a scale in MatMulNBits
ACCURACY = 4  # MatMulNBits may round a block of activations to 8 bits: twice as fast as float, 46 dB and more


def lower(program: ExportedProgram) -> ExportedProgram:
    """The program with ONNX Runtime's own operations where they are better; `program` itself if none is."""
    editor = Editor(program)
    lower_recurrent(editor)
    for node in list(editor.graph.nodes):
        if (linear := find_linear(node, editor.constant)) is not None:
            _linear(editor, node, linear)
    editor.graph.eliminate_dead_code()
    # remaining 4-bit weights: those of convolutions, recurrent layers and embeddings
    for node, weight in int4_weights(editor.graph, editor.constant).items():
        stored = [editor.store(weight.packed, "packed"), editor.store(weight.scale, "scale")]
        editor.replace(node, _four_bits(weight), stored)
    return editor.finished()


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
        inputs = [*editor.quantize(linear.source, node, _quantized), *editor.grid(), *stored, linear.bias]
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
