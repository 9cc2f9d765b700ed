"""Each runtime computes a quantized graph with the kernels that it has, and as the graph itself does."""

from __future__ import annotations

import copy
import io
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from tests.support.compiled import deploy
from tests.support.processors import SATURATING, detected
from tests.support.quantized_graphs import int4_graph, int8_graph, stored_bits
from torchslim.artifact.integer_coverage import lowered as executed
from torchslim.graph.export import capture
from torchslim.quantize import convert, prepare, sqnr
from torchslim.runtimes import find_runtime, torch_integer_kernels
from torchslim.runtimes.pt2 import load_program, pack_program
from torchslim.runtimes.torch_integer_kernels import DynamicLinear, DynamicRecurrent

RUNTIMES = ("onnxruntime", "eager")


class Shared(nn.Module):
    """Attention: three layers read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = [each(x).unflatten(-1, (2, 16)).transpose(1, 2) for each in (self.q, self.k, self.v)]
        return self.out(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Sequence(nn.Module):
    """A recurrent layer that gives all it has; initial states come as (samples, layers, hidden) where it takes some."""

    def __init__(self, kind: str, *, layers: int, bi: bool, first: bool, states: bool, bias: bool = True) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(
            24, 20, num_layers=layers, bidirectional=bi, batch_first=first, bias=bias, dropout=0.1 * (layers > 1)
        )
        self.first, self.states, self.both = first, states, kind == "LSTM"
        self.sizes = layers * (1 + bi), 20

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        x = x if self.first else x.transpose(0, 1)
        given = [each.transpose(0, 1).contiguous() for each in states]
        y, last = self.rnn(x, (tuple(given) if self.both else given[0]) if self.states else None)
        y = y if self.first else y.transpose(0, 1)
        return y, *(each.transpose(0, 1) for each in (last if self.both else [last]))

    def inputs(self, samples: int) -> tuple[Tensor, ...]:
        states = [torch.randn(samples, *self.sizes) for _ in range(self.states * (1 + self.both))]
        return torch.randn(samples, 5, 24), *states


def answers(graph: nn.Module, inputs: list[tuple[Tensor, ...]]) -> dict[str, list[tuple[Any, Any]]]:
    """What the graph says in plain PyTorch, and what each runtime says."""
    captured = capture(graph, inputs[0])
    found = {}
    for runtime in RUNTIMES:
        deployed = find_runtime(runtime).compile(captured, source=graph, threads=1)
        with torch.no_grad():
            found[runtime] = [(graph(*each), deployed(*each)) for each in inputs]
    return found


def worst(pairs: list[tuple[Any, Any]]) -> float:
    """The lowest signal to noise ratio, in dB."""
    return min(sqnr(expected, answer) for expected, answer in pairs)


def model_of(payload: bytes) -> Any:
    onnx.checker.check_model(payload)
    return onnx.load_from_string(payload).graph


def operations(graph: Any) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def optimized(payload: bytes, tmp_path: Path) -> Counter[str]:
    """What ONNX Runtime runs in the end."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    return operations(onnx.load(tmp_path / "optimized.onnx").graph)


def float_sizes(graph: Any) -> list[int]:
    """How many numbers each float constant holds."""
    return sorted(
        int(torch.tensor(list(each.dims)).prod()) for each in graph.initializer if each.data_type == TensorProto.FLOAT
    )


# --- linear layers ---


@pytest.mark.slow
@pytest.mark.parametrize(("middle", "bias"), [((), True), ((), False), ((5,), True), ((2, 3), False)])
@pytest.mark.parametrize("kind", ["dynamic", "int8", "int4"])
def test_linear_layers_compute_as_the_graph(kind: str, middle: tuple[int, ...], bias: bool) -> None:
    model = nn.Sequential(nn.Linear(48, 33, bias=bias), nn.GELU(), nn.Linear(33, 7, bias=bias))
    inputs = [(torch.randn(count, *middle, 48),) for count in (3, 1, 4)]
    graph = int4_graph(model, inputs[0]) if kind == "int4" else int8_graph(model, inputs[0], dynamic=kind == "dynamic")
    found = answers(graph, inputs)
    assert worst(found["eager"]) >= (60 if kind == "dynamic" else 100)
    # a value between two steps may go either way; MatMulNBits rounds blocks of activations to 8 bits
    assert worst(found["onnxruntime"]) >= 35


