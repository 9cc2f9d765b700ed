"""Quantized parts: calibrated on the inputs that the whole model gives them, everything around them as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support.parted import Branching, Counted, Translator, images, seeded, sentences
from torchslim.artifact.model_size import parameters
from torchslim.core.parts import Mounted, unmounted
from torchslim.errors import QuantizeError, SelectError, TaskError
from torchslim.quantize import QuantizedModule

INPUTS = [(images(16, seed=seed)[0],) for seed in range(3)]


def integers_of(model: nn.Module) -> dict[str, set[str]]:
    """The layers with integer weights, by part."""
    return {
        path: {record.layer for record in module.inner.records if record.action == "quantized"}
        for path, module in model.named_modules()
        if isinstance(module, Mounted) and isinstance(module.inner, QuantizedModule)
    }


def noise_db(reference: Tensor, value: Tensor) -> float:
    return float(ts.quantize.sqnr(reference, value))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(Branching)


@pytest.fixture(scope="module")
def static(model: nn.Module) -> nn.Module:
    return ts.quantize.static(model, INPUTS, part=["backbone", "neck"])


def test_each_part_is_quantized_and_the_rest_is_the_same(model: nn.Module, static: nn.Module) -> None:
    assert integers_of(static) == {"backbone": {"0", "3", "7"}, "neck": {"0", "2"}}
    for name in ("low.weight", "low.bias", "high.weight", "high.bias"):
        assert torch.equal(static.state_dict()[name], model.state_dict()[name])
    assert static.high.weight is static.low.weight  # type: ignore[union-attr]
    assert not integers_of(model), "the given model is not modified"


def test_a_part_is_quantized_as_it_would_be_alone(model: nn.Module, static: nn.Module) -> None:
    x = INPUTS[0][0]
    alone = ts.quantize.static(model.backbone, INPUTS)
    assert torch.equal(static.backbone(x), alone(x))
    with torch.no_grad():
        assert noise_db(model.backbone(x), static.backbone(x)) > 20


def test_a_quantized_model_deploys_its_parts(model: nn.Module, static: nn.Module) -> None:
    deployed = ts.deploy(static, INPUTS[0], runtime="eager")
    assert sorted(deployed.parts) == ["backbone", "neck"]  # type: ignore[union-attr]
    assert deployed.quantized
    assert {record.layer for record in deployed.records} <= {
        "backbone.0",
        "backbone.3",
        "backbone.7",
        "neck.0",
        "neck.2",
    }
    counted = Counted(deployed)
    x = images(5, seed=9)[0]
    assert noise_db(static(x), deployed(x)) > 30
    assert counted.calls == {"backbone": 1, "neck": 1}


def test_the_patterns_of_layers_are_names_of_the_whole_model(model: nn.Module) -> None:
    quantized = ts.quantize.static(
        model, INPUTS, part=["backbone", "neck"], layers={"backbone.3": "float", "neck.2": "float"}, runtime="eager"
    )
    assert integers_of(quantized) == {"backbone": {"0", "7"}, "neck": {"0"}}
    with pytest.raises(QuantizeError, match=r"'low'.*'backbone'"):
        ts.quantize.static(model, INPUTS, part="backbone", layers={"low": "float"})


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_a_part_are_stored_as_integers(model: nn.Module, bits: int) -> None:
    quantized = ts.quantize.weights(model, INPUTS[0], bits=bits, part="neck", runtime="eager", checks=None)
    assert set(integers_of(quantized)) == {"neck"}
    with torch.no_grad():
        assert noise_db(model(INPUTS[0][0]), quantized(INPUTS[0][0])) > (20 if bits == 8 else 5)


def test_the_dynamic_scheme_takes_a_part(model: nn.Module) -> None:
    quantized = ts.quantize.dynamic(model, INPUTS[0], part="neck")
    assert integers_of(quantized) == {"neck": {"0", "2"}}


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ("bakcbone", SelectError, ("'bakcbone'", "backbone")),
        (["backbone", "backbone.3"], SelectError, ("overlap",)),
        ("", SelectError, ("empty",)),
    ],
)
def test_wrong_parts_are_named(model: nn.Module, part: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    for call in (
        lambda: ts.quantize.static(model, INPUTS, part=part),
        lambda: ts.quantize.dynamic(model, INPUTS[0], part=part),
        lambda: ts.quantize.weights(model, INPUTS[0], part=part),
        lambda: ts.quantize.prepare(model, INPUTS[0], part=part),
    ):
        with pytest.raises(error) as caught:
            call()
        assert all(word in str(caught.value) for word in words)


def test_a_part_that_is_not_called_is_named() -> None:
    class Never(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.low(self.backbone(x))

    with pytest.raises(TaskError, match="'neck'"):
        ts.quantize.static(seeded(Never), INPUTS, part="neck")


# --- several structures of calls ---

GENERATIONS: Any = [{"method": "generate", "args": sentences(batch, length)[:1]} for batch, length in ((2, 5), (3, 7))]


def calls_of(whole: Any) -> dict[str, int]:
    """Counts the calls of the decoder's graphs, and of the module behind them."""
    counts = dict.fromkeys(["1", "2", "python"], 0)

    def count(name: str) -> Any:
        def note(*_: Any) -> None:
            counts[name] += 1

        return note

    for number, graph in whole.decoder.programs.items():
        graph.register_forward_hook(count(str(number)))
    whole.decoder.part.register_forward_hook(count("python"))
    return counts


