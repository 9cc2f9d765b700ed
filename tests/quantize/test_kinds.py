"""Every kind of layer, under every scheme: it is stored as integers, answers as its fake-quantized twin, and is near."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchslim.graph.export import capture
from torchslim.quantize import convert, prepare, sqnr, static
from torchslim.quantize.backend_profiles import PROFILES
from torchslim.quantize.schemes import SCHEMES

QUANTIZED = torch.ops.quantized_decomposed


class Functional(nn.Module):
    """A layer whose weight is a plain parameter of the network."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shapes[0]) / 3)
        self.bias = nn.Parameter(torch.randn(shapes[1])) if len(shapes) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight) if self.bias is None else self.function(x, self.weight, self.bias)


class First(nn.Module):
    """Only the sequence of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), rand(3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same"), rand(3, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), rand(3, 2, 5, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), rand(3, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), rand(3, 4, 9, 9)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), rand(3, 4, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), rand(3, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), rand(2, 2, 4, 4, 4)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), rand(3, 4, 5, 5)),
    "linear": (lambda: nn.Linear(8, 5), rand(6, 8)),
    "linear of tokens": (lambda: nn.Linear(8, 5, bias=False), rand(3, 4, 8)),
    "addmm": (lambda: Functional(lambda x, w, b: torch.addmm(b, x, w), (8, 5), (5,)), rand(6, 8)),
    "matmul": (lambda: Functional(torch.matmul, (8, 5)), rand(3, 4, 8)),
    "functional conv": (lambda: Functional(nn.functional.conv2d, (6, 4, 3, 3), (6,)), rand(3, 4, 9, 9)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)), rand(6, 8)),
    "lstm": (lambda: First(nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)), rand(3, 7, 5)),
    "gru": (lambda: First(nn.GRU(5, 6)), rand(7, 3, 5)),
    "embedding": (lambda: nn.Embedding(30, 8), torch.arange(12).view(3, 4)),
}


def make(kind: str) -> tuple[nn.Module, Tensor]:
    build, x = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval(), x


def integers(model: Any) -> int:
    """Of how many elements a converted graph has integers."""
    return sum(each.numel() for each in model.program.buffers() if each.dtype in (torch.int8, torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", PROFILES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_under_every_scheme(kind: str, scheme: str, runtime: str) -> None:
    if kind == "embedding" and scheme == "int8":
        return  # there is nothing to compute on integers, and no other layer: refused, see below
    model, x = make(kind)
    prepared = prepare(model, (x,), scheme=scheme, runtime=runtime)
    assert [record.action for record in prepared.records] == ["quantized"]
    prepared.calibrate([(x,)])
    quantized = convert(prepared)
    matrices = sum(
        each.numel() for name, each in model.named_parameters() if each.dim() > 1 and "original0" not in name
    )
    stored = integers(quantized)
    assert stored >= matrices / 2
    floats = [each for each in quantized.program.parameters() if each.dim() > 1]
    assert not floats, "no float copy of a weight is left"
    four = prepared.records[0].weight_bits == 4
    assert sqnr(model(x), quantized(x)) > (12 if four else 28)
    if four:
        assert stored <= matrices / 2 + 32 * 30, "two to a byte, up to whole groups"
    exported = capture(quantized, (x,))
    assert sqnr(quantized(x), exported.program.module()(x)[0]) > 100, "exporting changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_twins_are_what_ships(kind: str, scheme: str) -> None:
    if kind == "embedding":
        return
    model, x = make(kind)
    prepared = prepare(model, (x,), scheme=scheme, runtime="eager", qat=True)
    prepared.calibrate([(x,)])
    prepared.train()
    prepared(x).square().mean().backward()
    assert all(each.grad is not None for name, each in prepared.named_parameters() if "weight" in name)
    torch.optim.SGD(prepared.parameters(), lr=0.05).step()
    prepared(x)
    prepared.eval()
    assert sqnr(prepared(x), convert(prepared)(x)) > 35


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weights"])
def test_an_embedding_reads_integers(scheme: str) -> None:
    """Only the rows that are looked up become floats: the table is never converted as a whole."""
    model, x = make("embedding")
    quantized = convert(prepare(model, (x,), scheme=scheme))
    reads = [node for node in quantized.program.graph.nodes if node.target is torch.ops.aten.embedding.default]
    assert len(reads) == 2
    assert not any(node.target is QUANTIZED.dequantize_per_channel.default for node in quantized.program.graph.nodes)


class Stream(nn.Module):
    """As in a transformer: the sum behind a layer has one channel far above the others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.gelu, self.head = (nn.Linear(16, 16) for _ in range(4))
        with torch.no_grad():
            self.two.bias[3] = 300.0

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.two(torch.relu(self.one(x)))
        y = nn.functional.layer_norm(y, (16,))
        return self.head(nn.functional.gelu(self.gelu(y)))