@pytest.mark.slow
def test_dynamic_linear_layers_are_integer_products(tmp_path: Path) -> None:
    x = torch.randn(2, 6, 32)
    graph = int8_graph(Shared(), (x,), dynamic=True)
    payload = deploy(graph, (x,)).payload
    assert payload is not None
    found = operations(model_of(payload))
    assert found["MatMulIntegerToFloat"] == 4
    assert found["QuantizeLinear"] == 2, "queries, keys and values are of one input: it is quantized once"
    assert not found["DequantizeLinear"] + found["DynamicQuantizeLinear"] + found["Gemm"]
    assert max(float_sizes(model_of(payload))) <= 32
    ran = optimized(payload, tmp_path)
    assert ran["MatMulIntegerToFloat"] + ran["DynamicQuantizeMatMul"] == 4
    for pairs in answers(graph, [(torch.randn(count, 6, 32),) for count in (2, 1, 3)]).values():
        assert worst(pairs) >= 35


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_linear_layers_are_stored_packed_and_multiplied_so(bits: int, tmp_path: Path) -> None:
    x = torch.randn(2, 64)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 3))
    graph = int4_graph(model, (x,)) if bits == 4 else int8_graph(model, (x,), dynamic=False)
    payload = deploy(graph, (x,)).payload
    assert payload is not None
    proto = model_of(payload)
    assert optimized(payload, tmp_path)["MatMulNBits"] == 3
    assert len(payload) <= 1.05 * stored_bits(graph) / 8 + 3000
    assert max(float_sizes(proto)) <= 64 * 256 // 32


@pytest.mark.slow
def test_a_row_that_no_block_divides_is_a_float_weight_made_once(tmp_path: Path) -> None:
    x = torch.randn(2, 50)
    graph = int8_graph(nn.Linear(50, 40), (x,), dynamic=False)
    payload = deploy(graph, (x,)).payload
    assert payload is not None
    assert max(float_sizes(model_of(payload))) <= 40
    assert set(optimized(payload, tmp_path)) == {"Gemm"}
    assert worst(answers(graph, [(x,)])["onnxruntime"]) >= 100


# --- convolutions ---


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_convolutions_are_computed_in_float(bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.ConvTranspose2d(40, 6, 3, stride=2))
    inputs = [(torch.randn(count, 3, 8, 8),) for count in (3, 1, 2)]
    graph = int4_graph(model, inputs[0]) if bits == 4 else int8_graph(model, inputs[0], dynamic=False)
    for pairs in answers(graph, inputs).values():
        assert worst(pairs) >= 100
    payload = deploy(graph, inputs[0]).payload
    assert payload is not None
    assert not optimized(payload, tmp_path).keys() & {"DequantizeLinear", "Cast", "Mul", "BitShift"}, "done at load"
    assert max(float_sizes(model_of(payload))) <= 40 * 54 // 16
    assert len(payload) <= 1.05 * stored_bits(graph) / 8 + 6000


# --- recurrent networks ---

LAYERS = [
    {"layers": 1, "bi": False, "first": True, "states": False},
    {"layers": 2, "bi": True, "first": True, "states": True},
    {"layers": 2, "bi": False, "first": False, "states": True},
    {"layers": 1, "bi": True, "first": False, "states": False, "bias": False},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers", LAYERS, ids=lambda each: "-".join(f"{key}{int(value)}" for key, value in each.items())
)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "weights"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_compute_as_the_graph(kind: str, dynamic: bool, layers: Any) -> None:
    model = Sequence(kind, **layers).eval()
    inputs = [model.inputs(count) for count in (3, 1, 2)]
    graph = int8_graph(model, inputs[0], dynamic=dynamic)
    for pairs in answers(graph, inputs).values():
        # dynamic kernels quantize the hidden state, too, which the graph keeps
        assert worst(pairs) >= (35 if dynamic else 90)
        for (_, answer), each in zip(pairs, inputs, strict=True):
            assert [one.shape for one in answer] == [one.shape for one in model(*each)]
            assert sqnr(model(*each), answer) >= 34


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_recurrent_networks_take_a_quarter_of_the_bytes_and_less(bits: int, tmp_path: Path) -> None:
    model = Sequence("GRU", layers=2, bi=True, first=True, states=False)
    x = model.inputs(2)
    graph = int4_graph(model, x) if bits == 4 else int8_graph(model, x, dynamic=False)
    payload = deploy(graph, x).payload
    assert payload is not None
    assert max(float_sizes(model_of(payload))) <= 4 * 60
    assert set(optimized(payload, tmp_path)) & {"DequantizeLinear", "Cast", "BitShift"} == set(), "done at load"
    assert worst(answers(graph, [x])["onnxruntime"]) >= 90


@pytest.mark.slow
def test_a_dynamic_lstm_is_one_node_for_each_layer() -> None:
    model = Sequence("LSTM", layers=2, bi=True, first=True, states=False)
    x = model.inputs(2)
    graph = int8_graph(model, x, dynamic=True)
    payload = deploy(graph, x).payload
    assert payload is not None
    found = operations(model_of(payload))
    assert found["DynamicQuantizeLSTM"] == 2
    assert not found["LSTM"] + found["DequantizeLinear"] + found["DynamicQuantizeLinear"]
    assert max(float_sizes(model_of(payload))) <= 2 * 2 * 80
    assert len(payload) < 4 * sum(each.numel() for each in model.parameters()) * 0.5


# --- PyTorch's own kernels ---


