"""OpenVINO's own: files that it loads by itself, float32 where floats are asked for, nothing said to its makers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.compiled import deploy
from tests.support.deployment_models import TwoInputs, fresh_python, trained_conv
from tests.support.quantized import Block, quantized
from tests.support.quantized_graphs import int4_graph, stored_bits
from torchslim.quantize import convert, prepare, sqnr, static
from torchslim.runtimes import Deployed, find_runtime, kernels

RUNTIME = find_runtime("openvino")


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return deploy(static(trained_conv(), [(x,)]), (x[:3],), runtime="openvino", threads=1)


ALONE = """
import sys
for name in ("torch", "torchslim", "onnx"):
    sys.modules[name] = None
import numpy as np, openvino
model = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
assert [each.any_name for each in model.inputs] == ["x"], model.inputs
assert [each.any_name for each in model.outputs] == ["output"], model.outputs
print(np.abs(model(np.load(sys.argv[2]))[0] - np.load(sys.argv[3])).max())
"""


@pytest.mark.slow
def test_the_files_need_openvino_alone(deployed: Deployed, tmp_path: Path) -> None:
    x = torch.randn(5, 3, 8, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", deployed(x).numpy())
    path = deployed.save(tmp_path / "model.xml")
    done = fresh_python(ALONE, path, tmp_path / "x.npy", tmp_path / "y.npy", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 0


@pytest.mark.slow
def test_the_files_tell_nothing_of_this_machine_and_are_the_same_again(deployed: Deployed) -> None:
    text = deployed.files[".xml"].decode()
    assert str(Path(__file__).parents[2]) not in text
    assert "/tmp" not in text
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    again = deploy(static(trained_conv(), [(x,)]), (x[:3],), runtime="openvino")
    assert again.payload == deployed.payload


QUIET = """
import sys, pathlib, torch
from torchslim import deploy
deploy(torch.nn.Linear(4, 2), (torch.ones(3, 4),), runtime="openvino")
assert "openvino_telemetry" not in sys.modules
print(sorted(str(each) for each in pathlib.Path.home().rglob("*") if each.is_file()))
"""


@pytest.mark.slow
def test_nothing_is_written_into_the_users_home_or_printed(tmp_path: Path) -> None:
    done = fresh_python(QUIET, HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_floats_are_float32_and_threads_ours(deployed: Deployed) -> None:
    session: Any = deployed.session
    assert session.model.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert session.model.get_property("INFERENCE_NUM_THREADS") == 1
    assert not session.model.get_property("ENABLE_CPU_PINNING")


@pytest.mark.slow
def test_weights_are_stored_once_and_as_integers() -> None:
    """The size of the data is that of the stored numbers, to two percent; what comes on top is text."""
    x = torch.randn(4, 7, 256)
    for mode in ("static", "dynamic", "weights"):
        converted, captured = quantized(Block(256), x, mode)
        found = RUNTIME.compile(captured, source=converted)
        stored = sum(each.numel() * each.element_size() for each in converted.state_dict().values())
        assert len(found.files[".bin"]) <= 1.02 * stored


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "width", "size"), [("dynamic", 64, 64), ("dynamic", 32, 32), ("weights", 64, 0)])
def test_activations_are_rounded_where_the_scheme_asks_for_it(mode: Any, width: int, size: int) -> None:
    x = torch.randn(4, 7, width)
    converted, captured = quantized(Block(width), x, mode)
    found = RUNTIME.compile(captured, source=converted, threads=1)
    session: Any = found.session
    assert session.model.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == size
    assert all("i8 weights" in each.type for each in kernels(found) if each.layer in ("up", "down"))


@pytest.mark.slow
def test_four_bits_stay_four_bits() -> None:
    x = torch.randn(4, 7, 256)
    graph = int4_graph(Block(256).eval(), (x,))
    found = deploy(graph, (x,), runtime="openvino", threads=1)
    assert sqnr(graph(x), found(x)) >= 100
    assert len(found.files[".bin"]) <= 1.02 * stored_bits(graph) / 8
    assert all("u4 weights" in each.type for each in kernels(found) if each.layer in ("up", "down"))


@pytest.mark.slow
def test_an_input_that_nothing_uses_is_still_taken() -> None:
    model, inputs = TwoInputs().eval(), {"left": torch.randn(3, 4), "right": torch.randn(3, 5), "unused": torch.ones(3)}
    found = deploy(model, inputs, runtime="openvino")
    session: Any = found.session
    assert [each.any_name for each in session.model.inputs] == ["left", "right", "unused"]
    assert torch.allclose(found(**inputs).first, model.left(inputs["left"]), atol=1e-5)


@pytest.mark.slow
def test_infinity_and_nan_come_out_as_they_go_in() -> None:
    found = deploy(torch.nn.ReLU(), (torch.randn(3, 4),), runtime="openvino")
    answer = found(torch.tensor([[math.inf, -math.inf, 1.0, -1.0]]))
    assert answer.tolist() == [[math.inf, 0.0, 1.0, 0.0]]


class Residuals(nn.Module):
    """A pooled stem and two residual blocks, written as torchvision writes them: the layer first, what it adds last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
        for conv in self.convs:
            x = torch.relu(conv(x) + x)
        return self.last(x)


@pytest.mark.slow
def test_what_a_layer_adds_and_what_is_pooled_stays_in_integers() -> None:
    # the sum of a block is added to the next one: rounded once, for the layer and for the addition
    x = torch.randn(2, 3, 16, 16)
    prepared = prepare(Residuals(), (x,), runtime="openvino")
    prepared.calibrate([(x,)])
    deployed = deploy(convert(prepared), (x,), runtime="openvino", threads=1)
    operations = deployed.session.model.get_runtime_model().get_ordered_ops()
    kinds = [each.get_rt_info()["layerType"].astype(str) for each in operations]
    assert kinds.count("FakeQuantize") == 1  # of the input; every other is computed by the layer before
    assert "Subtract" not in kinds
    assert "PowerStatic" not in kinds
    (pool,) = [each for each, kind in zip(operations, kinds, strict=True) if kind == "Pooling"]
    assert pool.get_rt_info()["outputPrecisions"].astype(str) == "u8"
