"""Packed sequences computed on padded batches, which `torch.export` can capture, with the same results.

A `PackedSequence` has one row per valid step, so its size depends on the lengths. During capture, packing keeps the
padding instead, and recurrent layers run one layer and one direction at a time on the padded batch:

- forward: padding behind the end of a sequence changes no step before it; the last state is that of step length - 1;
- backward: the inputs and the outputs of each sequence are reversed within its length;
- an LSTM's last cell state is not among the outputs of the steps: it comes from a second pass over inputs with one
  more feature, 1 on padding, whose weights close the input gate and open the forget gate (sigmoid gives exactly 0 and
  1 there), so that the cell keeps its state to the last step. A model that does not use this state captures nothing
  of the second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils.rnn import PackedSequence

from torchslim.errors import ExportError

SHUT = 1e4  # sigmoid(-SHUT + x) is 0 and sigmoid(SHUT + x) is 1 for any x that a gate sees; finite in float16
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Packing:
    """One call of `pack_padded_sequence`: the sorted lengths (batch,) on the device of the data, the lengths as passed,
    and the steps of the padded batch."""

    lengths: Tensor
    given_lengths: Tensor
    steps: int
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # packed data, and the same before it was flattened
    cleared: list[Tensor] = field(default_factory=list)  # padded batches whose padding is 0

    def packed(self, x: Tensor) -> Tensor:
        """Flatten (steps, batch, ...) -> (steps * batch, ...), as packed data have it."""
        data = x.flatten(0, 1)
        self.kept.append((data, x))
        return data

    def clear(self, x: Tensor) -> Tensor:
        """Set the padding of (steps, batch, features) to 0, as runtimes do that are given the lengths."""
        result = torch.where(self.valid.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device))
        self.cleared.append(result)
        return result

    @cached_property
    def batch_sizes(self) -> Tensor:
        """Number of sequences in each step: (steps,), on the CPU, as `PackedSequence` stores it."""
        return self.valid.sum(1).cpu()

    @cached_property
    def times(self) -> Tensor:
        """Index of each step: (steps, 1)."""
        return torch.arange(self.steps, device=self.lengths.device).unsqueeze(1)

    @cached_property
    def valid(self) -> Tensor:
        """True where a step is not padding: (steps, batch)."""
        return self.times < self.lengths

    @cached_property
    def reversed_times(self) -> Tensor:
        """Source index of each step when its sequence is reversed within its length: (steps, batch, 1)."""
        return torch.where(self.valid, self.lengths - 1 - self.times, self.times).unsqueeze(-1)

    @cached_property
    def last_times(self) -> Tensor:
        """Index of the last valid step of each sequence: (1, batch, 1)."""
        return (self.lengths - 1).view(1, -1, 1)

    def padded(self, data: Tensor) -> Tensor:
        """Unflatten packed data: (steps * batch, ...) -> (steps, batch, ...).

        Data that the model has not changed are those before `packed`: converters fix one of the sizes of a reshape.
        """
        for flat, x in self.kept:
            if flat is data:
                return x
        return cast(Tensor, data.unflatten(0, (self.steps, self.lengths.shape[0])))

    def reverse(self, x: Tensor) -> Tensor:
        """Reverse each sequence of (steps, batch, features) within its length; padding stays in place."""
        return x.gather(0, self.reversed_times.expand(-1, -1, x.shape[-1]))

    def last(self, x: Tensor) -> Tensor:
        """Return the last valid step of (steps, batch, features): (1, batch, features)."""
        return x.gather(0, self.last_times.expand(-1, -1, x.shape[-1]))


@dataclass
class PaddedPacking:
    """Records each packing inside `packed_as_padded`, and computes on the padded batches."""

    packings: list[_Packing] = field(default_factory=list)

    @property
    def used(self) -> bool:
        """Whether the model packs sequences."""
        return bool(self.packings)

    def pack(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Replace `torch._VF._pack_padded_sequence`; the rows of padding stay in the data."""
        x = x.transpose(0, 1) if batch_first else x
        on_device = lengths if lengths.device == x.device else lengths.to(x.device)
        packing = _Packing(on_device, lengths, x.shape[0])
        self.packings.append(packing)
        return packing.packed(x), packing.batch_sizes

    def pad(
        self, data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
    ) -> tuple[Tensor, Tensor]:
        """Replace `torch._VF._pad_packed_sequence`."""
        packing = self.of(batch_sizes)
        x = packing.padded(data)
        if padding_value or all(x is not cleared for cleared in packing.cleared):
            valid = packing.valid.unflatten(1, (-1, *[1] * (x.dim() - 2)))
            x = torch.where(valid, x, torch.full((), padding_value, dtype=x.dtype, device=x.device))
        if total_length > packing.steps:
            missing = (total_length - packing.steps, *x.shape[1:])
            x = torch.cat([x, x.new_full(missing, padding_value)])
        return x.transpose(0, 1) if batch_first else x, packing.given_lengths

    def of(self, batch_sizes: Tensor) -> _Packing:
        """Return the packing that gave these batch sizes.

        Raises:
            ExportError: no packing did, as for a packed sequence that is an input of the model.
        """
        for packing in self.packings:
            if packing.batch_sizes is batch_sizes:
                return packing
        raise ExportError(
            "a packed sequence that the model's forward did not pack cannot be captured: give the model the padded "
            "batch and the lengths, and call pack_padded_sequence inside of forward"
        )

    def run(self, layer: nn.RNNBase, packed: PackedSequence, state: Any) -> tuple[PackedSequence, Any]:
        """Replace the forward of `nn.LSTM`, `nn.GRU` and `nn.RNN` on a packed sequence."""
        data, batch_sizes, order, unsorted = packed
        packing = self.of(batch_sizes)
        layer._update_flat_weights()
        x = packing.padded(data)
        start = _initial(layer, x) if state is None else layer.permute_hidden(state, order)
        states: State = start if isinstance(start, tuple) else (start,)
        directions = _directions(layer)
        ends: list[State] = []
        for depth in range(layer.num_layers):
            # integer kernels round a whole input with one range: zeros do not widen it, as they are on every grid
            x = torch.where(packing.valid.unsqueeze(-1), x, x.new_zeros(()))
            outputs = []
            for direction in range(directions):
                index = depth * directions + direction
                layer_input = packing.reverse(x) if direction else x
                output, end = _single(
                    layer, index, layer_input, tuple(part[index : index + 1] for part in states), packing
                )
                outputs.append(packing.reverse(output) if direction else output)
                ends.append(end)
            x = packing.clear(torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0])
            if depth + 1 < layer.num_layers:
                x = nn.functional.dropout(x, layer.dropout, layer.training)
        last: Any = tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
        last = last if isinstance(layer, nn.LSTM) else last[0]
        return PackedSequence(packing.packed(x), batch_sizes, order, unsorted), layer.permute_hidden(last, unsorted)