def test_observers_see_the_calls_of_all_structures() -> None:
    model = seeded(Translator)
    prepared: Any = ts.quantize.prepare(model, GENERATIONS, part="decoder", runtime="eager")
    counts = calls_of(prepared)
    steps = 0
    for call in GENERATIONS:
        steps += prepared.generate(*call["args"]).shape[1] - 1
    assert counts == {"1": steps - 2, "2": 2, "python": 1}, "in Python once, to see how a first step fills the cache"
    for graph in prepared.decoder.programs.values():
        assert graph.samples.batches


def test_all_steps_of_a_generation_run_in_integers(tmp_path: Path) -> None:
    model = seeded(Translator)
    whole: Any = ts.quantize.dynamic(model, GENERATIONS, part="decoder", runtime="eager")
    assert integers_of(whole)["decoder"]
    assert parameters(whole.decoder) == parameters(whole.decoder.inner), "the weights of a part count once"
    source = sentences(4, 6)[0]
    counts = calls_of(whole)
    with torch.no_grad():
        generated = whole.generate(source)
    assert counts == {"1": generated.shape[1] - 2, "2": 1, "python": 1}
    deployed: Any = ts.deploy(whole, GENERATIONS, runtime="eager")
    assert list(deployed.parts) == ["decoder", "decoder#2"]
    assert all(part.quantized for part in deployed.parts.values())
    loaded: Any = ts.load(ts.save(deployed, tmp_path / "saved"), Translator)
    assert torch.equal(loaded.generate(source), deployed.generate(source))
    assert noise_db(model(source, source[:, :4]), deployed(source, source[:, :4])) > 15


def test_a_quantized_part_must_be_called_as_it_was() -> None:
    model = seeded(Translator)
    whole = ts.quantize.dynamic(model, GENERATIONS, part="decoder", runtime="eager")
    first_steps: Any = [{"method": "generate", "args": (sentences(2, 5)[0], 1)}]
    with pytest.raises(TaskError, match="quantized for calls of another structure"):
        ts.deploy(whole, first_steps, runtime="eager")


# --- trained ---


def trained(prepared: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    prepared.train()
    for seed in range(steps):
        x, labels = images(16, seed=seed)
        loss = nn.functional.cross_entropy(prepared(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prepared.eval()


def test_a_loop_of_ones_own_trains_the_parts_and_the_rest(model: nn.Module) -> None:
    prepared = ts.quantize.prepare(model, INPUTS[0], part="backbone", qat=True, runtime="eager")
    trained(prepared)
    converted = ts.quantize.convert(prepared, checks=None)
    assert integers_of(converted) == {"backbone": {"0", "3", "7"}}
    float_model = unmounted(converted)
    assert isinstance(float_model, Branching)
    for name, value in float_model.state_dict().items():
        if "num_batches" not in name and name != "low.bias":  # the other branch was taken
            assert not torch.equal(value, model.state_dict()[name]), f"{name} was not trained"
    x = images(16, seed=1)[0]
    with torch.no_grad():
        float_model.eval()
        assert noise_db(float_model.backbone(x), converted.backbone(x)) > 15, "the float part has the trained weights"


def test_training_keeps_weights_tied_and_calls_without_a_graph_up_to_date() -> None:
    model = seeded(Translator)
    inputs: Any = [{"method": "generate", "args": sentences(batch, length)[:1]} for batch, length in ((2, 5), (3, 7))]
    prepared: Any = ts.quantize.prepare(model, inputs, part="decoder", qat=True, runtime="eager")
    assert prepared.head.weight is prepared.decoder.part.words.weight
    counts = calls_of(prepared)
    before = prepared.decoder.part.own[0].q.weight.clone()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    source, target = sentences(4, 6)
    nn.functional.cross_entropy(prepared.train()(source, target).flatten(0, 1), target.flatten()).backward()
    optimizer.step()
    assert counts == {"1": target.shape[1] - 1, "2": 1, "python": 1}, "all calls are trained on the grid"
    part = prepared.decoder.part
    assert not torch.equal(part.own[0].q.weight, before)
    for graph in prepared.decoder.programs.values():
        held = dict(graph.named_parameters())
        for name, parameter in part.named_parameters():
            assert held[f"program.model.{name}"] is parameter
    converted: Any = ts.quantize.convert(prepared, checks=None)
    assert converted.head.weight is converted.decoder.part.words.weight
    with torch.no_grad():
        assert converted.generate(source).shape[0] == 4
