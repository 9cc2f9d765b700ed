"""Recurrent layers as ONNX Runtime has them: both directions in one operation, packed sequences by their lengths.

An LSTM whose input is rounded at each call, on int8 weights, becomes a `DynamicQuantizeLSTM`, which quantizes its input
and its hidden state itself. Over packed sequences all other layers become the standard's LSTM, GRU or RNN; over whole
batches torch's exporter translates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torchslim.graph.integer_patterns import Int8Weight, find_recurrent
from torchslim.graph.packed_patterns import Direction, cleared_lengths, find_packed
from torchslim.runtimes.onnx_editor import MICROSOFT, Editor

aten = torch.ops.aten
Cell = tuple[Int8Weight, Int8Weight, Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An ONNX operation with the order of its gates, as indices of torch's."""

    operation: str
    gates: tuple[int, ...]
    options: dict[str, Any]


KINDS: dict[Any, Kind] = {
    aten.lstm.input: Kind(operation="LSTM", gates=(0, 3, 1, 2), options={}),
    aten.gru.input: Kind(operation="GRU", gates=(1, 0, 2), options={"linear_before_reset": 1}),
    aten.rnn_tanh.input: Kind(operation="RNN", gates=(0,), options={}),
    aten.rnn_relu.input: Kind(operation="RNN", gates=(0,), options={"activations": ["Relu"]}),
}
LSTM = KINDS[aten.lstm.input]


def lower_recurrent(editor: Editor) -> None:
    """Replace layers over packed sequences, and dynamically quantized LSTMs."""
    for runs in list(find_packed(editor.graph)):
        _packed(editor, runs)
    for node in list(editor.graph.nodes):
        lstm = find_recurrent(node, editor.constant)
        if lstm is not None and lstm.kind == "LSTM" and lstm.source is not None:
            _whole(editor, node, lstm)


def _packed(editor: Editor, runs: Sequence[Direction]) -> None:
    """Replace one layer over packed sequences by one operation that is given the lengths."""
    first, count = runs[0], len(runs)
    kind, states = KINDS[first.node.target], len(first.states)
    integers = [find_recurrent(run.node, editor.constant) for run in runs]
    dynamic = kind is LSTM and all(integer is not None and integer.source is not None for integer in integers)
    if first.source is not None and not dynamic:
        return
    names = {1: "reverse" if first.backward else "forward", 2: "bidirectional"}
    options: dict[str, Any] = {"direction": names[count], "hidden_size": first.hidden}
    nodes = [parameter for run in runs for parameter in run.parameters]
    constants = [value for node in nodes if (value := editor.constant(node)) is not None]
    stored = len(constants) == len(nodes)  # reordered here, not each time that the file is loaded
    if dynamic:
        parameters = _stored(editor, [cell for integer in integers if integer is not None for cell in integer.cells])
    elif stored:
        parameters = [editor.store(value, "weight") for value in _stacked(kind, constants, count)]
    else:
        parameters = list(nodes)

    def compute(x: Tensor, lengths: Tensor, *rest: Any) -> list[Tensor]:
        initial = [_joined(rest[index : states * count : states]) for index in range(states)]
        weights: Sequence[Tensor] = rest[states * count :]
        if dynamic:
            y, *last = _integer(x, lengths.int(), initial, weights, options)
        else:
            weights = weights if stored else _stacked(kind, weights, count)
            y, *last = _float(kind, x, lengths.int(), initial, weights, options)
        steps, batch = x.shape[:2]
        output = y.squeeze(1) if count == 1 else y.transpose(1, 2).reshape(steps, batch, count * first.hidden)
        return [output, *(part for state in last for part in state.split(1))]

    initial = [state for run in runs for state in run.states]
    zero = all(_zero(state) for state in initial)  # as the operations have it where none is given
    x = first.x if dynamic else _unmasked(first)
    output, *last = editor.trace(
        runs[-1].node,
        compute,
        [x, first.lengths, *([None] * len(initial) if zero else initial), *parameters],
        first.node,
    )
    for place, run in enumerate(runs):
        for old, new in [
            *((node, output) for node in run.outputs),
            *((node, last[place]) for node in run.last),
            *((node, last[count + place]) for node in run.cells),
        ]:
            old.replace_all_uses_with(new)
    _erase_unused(editor)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """States of all directions as one, (directions, batch, size)."""
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def _zero(state: Node) -> bool:
    """Whether a node is a tensor of zeros, or a slice of one."""
    whole: Any = state.args[0] if state.target is aten.slice.Tensor else state
    return whole.target in (aten.new_zeros.default, aten.zeros.default)


def _unmasked(run: Direction) -> Node:
    """The batch before its padding was set to 0, which operations that are given the lengths do not read."""
    return run.x.args[1] if cleared_lengths(run.x) is run.lengths else run.x  # type: ignore[return-value]


