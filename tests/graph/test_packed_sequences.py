"""Packed sequences on padded batches: the same outputs and states as torch's own, in every runtime that captures them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import torchslim as ts
from torchslim.errors import ExportError
from torchslim.graph.export import capture
from torchslim.graph.packed_patterns import find_packed
from torchslim.graph.packed_sequences import packed_as_padded
from torchslim.graph.portable_ops import portable

FEATURES, HIDDEN = 5, 4


@dataclass(frozen=True)
class Case:
    """A recurrent layer and a batch of sequences."""

    kind: type[nn.RNNBase]
    layers: int
    bidirectional: bool
    batch_first: bool
    is_sorted: bool
    given_state: bool
    options: dict[str, Any]
    lengths: list[int]
    padding: int

    def model(self) -> Packs:
        torch.manual_seed(len(self.lengths))
        return Packs(self).eval()

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(sum(self.lengths))
        steps = max(self.lengths) + self.padding
        shape = (len(self.lengths), steps) if self.batch_first else (steps, len(self.lengths))
        lengths = sorted(self.lengths, reverse=True) if self.is_sorted else self.lengths
        return torch.randn(*shape, FEATURES, generator=generator), torch.tensor(lengths)


class Packs(nn.Module):
    """Gives the padded outputs, and every state behind the last step."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.layer = case.kind(
            FEATURES,
            HIDDEN,
            case.layers,
            bidirectional=case.bidirectional,
            batch_first=case.batch_first,
            **case.options,
        )
        proj = case.options.get("proj_size", 0)
        count = case.layers * (1 + case.bidirectional)
        self.start = nn.ParameterList(torch.randn(count, 1, size) for size in (proj or HIDDEN, HIDDEN))

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        case = self.case
        packed = pack_padded_sequence(x, lengths, batch_first=case.batch_first, enforce_sorted=case.is_sorted)
        state: Any = None
        if case.given_state:
            states = [part.expand(-1, len(lengths), -1).contiguous() for part in self.start]
            state = tuple(states) if case.kind is nn.LSTM else states[1]
        outputs, last = self.layer(packed, state)
        steps = x.shape[1] if case.batch_first else x.shape[0]
        padded, counts = pad_packed_sequence(outputs, case.batch_first, padding_value=-7.0, total_length=steps)
        return (padded, counts, *(last if isinstance(last, tuple) else (last,)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind, options = draw(
        st.sampled_from(
            [(nn.LSTM, {}), (nn.LSTM, {"proj_size": 3}), (nn.LSTM, {"bias": False}), (nn.GRU, {}), (nn.RNN, {}),
             (nn.RNN, {"nonlinearity": "relu"})]
        )
    )  # fmt: skip
    return Case(
        kind=kind,
        layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        is_sorted=draw(st.booleans()),
        given_state=draw(st.booleans()),
        options=options,
        lengths=draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)),
        padding=draw(st.integers(0, 2)),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own
@settings(max_examples=60)
@given(cases())
def test_padded_batches_give_what_packed_ones_give(case: Case) -> None:
    """Costs 1 s."""
    model, inputs = case.model(), case.inputs()
    with torch.no_grad():
        expected = model(*inputs)
        with packed_as_padded() as packing:
            found = model(*inputs)
    assert packing.used
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_captured_model_serves_other_lengths_and_batch_sizes(kind: type[nn.RNNBase]) -> None:
    """Costs 6 s each."""
    case = Case(kind, 1, True, True, False, False, {}, [3, 5, 1], 0)
    model = case.model()
    deployed = ts.deploy(model, case.inputs(), runtime="onnxruntime")
    for lengths in ([5, 2, 4, 1, 1], [1, 1], [5, 5, 5]):
        x = torch.randn(len(lengths), 5, FEATURES)
        given_ = (x, torch.tensor(lengths))
        with torch.no_grad():
            expected = model(*given_)
        for one, other in zip(expected, deployed(*given_), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_runtime_takes_packed_sequences_of_other_lengths() -> None:
    """The exporter must not unroll the layer, which fixes the number of steps. Costs 4 s."""
    case = Case(nn.LSTM, 1, True, True, False, False, {}, [3, 5, 1], 0)
    model = case.model()
    longer = (torch.randn(2, 9, FEATURES), torch.tensor([9, 4]))
    deployed = ts.deploy(model, [case.inputs(), longer], runtime="onnxruntime")
    assert deployed.spec.notes == []
    for lengths in ([12, 3, 7], [2]):
        inputs = (torch.randn(len(lengths), max(lengths), FEATURES), torch.tensor(lengths))
        with torch.no_grad():
            expected = model(*inputs)
        for one, other in zip(expected, deployed(*inputs), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


class Classifier(nn.Module):
    """Classifies by the last hidden state; the last cell state is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(20, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.layer(packed)
        return self.head(hidden[-1])  # type: ignore[no-any-return]


@pytest.mark.slow
def test_an_unused_cell_state_costs_nothing() -> None:
    program = capture(Classifier(), (torch.randint(20, (3, 6)), torch.tensor([6, 2, 4]))).program
    assert len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.lstm.input)) == 1


@pytest.mark.slow
def test_a_classifier_of_packed_sequences_runs_in_int8() -> None:
    """Costs 6 s."""
    torch.manual_seed(0)
    model = Classifier().eval()
    batches = [(torch.randint(20, (8, 6)), torch.randint(1, 7, (8,))) for _ in range(3)]
    quantized = ts.quantize.static(model, batches)
    deployed = ts.deploy(quantized, batches[0], runtime="onnxruntime")
    fresh = (torch.randint(20, (5, 6)), torch.tensor([1, 6, 3, 2, 5]))
    with torch.no_grad():
        assert ts.quantize.sqnr(model(*fresh), deployed(*fresh)) > 25
    assert {record.layer: record.action for record in deployed.records} == {"layer": "quantized", "head": "quantized"}


def test_a_packed_sequence_from_outside_is_refused() -> None:
    layer = nn.GRU(FEATURES, HIDDEN)
    outside: PackedSequence = pack_padded_sequence(torch.randn(4, 2, FEATURES), torch.tensor([4, 2]))
    with packed_as_padded(), pytest.raises(ExportError, match=r"call pack_padded_sequence inside of forward"):
        layer(outside)


def test_nothing_stays_changed_where_a_model_fails() -> None:
    before = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward, torch._VF._pack_padded_sequence)
    with pytest.raises(ZeroDivisionError), packed_as_padded():
        raise ZeroDivisionError
    assert (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward, torch._VF._pack_padded_sequence) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own
@settings(max_examples=6)
@given(cases(), st.randoms(use_true_random=False))
def test_onnx_runtime_computes_what_torch_computes_for_any_lengths(case: Case, random: Random) -> None:
    """A layer is one operation a depth, of as many directions as it has; a projection has none. Costs 15 s."""
    lengths = [*case.lengths, 3, 2]  # with a batch of one the capture has other shapes
    case = replace(case, lengths=sorted(lengths, reverse=True) if case.is_sorted else lengths)
    model, (x, _) = case.model(), case.inputs()
    captured = capture(model, case.inputs())
    runs = list(find_packed(portable(captured.program).graph))
    assert [len(run) for run in runs] == [1 + case.bidirectional] * (
        0 if case.options.get("proj_size") else case.layers
    )
    deployed = ts.deploy(model, case.inputs(), runtime="onnxruntime")
    for _ in range(3):
        other = [random.randint(1, max(lengths)) for _ in lengths]
        other[random.randrange(len(other))] = max(lengths)  # the batch is padded to the longest
        given_ = (x, torch.tensor(sorted(other, reverse=True) if case.is_sorted else other))
        with torch.no_grad():
            expected = model(*given_)
        for one, found in zip(expected, deployed(*given_), strict=True):
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_onnx_runtime_gets_one_operation_a_layer(kind: type[nn.RNNBase], bidirectional: bool) -> None:
    """Outputs, hidden and cell states of other lengths are torch's. Costs 2 s each."""
    case = Case(kind, 2, bidirectional, True, False, False, {}, [3, 5, 1], 0)
    model = case.model()
    longer = (torch.randn(2, 9, FEATURES), torch.tensor([9, 4]))
    deployed = ts.deploy(model, [case.inputs(), longer], runtime="onnxruntime")
    assert isinstance(deployed.payload, bytes)
    operations = [node.op_type for node in onnx.load_from_string(deployed.payload).graph.node]
    assert [name for name in operations if name in ("LSTM", "GRU", "RNN")] == [kind.__name__] * 2
    assert "GatherElements" not in operations  # nothing is reversed by hand
    for lengths in ([12, 3, 7], [2], [1, 6]):
        inputs = (torch.randn(len(lengths), max(lengths), FEATURES), torch.tensor(lengths))
        with torch.no_grad():
            expected = model(*inputs)
        for one, other in zip(expected, deployed(*inputs), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


class ReadsPadding(nn.Module):
    """What a packed layer computes, by hand, without setting padding to 0: its output has steps of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(FEATURES, HIDDEN)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        output, _ = self.layer(x)
        last = output.gather(0, (lengths - 1).view(1, -1, 1).expand(-1, -1, HIDDEN))
        return output.sum(0), last


@pytest.mark.slow
def test_a_layer_whose_padding_is_read_stays() -> None:
    """An operation with lengths would return 0 for these steps. Costs 1 s."""
    model, inputs = ReadsPadding().eval(), (torch.randn(5, 3, FEATURES), torch.tensor([2, 5, 4]))
    assert not list(find_packed(portable(capture(model, inputs).program).graph))
    deployed = ts.deploy(model, inputs, runtime="onnxruntime")
    with torch.no_grad():
        for one, other in zip(model(*inputs), deployed(*inputs), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


class Tagger(nn.Module):
    """Reads all outputs of a packed layer in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(8, 16, 2, bidirectional=True, batch_first=True), nn.Linear(32, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0])  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_dynamic_packed_lstm_is_one_integer_operation_a_layer() -> None:
    """Costs 4 s."""
    torch.manual_seed(0)
    model = Tagger().eval()
    examples = [(torch.randn(3, 6, 8), torch.tensor([6, 2, 4])), (torch.randn(2, 9, 8), torch.tensor([3, 9]))]
    quantized = ts.quantize.dynamic(model, examples, runtime="onnxruntime")
    deployed = ts.deploy(quantized, examples, runtime="onnxruntime")
    assert isinstance(deployed.payload, bytes)
    operations = [node.op_type for node in onnx.load_from_string(deployed.payload).graph.node]
    assert operations.count("DynamicQuantizeLSTM") == 2
    assert "GatherElements" not in operations
    fresh = (torch.randn(4, 7, 8), torch.tensor([1, 7, 3, 2]))
    with torch.no_grad():
        assert ts.quantize.sqnr(model(*fresh), deployed(*fresh)) > 25
