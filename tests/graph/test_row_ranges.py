"""Dynamic ranges by row: a sample's result depends neither on the other samples of its batch nor on padding."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import symbolic_trace

import torchslim as ts
from tests.support.varying import VARYING, text
from torchslim.core.batches import call
from torchslim.errors import RuntimeUnavailable
from torchslim.graph.export import capture
from torchslim.graph.integer_patterns import find_dynamic
from torchslim.graph.row_ranges import find_rounded_rows, insert_rounding, rounded_by_row
from torchslim.quantize import sqnr
from torchslim.quantize.fake_quantize import RangeOfEachRow
from torchslim.runtimes.pt2 import load_program, pack_program

CASE = VARYING["text"]
RUNTIMES = ("eager", "onnxruntime", "openvino")
COMPILED: dict[str, tuple[nn.Module, Any]] = {}


def compiled(runtime: str) -> tuple[nn.Module, Any]:
    """The int8-dynamic graph of a sentence encoder, and its deployment; each is made once."""
    if runtime not in COMPILED:
        quantized = ts.quantize.dynamic(CASE.model(), CASE.examples(), runtime=runtime)
        COMPILED[runtime] = quantized, ts.deploy(quantized, CASE.examples(), runtime=runtime, threads=1)
    return COMPILED[runtime]


def check(deployed: Any, model: nn.Module, batch: int, length: int, padding: int, loudness: float) -> None:
    """Compare a batch with its samples alone, with more padding, and with its graph."""
    inputs = text(batch, length)
    together = call(deployed, inputs)
    alone = torch.cat([call(deployed, {name: x[[row]] for name, x in inputs.items()}) for row in range(batch)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    padded = {
        "input_ids": torch.cat([inputs["input_ids"], torch.full((batch, padding), int(49 * loudness))], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros(batch, padding, dtype=torch.long)], 1),
    }
    torch.testing.assert_close(call(deployed, padded), together, rtol=1e-4, atol=1e-5)
    assert sqnr(call(model, inputs), together) > 25


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=8)
@given(st.integers(2, 5), st.integers(3, 12), st.integers(1, 9), st.floats(0, 1))
def test_a_sample_depends_neither_on_its_batch_nor_on_padding(
    runtime: str, batch: int, length: int, padding: int, loudness: float
) -> None:
    model, deployed = compiled(runtime)
    check(deployed, model, batch, length, padding, loudness)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["inductor", "aoti"])
def test_compiled_code_keeps_samples_apart(runtime: str) -> None:
    """Costs 40 s: two compilers."""
    try:
        model, deployed = compiled(runtime)
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    check(deployed, model, 3, 7, 4, 1.0)
    assert any("qlinear" in kernel.type for kernel in ts.runtimes.kernels(deployed))


@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
)
def test_a_row_is_rounded_by_its_own_range(rows: list[list[float]]) -> None:
    x = torch.tensor(rows)
    rounded = rounded_by_row(x)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((rounded - x).abs() <= step / 2 * (1 + 1e-4) + 1e-12).all()
    torch.testing.assert_close(rounded, torch.cat([rounded_by_row(row[None]) for row in x]), rtol=0, atol=0)
    training = RangeOfEachRow(torch.uint8, 0, 255, torch.per_tensor_affine)(x.requires_grad_())
    torch.testing.assert_close(training, rounded, rtol=1e-6, atol=1e-30)
    training.sum().backward()
    assert x.grad is not None
    assert (x.grad == 1).all()


def test_the_inserted_operations_are_found_again_also_in_a_file() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    graph = symbolic_trace(Twice())
    source = next(iter(graph.graph.nodes))
    output = graph.graph.output_node()
    rounded = insert_rounding(graph.graph, source, output)
    output.args = (rounded,)
    graph.recompile()
    assert find_rounded_rows(rounded) is source
    assert not any(find_rounded_rows(node) for node in graph.graph.nodes if node is not rounded)
    x = torch.randn(3, 5)
    torch.testing.assert_close(graph(x), rounded_by_row(x))
    program = load_program(io.BytesIO(pack_program(capture(graph, (x,)).program)))
    assert sum(find_dynamic(node) is not None for node in program.graph.nodes) == 1


def test_a_recurrent_layer_says_that_it_has_one_range() -> None:
    model = VARYING["lstm"].model()
    quantized: Any = ts.quantize.dynamic(model, VARYING["lstm"].examples(), runtime="onnxruntime")
    (record,) = [record for record in quantized.records if record.layer == "layer"]
    assert record.action == "quantized"
    assert "batch and padding" in record.reason


@pytest.mark.slow
def test_training_rounds_as_the_converted_graph() -> None:
    """Costs 5 s: quantization-aware training of the sentence encoder."""
    prepared = ts.quantize.prepare(CASE.model(), CASE.examples(), scheme="int8-dynamic", qat=True)
    inputs = text(3, 8)
    with torch.no_grad():
        prepared.train()
        call(prepared, inputs)
        prepared.eval()
        trained = call(prepared, inputs)
    assert sqnr(trained, call(ts.quantize.convert(prepared, checks=None), inputs)) > 60