def lowered(graph: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    return torch_integer_kernels.lower(capture(graph, inputs).program.module())  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.quantized.engine not in torch_integer_kernels.ENGINES, reason="another engine")
def test_the_deprecated_kernels_are_still_there_and_right() -> None:
    """When this fails, PyTorch has dropped or changed the kernels that torch.ao.quantization was for: eager sessions
    still work, on the graph itself, but recurrent networks are slower. Look for a successor, or delete the file."""
    assert not torch_integer_kernels.missing(), f"gone from this PyTorch: {', '.join(torch_integer_kernels.missing())}"
    x = torch.randn(4, 5, 24)
    for model, kernel in (
        (nn.Linear(24, 31), DynamicLinear),
        (Sequence("LSTM", layers=2, bi=True, first=True, states=False), DynamicRecurrent),
        (Sequence("GRU", layers=2, bi=True, first=True, states=False), DynamicRecurrent),
    ):
        graph = int8_graph(model, (x,), dynamic=True)
        module = lowered(graph, (x,))
        assert sum(isinstance(each, kernel) for each in module.modules()) == 1
        assert not any("quantized_decomposed" in str(node.target) for node in module.graph.nodes)
        assert not any(
            node.target in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input) for node in module.graph.nodes
        )
        with torch.no_grad():
            assert sqnr(graph(x), module(x)) >= 40, "they differ from the graph by more than 1 %"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "linear"])
def test_without_the_kernels_the_graph_runs_as_it_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(24, 8) if kind == "linear" else Sequence(kind, layers=1, bi=False, first=True, states=False)
    x = torch.randn(3, 5, 24)
    graph = int8_graph(model, (x,), dynamic=True)
    monkeypatch.setattr(torch_integer_kernels, "ENGINES", ())
    assert "engine" in torch_integer_kernels.missing()[0]
    module = lowered(graph, (x,))
    assert not any(isinstance(each, (DynamicLinear, DynamicRecurrent)) for each in module.modules())
    with torch.no_grad():
        assert sqnr(graph(x), module(x)) >= 100


@pytest.mark.slow
@pytest.mark.parametrize("made_for", ["avx2", "avx512-vnni"])
def test_activations_are_reduced_only_where_products_overflow(made_for: str, processor: str) -> None:
    """Seven-bit weights, made for such a processor, cannot overflow there."""
    x = (torch.randn(3, 24),)
    with detected(made_for):
        graph = int8_graph(nn.Linear(24, 8), x, dynamic=True)
    with detected(processor):
        (kernel,) = (each for each in lowered(graph, x).modules() if isinstance(each, DynamicLinear))
    assert kernel.grid == ((1 / 63, 64) if processor in SATURATING and made_for not in SATURATING else (1 / 127, 128))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_no_kernel_reads_become_the_graphs_own_floats(bits: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4))
    x = (torch.randn(2, 3, 8, 8),)
    graph = int4_graph(model, x) if bits == 4 else int8_graph(model, x, dynamic=False)
    module = lowered(graph, x)
    with torch.no_grad():
        assert torch.equal(graph(*x)[0], module(*x)[0])
    assert [node.target for node in module.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.conv2d.default,
        torch.ops.aten.flatten.using_ints,
        torch.ops.aten.linear.default,
    ]


# --- files ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "int8", "int4"])
def test_pt2_files_hold_the_integers_and_run_as_they_were(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn, self.head = nn.Conv2d(3, 64, 3), nn.LSTM(64, 128, 2), nn.Linear(128, 512)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.conv(x).flatten(2).permute(2, 0, 1))[0][-1])

    x = (torch.randn(3, 3, 6, 6),)
    graph = int4_graph(Model(), x) if kind == "int4" else int8_graph(Model(), x, dynamic=kind == "dynamic")
    captured = capture(graph, x)
    payload = pack_program(captured.program)
    program = load_program(io.BytesIO(payload))
    assert sum(each.numel() * each.element_size() for each in program.state_dict.values()) * 8 == stored_bits(graph)
    assert len(payload) <= 1.1 * stored_bits(graph) / 8 + 100_000
    with torch.no_grad():
        expected = copy.deepcopy(captured.program.module())(*x)
        assert torch.equal(program.module()(*x)[0], expected[0])
        assert sqnr(expected[0], torch_integer_kernels.lower(program.module())(*x)[0]) >= 35


class Turned(nn.Module):
    """A linear layer that reads the rows of another order, as those of attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(16, 16), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x).transpose(0, 1)).transpose(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["inductor", "aoti"])
def test_integer_layers_read_rows_of_any_order_and_any_number(runtime: str) -> None:
    x = torch.randn(6, 5, 16)
    prepared = prepare(Turned(), (x,), runtime=runtime)
    prepared.calibrate([(x,)])
    quantized = convert(prepared)
    deployed = deploy(quantized, (x,), runtime=runtime, threads=1)
    for samples in (6, 2):
        assert sqnr(quantized(x[:samples]), deployed(x[:samples])) > 60
    assert executed(deployed, prepared.records).integer_share == 1