@contextmanager
def packed_as_padded() -> Iterator[PaddedPacking]:
    """Keep the padding of packed sequences inside the block; not safe beside other threads that pack sequences."""
    packing = PaddedPacking()

    def forward_of(kind: type[nn.RNNBase]) -> Callable[..., Any]:
        original = kind.forward

        def forward(self: nn.RNNBase, input: Any, hx: Any = None) -> Any:
            return packing.run(self, input, hx) if isinstance(input, PackedSequence) else original(self, input, hx)

        return forward

    functions: Any = torch._VF
    with (
        mock.patch.object(functions, "_pack_padded_sequence", packing.pack),
        mock.patch.object(functions, "_pad_packed_sequence", packing.pad),
        mock.patch.object(nn.LSTM, "forward", forward_of(nn.LSTM)),
        mock.patch.object(nn.GRU, "forward", forward_of(nn.GRU)),
        mock.patch.object(nn.RNN, "forward", forward_of(nn.RNN)),
    ):
        yield packing


def drop_unused_cells(program: ExportedProgram) -> None:
    """Delete LSTMs whose last cell states the model does not use; torch takes LSTMs for impure and keeps them."""
    graph = program.graph
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.lstm.input):
        if not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _directions(layer: nn.RNNBase) -> int:
    return 2 if layer.bidirectional else 1


def _initial(layer: nn.RNNBase, x: Tensor) -> State:
    """Return the zero initial states of a layer: (layers * directions, batch, size) per state."""
    count = layer.num_layers * _directions(layer)
    sizes = [layer.proj_size or layer.hidden_size] + [layer.hidden_size] * isinstance(layer, nn.LSTM)
    return tuple(x.new_zeros(count, x.shape[1], size) for size in sizes)


def _single(layer: nn.RNNBase, index: int, x: Tensor, start: State, packing: _Packing) -> tuple[Tensor, State]:
    """Run one layer in one direction: the outputs (steps, batch, size), and the states after the last valid step."""
    per_layer = len(layer._flat_weights) // (layer.num_layers * _directions(layer))
    weights = cast(list[Tensor], layer._flat_weights[index * per_layer : (index + 1) * per_layer])
    options = (layer.bias, 1, 0.0, layer.training, False, False)
    if not isinstance(layer, nn.LSTM):
        functions: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
            "GRU": torch.gru,
            "RNN_TANH": torch.rnn_tanh,
            "RNN_RELU": torch.rnn_relu,
        }
        output, _ = functions[layer.mode](x, start[0], weights, *options)
        return output, (packing.last(output),)
    output, _, _ = torch.lstm(x, start, weights, *options)
    padding = (~packing.valid).unsqueeze(-1).to(x.dtype)
    shut, neither = x.new_full((layer.hidden_size, 1), SHUT), x.new_zeros(2 * layer.hidden_size, 1)
    # the rows of the gates: input, forget, cell and output
    input_weight = torch.cat([weights[0], torch.cat([-shut, shut, neither])], 1)
    _, _, cell = torch.lstm(torch.cat([x, padding], -1), start, [input_weight, *weights[1:]], *options)
    return output, (packing.last(output), cell)
