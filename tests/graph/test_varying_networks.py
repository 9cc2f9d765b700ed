"""More networks whose sizes vary answer as PyTorch at sizes in and between those seen: detectors, audio, lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torchslim as ts
from tests.support.varying import Patches, Varying, image
from torchslim.core.batches import call
from torchslim.core.trees import tensors
from torchslim.quantize import sqnr
from torchslim.quantize.preparation import convert, prepare

RUNTIMES = ("eager", "onnxruntime", "openvino")
COMPILED: dict[tuple[str, ...], Any] = {}


class Pyramid(nn.Module):
    """Features of three scales that are added from the coarsest to the finest, as in a detector's FPN."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.down = nn.ModuleList(nn.Conv2d(8, 8, 3, 2, 1) for _ in range(2))
        self.side = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scales = [torch.relu(self.stem(x))]
        for down in self.down:
            scales.append(torch.relu(down(scales[-1])))
        merged = self.side[2](scales[2])
        outputs = {"2": merged}
        for level in (1, 0):
            merged = self.side[level](scales[level]) + functional.interpolate(merged, size=scales[level].shape[-2:])
            outputs[str(level)] = merged
        return outputs


class Separable(nn.Module):
    """Depthwise convolutions, squeeze-and-excitation and hard-swish: MobileNetV3's features for SSD-lite, and its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.boxes, self.classes = nn.Conv2d(8, 4 * 2, 1), nn.Conv2d(8, 5 * 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.hardswish(self.stem(x))
        x = self.depth(x)
        gate = functional.hardsigmoid(self.excite(torch.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1)))))
        x = functional.hardswish(x * gate)
        return tuple(  # type: ignore[return-value]
            head(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, width)
            for head, width in ((self.boxes, 4), (self.classes, 5))
        )


class Speech(nn.Module):
    """Convolutions over samples, then a transformer over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 16, 5, 2, 2), nn.GELU(), nn.Conv1d(16, 16, 3, 2, 1), nn.GELU())
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.body(x).transpose(1, 2))).log_softmax(-1)


class Packed(nn.Module):
    """A bidirectional recurrent layer on packed sequences."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(4, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        steps, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.head(steps)


def sound(batch: int, length: int, _: int = 0) -> tuple[Tensor]:
    return (torch.randn(batch, 1, 4 * length + 3, generator=torch.Generator().manual_seed(length)),)


def sequences(batch: int, length: int, _: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * batch + length)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[-1] = length
    return torch.randn(batch, length, 4, generator=generator), lengths


NETWORKS = {
    "pyramid": Varying(Pyramid, image, 3),
    "separable": Varying(Separable, image, 3),
    "speech": Varying(Speech, sound),
    "packed lstm": Varying(lambda: Packed("LSTM"), sequences),
    "packed gru": Varying(lambda: Packed("GRU"), sequences),
}


def compiled(name: str, runtime: str, scheme: str = "") -> tuple[nn.Module, Any]:
    """A network or its int8 graph, and its deployment; each is made once."""
    if (name, runtime, scheme) not in COMPILED:
        case = NETWORKS[name]
        model, examples = case.model(), case.examples()
        if scheme:
            prepared = prepare(model, examples, runtime=runtime, scheme=scheme)
            prepared.calibrate(examples)
            model = convert(prepared, checks=None)
        COMPILED[name, runtime, scheme] = model, ts.deploy(model, examples, runtime=runtime, threads=1)
    return COMPILED[name, runtime, scheme]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=5)
@given(batch=st.integers(1, 4), height=st.integers(3, 11), width=st.integers(3, 11))
def test_a_deployed_network_answers_as_pytorch_at_any_size(
    name: str, runtime: str, batch: int, height: int, width: int
) -> None:
    case = NETWORKS[name]
    model, deployed = compiled(name, runtime)
    inputs = case.inputs(batch, height * case.multiple, width * case.multiple)
    with torch.no_grad():
        answers, expected = call(deployed, inputs), call(model, inputs)
    torch.testing.assert_close(tensors(answers), tensors(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["pyramid", "separable", "speech"])
def test_an_int8_network_answers_as_its_graph(name: str, runtime: str) -> None:
    """Costs 3 s each."""
    case = NETWORKS[name]
    model, deployed = compiled(name, runtime, "int8")
    inputs = case.inputs(2, 7 * case.multiple, 8 * case.multiple)
    pairs = zip(tensors(call(model, inputs)), tensors(call(deployed, inputs)), strict=True)
    assert all(sqnr(right, answer) > 30 for right, answer in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["inductor", "aoti"])
def test_compiled_code_answers_as_pytorch_at_any_size(runtime: str) -> None:
    """Costs 60 s: a vision transformer with interpolated positions."""
    case = Varying(Patches, image, 4)
    model = case.model()
    deployed = ts.deploy(model, case.examples(), runtime=runtime, threads=1)
    for sizes in ((1, 5, 6), (3, 8, 9)):
        inputs = case.inputs(sizes[0], 4 * sizes[1], 4 * sizes[2])
        torch.testing.assert_close(call(deployed, inputs), call(model, inputs).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", ["fasterrcnn_mobilenet", "ssdlite"])
def test_a_detectors_backbone_answers_as_pytorch_at_other_sizes(make: str) -> None:
    """Costs 30 s each: backbones of torchvision, with random weights."""
    detection = pytest.importorskip("torchvision.models.detection")
    makers: dict[str, Callable[[], nn.Module]] = {
        "fasterrcnn_mobilenet": lambda: (
            detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None).backbone
        ),
        "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone,
    }
    torch.manual_seed(0)
    backbone = makers[make]().eval()
    examples: Any = [(torch.randn(2, 3, height, width),) for height, width in ((96, 128), (160, 96), (128, 128))]
    deployed = ts.deploy(backbone, examples, runtime="onnxruntime", threads=1)
    x = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        torch.testing.assert_close(tensors(deployed(x)), tensors(backbone(x)), rtol=1e-3, atol=1e-3)
