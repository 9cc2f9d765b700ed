"""Products of activations on integers: attention taken apart, and what a report says of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchslim as ts
from torchslim.artifact.integer_coverage import Lowered, lowered, share_kernels
from torchslim.graph.decompose import attention
from torchslim.graph.layers import Layer
from torchslim.quantize import convert, prepare, sqnr
from torchslim.quantize.layer_sqnr import layer_sqnr
from torchslim.runtimes import Kernel


class Heads(nn.Module):
    """Attention over four heads of eight, with what `scaled_dot_product_attention` is asked for besides."""

    def __init__(self, masked: bool = False, **options: Any) -> None:
        super().__init__()
        self.inside = nn.Linear(32, 96)
        self.outside = nn.Linear(32, 32)
        self.masked, self.options = masked, options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inside(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = x[:, None, None, :, 0] > -1.0 if self.masked else None
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return self.outside(mixed.transpose(1, 2).flatten(2))


class Einsum(nn.Module):
    """Attention written as sums of products, and a product with one more operand."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inside(x).chunk(3, -1)
        weights = torch.einsum("bqc,bkc->bqk", q, k).softmax(-1)
        return torch.baddbmm(x, weights, v)


class Repeated(nn.Module):
    """One layer that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x.mean(1)


def quantized(model: nn.Module, scheme: str = "int8", runtime: str = "onnxruntime") -> tuple[Lowered, float]:
    """What runs on integers, and decibels of the output on ONNX Runtime."""
    torch.manual_seed(0)
    batches = [(torch.randn(2, 16, 32),) for _ in range(4)]
    prepared = prepare(model.eval(), batches[0], scheme=scheme, runtime=runtime)
    if scheme == "int8":
        prepared.calibrate(batches)
    deployed = ts.deploy(convert(prepared), batches[0], runtime=runtime, threads=1)
    with torch.no_grad():
        expected = model(*batches[0])
    return lowered(deployed, prepared.records), sqnr(expected, deployed(*batches[0]))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.1}, {"masked": True}], ids=str)
def test_attention_runs_on_integers(options: Any) -> None:
    torch.manual_seed(0)
    found, decibels = quantized(Heads(**options))
    assert [each.operation for each in found.layers] == ["linear", "matmul", "matmul", "linear"]
    assert found.integer_share == 1.0, found.table()
    assert decibels > 30


@pytest.mark.slow
def test_sums_of_products_run_on_integers() -> None:
    torch.manual_seed(0)
    found, decibels = quantized(Einsum())
    assert len(found.layers) == 3
    assert found.integer_share == 1.0, found.table()
    assert decibels > 30


@pytest.mark.parametrize("kind", ["bool", "float", "none", "hidden"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_taken_apart_is_attention(kind: str, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 3)
    masks = {
        "bool": torch.rand(5, 7) > 0.4, "float": torch.randn(2, 1, 5, 7), "none": None,
        "hidden": torch.zeros(5, 7).masked_fill(torch.rand(5, 7) > 0.6, -torch.inf),
    }  # fmt: skip
    mask = None if causal else masks[kind]
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.3, enable_gqa=True)
    given = (q, k, v) if mask is None else (q, k, v, mask)
    answer = attention(4, causal=causal, scale=0.3, groups=True)(*given)
    sees = torch.ones(5, 7, dtype=torch.bool) if mask is None else (mask if kind == "bool" else mask > -torch.inf)
    reaches = sees.any(-1, keepdim=True)  # of a query that sees no key nothing is promised
    assert torch.allclose(expected * reaches, answer * reaches, atol=1e-6)


@pytest.mark.slow
def test_a_layer_called_several_times_runs_on_integers() -> None:
    torch.manual_seed(0)
    found, decibels = quantized(Repeated())
    assert [each.integer for each in found.layers] == [True] * 3, found.table()
    assert decibels > 30


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_attention_in_float_is_not_taken_for_the_layers_of_its_module(runtime: str) -> None:
    torch.manual_seed(0)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x, x, x, need_weights=False)[0]

    found, _ = quantized(Module(), scheme="int8-dynamic", runtime=runtime)
    (product,) = [each for each in found.layers if each.weight_bits is None]
    assert not product.integer
    assert "product of two activations" in product.why
    assert found.integer_share < 1


def test_parts_of_a_tensor_stay_on_its_grid() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            left, right = self.before(x).chunk(2, 1)
            return self.left(left), self.right(right)

    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, 8, 8),) for _ in range(4)]
    prepared = prepare(Halves().eval(), batches[0])
    prepared.calibrate(batches)
    program = convert(prepared).program
    (split,) = [node for node in program.graph.nodes if node.target is torch.ops.aten.chunk.default]
    whole = split.args[0].args[1:3]  # scale and zero point
    parts = [user for part in split.users for user in part.users]
    assert len(parts) == 2
    assert {part.args[1:3] for part in parts} == {whole}


def test_the_noise_of_a_layer_is_that_of_its_own_output_where_the_next_works_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True)).eval()
    batches = [(torch.randn(4, 3, 8, 8),)]
    prepared = prepare(model, batches[0])
    prepared.calibrate(batches)
    found = layer_sqnr(prepared, convert(prepared), prepared.leaves(batches[0]))
    assert found.keys() == {"0", "2"}
    assert min(found.values()) > 30  # it was about 0 dB: the float output had lost its negative half by then


class Squeezed(nn.Module):
    """A convolution with SiLU, gated by what it is on average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.down, self.up, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        gate = torch.sigmoid(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))
        return self.last(x * gate).flatten(1)