def quantize_nodes(model: Any) -> int:
    return sum(node.target is QUANTIZED.quantize_per_tensor.default for node in model.program.graph.nodes)


@pytest.mark.slow
def test_a_linear_layer_answers_in_float_where_no_integers_are_wanted() -> None:
    """A pair of its own would cost the stream of a transformer eight bits a layer, and save no time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Stream().eval()
    x = rand(8, 5, 16)
    quantized = static(model, [(x,)], runtime="onnxruntime")
    assert quantize_nodes(quantized) == 4, "the inputs of the four layers; the second reads what the first gives"
    answers = model.two(torch.relu(model.one(x)))
    alone = nn.Sequential(model.one, nn.ReLU(), model.two, nn.Flatten(), nn.GELU())
    found = static(alone, [(x,)], runtime="onnxruntime")(x).view_as(answers)
    without = [channel for channel in range(16) if channel != 3]
    assert sqnr(nn.functional.gelu(answers)[..., without], found[..., without]) > 30


def test_linear_layers_in_a_row_hand_integers_on() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 2)).eval()
    x = rand(6, 5, 4)
    assert quantize_nodes(static(model, [(x,)], runtime="onnxruntime")) == 3, "integers are flattened"
    floating = static(model, [(x,)], runtime="onnxruntime", layers={"3": "float"})
    assert quantize_nodes(floating) == 1, "what reads it computes in float"


class StoredSource(nn.Module):
    """A layer that reads a table, as projections of relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 16))
        self.project, self.layer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.project(self.table).T


def test_a_layer_that_reads_stored_tensors_alone_says_why_it_has_no_integer_inputs() -> None:
    x = torch.randn(4, 16)
    prepared = prepare(StoredSource(), (x,), runtime="onnxruntime")
    prepared.calibrate([(x,)])
    found = {record.layer: (record.activation_bits, record.reason) for record in prepared.records}
    bits, reason = found["project"]
    assert bits is None
    assert re.search("input is stored.*int8.*float", reason)
    assert found["layer"] == (8, "")


class Patches(nn.Module):
    """Patches behind a small class token, a residual stream and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 16, 4, 4), nn.Parameter(0.01 * rand(1, 1, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.place = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), (self.place(x) + x).flatten(2).transpose(1, 2)], 1)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            tokens = tokens + 0.01 * layer(norm(tokens))
        return self.norms[-1](tokens)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "inductor"])
def test_a_class_token_is_not_rounded_on_the_grid_of_the_patches(runtime: str) -> None:
    batches = [(10 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)),) for seed in range(3)]
    model = Patches().eval()
    with torch.no_grad():
        assert sqnr(model(*batches[0]), static(model, batches, runtime=runtime)(*batches[0])) > 30


class Same(nn.Module):
    """A pool with the padding that TensorFlow calls "same"."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.before(x), (0, 1, 0, 1), value=float("-inf"))
        return self.after(nn.functional.max_pool2d(x, 3, 2))


def test_a_pool_over_minus_infinity_stays_float() -> None:
    batches = [(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)),) for seed in range(3)]
    model = Same().eval()
    with torch.no_grad():
        assert sqnr(model(*batches[0]), static(model, batches)(*batches[0])) > 30