def _erase_unused(editor: Editor) -> None:
    """Delete recurrent operations without a reader: torch takes them for impure and keeps them."""
    editor.graph.eliminate_dead_code()
    for node in reversed(list(editor.graph.nodes)):
        if node.target in KINDS and not node.users:
            editor.graph.erase_node(node)
    editor.graph.eliminate_dead_code()


def _stacked(kind: Kind, parameters: Sequence[Tensor], directions: int) -> list[Tensor]:
    """The two weights of all directions in the order of ONNX, and the biases if there are any."""
    per_cell = len(parameters) // directions
    cells = [parameters[start : start + per_cell] for start in range(0, len(parameters), per_cell)]
    stacked = [torch.stack([_reordered(cell[index], kind.gates) for cell in cells]) for index in range(2)]
    biases = [torch.cat([_reordered(bias, kind.gates) for bias in cell[2:]]) for cell in cells if cell[2:]]
    return [*stacked, torch.stack(biases)] if biases else stacked


def _float(
    kind: Kind,
    x: Tensor,
    lengths: Tensor,
    initial: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    options: dict[str, Any],
) -> Sequence[Tensor]:
    """Output (steps, directions, batch, hidden) and last states of one layer over packed sequences."""
    w, r, bias = weights[0], weights[1], weights[2] if weights[2:] else None
    shape = (w.shape[0], x.shape[1], options["hidden_size"])
    activations = {name: value * shape[0] for name, value in kind.options.items() if isinstance(value, list)}
    return torch.onnx.ops.symbolic_multi_out(
        kind.operation,
        (x, w, r, bias, lengths, *initial),
        {**options, **kind.options, **activations},
        dtypes=(x.dtype,) * (1 + len(initial)),
        shapes=((x.shape[0], *shape), *[shape] * len(initial)),
        version=18,
    )


def _stored(editor: Editor, cells: Sequence[Cell]) -> list[Node | None]:
    """Inputs of a `DynamicQuantizeLSTM` for the cells of one layer: two weights with scale and zero point, the bias."""
    stored: list[Node | None] = []
    for weights in ([cell[0] for cell in cells], [cell[1] for cell in cells]):
        scale = torch.stack([_reordered(weight.scale.float(), LSTM.gates) for weight in weights])
        stored += [
            editor.store(torch.stack([_reordered(weight.values, LSTM.gates).t() for weight in weights]), "weight"),
            editor.store(scale, "scale"),
            editor.store(torch.zeros(scale.shape, dtype=torch.int8), "zero_point"),
        ]
    biases = [
        torch.cat([_reordered(bias, LSTM.gates) for bias in cell[2:] if bias is not None])
        for cell in cells
        if cell[2] is not None
    ]
    return [*stored, editor.store(torch.stack(biases), "bias") if biases else None]


def _integer(
    x: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
    stored: Sequence[Any],
    options: dict[str, Any],
) -> Sequence[Tensor]:
    """Output (steps, directions, batch, hidden) and last states of one layer on integers."""
    w, w_scale, w_zero, r, r_scale, r_zero, bias = stored
    shape = (w.shape[0], x.shape[1], options["hidden_size"])
    return torch.onnx.ops.symbolic_multi_out(
        f"{MICROSOFT}DynamicQuantizeLSTM",
        (x, w, r, bias, lengths, *initial, None, w_scale, w_zero, r_scale, r_zero),
        options,
        dtypes=(torch.float32,) * 3,
        shapes=((x.shape[0], *shape), shape, shape),
        version=1,
    )


def _whole(editor: Editor, node: Node, lstm: Any) -> None:
    """Replace a dynamic LSTM over whole batches by a `DynamicQuantizeLSTM` per layer."""
    directions, hidden = lstm.directions, lstm.hidden
    options = {"direction": "bidirectional" if lstm.bidirectional else "forward", "hidden_size": hidden}
    layers = [
        _stored(editor, lstm.cells[start : start + directions]) for start in range(0, len(lstm.cells), directions)
    ]

    def compute(x: Tensor, h: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.transpose(0, 1) if lstm.batch_first else x
        finals = []
        for layer in range(lstm.layers):
            stored, states = rest[7 * layer : 7 * layer + 7], slice(layer * directions, (layer + 1) * directions)
            steps, batch = y.shape[:2]
            y, *last = _integer(y, None, (h[states], c[states]), stored, options)
            y = y.transpose(1, 2).reshape(steps, batch, directions * hidden)
            finals.append(last)
        h, c = (torch.cat([final[index] for final in finals]) for index in range(2))
        return y.transpose(0, 1) if lstm.batch_first else y, h, c

    editor.replace(node, compute, [lstm.source, *lstm.states, *(value for stored in layers for value in stored)])


def _reordered(rows: Tensor, gates: Sequence[int]) -> Tensor:
    """Rows of the gates, moved from torch's order to ONNX's."""
    parts = rows.chunk(len(gates))
    return torch.cat([parts[index] for index in gates]) if len(parts) > 1 else rows
