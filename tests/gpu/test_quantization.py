"""A model on the device is quantized as one on the CPU, and its artifact returns CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from tests.support.gpu import CPU, TOLERANCE, taken, task_on
from torchslim.quantize import Helpers

HELPERS: dict[str, Helpers] = {
    "none": Helpers(),
    "equalize": Helpers(equalize=True),
    "smooth": Helpers(smooth=0.5),
    "gptq": Helpers(rounding="gptq"),
    "adaround": Helpers(rounding="adaround"),
    "biases": Helpers(correct_biases=True),
}


class Positions(nn.Module):
    """Makes tensors on the device of its input, as transformers do for their positions and masks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, toy.CLASSES)
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mean(1)[:, :16].abs().clamp(max=15).long()
        places = torch.arange(tokens.shape[1], device=x.device)
        hidden = self.embed(tokens) + self.embed(places)
        hidden = hidden + torch.full((8,), 0.5, device=x.device)
        return self.head(torch.relu(self.inner(hidden)).mean(1))


def inputs(device: torch.device) -> list[tuple[Tensor]]:
    """Batches for calibration."""
    return [(toy.images(16, seed)[0].to(device),) for seed in (1, 2)]


@pytest.mark.parametrize("there", [False, True], ids=["batches on CPU", "batches on device"])
@pytest.mark.parametrize("name", HELPERS)
def test_static_gives_the_outputs_of_the_cpu(name: str, there: bool, device: torch.device) -> None:
    options = {"helpers": HELPERS[name], "runtime": "eager"}
    model = ts.quantize.static(toy.model().to(device), inputs(device if there else CPU), **options)
    expected = ts.quantize.static(toy.model(), inputs(CPU), **options)
    images = toy.images(8, 5)[0]
    torch.testing.assert_close(model(images), expected(images), rtol=TOLERANCE, atol=TOLERANCE)
    assert ts.quantize.sqnr(toy.model().eval()(images), model(images)) > 15


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround"])
def test_groups_of_weights_give_the_outputs_of_the_cpu(rounding: str, device: torch.device) -> None:
    options: dict[str, Any] = {"bits": 4, "runtime": "eager", "helpers": Helpers(rounding=rounding)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    batches = [(torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)),) for seed in (1, 2)]
    expected = ts.quantize.weights(model, batches[0], batches=batches, **options)
    moved = ts.quantize.weights(model.to(device), tuple(x.to(device) for x in batches[0]), batches=batches, **options)
    torch.testing.assert_close(moved(*batches[0]), expected(*batches[0]), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_model_is_left_on_its_device(device: torch.device) -> None:
    model = toy.model().to(device)
    ts.quantize.dynamic(model, inputs(CPU)[0], runtime="eager")
    ts.deploy(model, inputs(device)[0], runtime="eager")
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_an_artifact_returns_cpu_tensors(runtime: str, quantized: bool, device: torch.device) -> None:
    model = toy.model().to(device).eval()
    expected = toy.model().eval()(toy.images(8, 5)[0]).detach()
    made = ts.quantize.static(model, inputs(device), runtime=runtime) if quantized else model
    deployed = ts.deploy(made, inputs(device)[0], runtime=runtime)
    for place in (CPU, device):
        answer = deployed(toy.images(8, 5)[0].to(place))
        assert answer.device == CPU
        assert ts.quantize.sqnr(expected, answer) > (15 if quantized else 60)


@pytest.mark.parametrize("options", [{}, {"learned_step": True}, {"scheme": "int8-dynamic"}], ids=str)
def test_training_on_the_grid_gives_the_outputs_of_the_cpu(options: dict[str, Any], device: torch.device) -> None:
    step = ts.Quantize(mode="qat", train=ts.Finetune(epochs=2, optimizer="sgd", lr=0.01), **options)
    here, there = (taken(step, place, target=ts.Target(runtime="eager")) for place in (device, CPU))
    images = toy.images(64, 5)[0]
    one, other = here.model(images), there.model(images)
    assert one.device == CPU
    assert ts.quantize.sqnr(other, one) > 20  # a weight at the border of two integers may go either way
    assert (one.argmax(1) == other.argmax(1)).double().mean() > 0.9


def test_training_on_the_grid_distills(device: torch.device) -> None:
    step = ts.Quantize(mode="qat", train=ts.Distill(epochs=1, optimizer="sgd", lr=0.01, feature="hint"))
    here, there = (taken(step, place, target=ts.Target(runtime="eager")) for place in (device, CPU))
    images = toy.images(64, 5)[0]
    assert ts.quantize.sqnr(there.model(images), here.model(images)) > 20


def test_a_model_that_makes_tensors_trains_on_the_grid(device: torch.device) -> None:
    """The captured graph names the device of such tensors."""
    torch.manual_seed(0)
    prepared = ts.quantize.prepare(Positions(), inputs(CPU)[0], runtime="eager", qat=True)
    before = prepared(*inputs(CPU)[0]).detach()
    prepared.to(device).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for images, labels in task_on(device).train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(images), labels).backward()
        optimizer.step()
    prepared.eval()
    trained = prepared(*inputs(device)[0]).detach().cpu()
    assert not torch.allclose(trained, before, atol=1e-3)
    quantized = ts.quantize.convert(prepared)
    assert ts.quantize.sqnr(trained, quantized(*inputs(CPU)[0])) > 15


def test_a_users_own_loop_calibrates_on_the_device(device: torch.device) -> None:
    prepared = ts.quantize.prepare(toy.model().to(device), inputs(device)[0], runtime="eager").to(device)
    for (images,) in inputs(device):
        assert prepared(images).device.type == device.type
    quantized = ts.quantize.convert(prepared)
    images = toy.images(8, 5)[0]
    expected = ts.quantize.static(toy.model(), inputs(CPU), runtime="eager")
    assert ts.quantize.sqnr(expected(images), quantized(images)) > 30