@pytest.mark.slow
def test_gates_of_convolutions_run_on_integers_where_the_runtime_has_a_table() -> None:
    torch.manual_seed(0)
    model, x = Squeezed().eval(), torch.randn(4, 3, 8, 8)
    graph = ts.quantize.static(model, [(x,)], runtime="onnxruntime")
    deployed = ts.deploy(graph, (x,), runtime="onnxruntime")
    types = Counter(each.type for each in ts.runtimes.kernels(deployed))
    assert (types["QLinearSigmoid"], types["QLinearMul"]) == (3, 3)
    assert not {"Sigmoid", "Mul"} & types.keys()
    with torch.no_grad():
        assert sqnr(graph(x), deployed(x)) > 40
        assert sqnr(model(x), graph(x)) > 25


@pytest.mark.parametrize("runtime", ["openvino", "inductor"])
def test_elsewhere_they_stay_one_with_their_convolution(runtime: str) -> None:
    x = torch.randn(4, 3, 8, 8)
    graph = ts.quantize.static(Squeezed().eval(), [(x,)], runtime=runtime)
    names = [str(node.target) for node in graph.program.graph.nodes]
    assert sum("silu" in each for each in names) == 2


def test_what_only_moves_integers_computes_no_layer() -> None:
    layer = Layer(layer="a", operation="linear", macs=1, weight_bits=8, activations="static")
    moves = [Kernel(node=f"a/{each}", type=each, integer=True) for each in ("Reshape", "Transpose")]
    assert list(share_kernels([layer], moves)[0]) == []
    product = Kernel(node="a/MatMul", type="MatMulIntegerToFloat", integer=True)
    assert list(share_kernels([layer], [*moves, product])[0]) == [product]


class Viewed(nn.Module):
    """Heads put together by a view, which the memory order of attention's own kernel allows."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inside(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.outside(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(x.shape))


@pytest.mark.slow
def test_a_view_of_what_is_taken_apart_need_not_fit_its_memory() -> None:
    found, decibels = quantized(Viewed())
    assert found.integer_share == 1
    assert decibels > 30


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_fixed_sizes_leave_no_layer_in_float(batch: int) -> None:
    """With all sizes known ONNX Runtime makes a Gemm of a product and a bias, which was float unless all was rounded."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    batches = [(torch.randn(batch, 16, 32),) for _ in range(4)]
    prepared = prepare(model, batches[0])
    prepared.calibrate(batches)
    deployed = ts.deploy(convert(prepared), batches[0], runtime="onnxruntime", threads=1, dynamic_shapes=None)
    found = lowered(deployed, prepared.records)
    assert [each.layer for each in found.layers if not each.integer] == []
    with torch.no_grad():
        assert sqnr(model(*batches[0]), deployed(*batches[0])) > 25


@pytest.mark.parametrize("boolean", [True, False])
def test_a_query_without_a_key_gets_nothing(boolean: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    mask = torch.rand(2, 1, 5, 5) < 0.5
    mask[0, :, 2] = False
    given = mask if boolean else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, given)
    assert torch.allclose(attention(8, guard=True)(q, k, v, given), expected, atol=1e-6)
    assert not expected[0, :, 2].any()


@pytest.mark.slow
def test_openvino_computes_masked_attention_as_torch_does() -> None:
    model, x = Heads(masked=True).eval(), torch.randn(2, 16, 32)
    x[1, :, 0] = -5.0  # no key is left
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(ts.deploy(model, (x,), runtime="openvino", threads=1)(x), expected, atol=1e-4)
