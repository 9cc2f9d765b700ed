"""What really runs on integers: MACs against closed forms, kernels against the graph, and no silent float."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import torchslim as ts
from tests.support.deployment_models import trained_conv
from torchslim.artifact.integer_coverage import executed, lowered
from torchslim.artifact.model_size import macs
from torchslim.cli import cli
from torchslim.core.reason import Reason
from torchslim.core.step import Context
from torchslim.graph.export import capture
from torchslim.graph.layers import layers_of, structure_of
from torchslim.quantize import Quantize, convert, prepare


class Everything(nn.Module):
    """A conv, a transposed one, an LSTM, attention, a linear layer, a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, groups=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.rnn = nn.LSTM(12, 6, batch_first=True, bidirectional=True)
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(torch.relu(self.conv(x))).flatten(2).transpose(1, 2)  # (batch, 144, 4)
        y = self.rnn(torch.cat([y, y, y], -1))[0]
        q, k = self.q(y), self.k(y)
        return torch.nn.functional.scaled_dot_product_attention(q, k, y) @ torch.relu(k).transpose(1, 2)


@pytest.mark.slow
def test_macs_are_those_of_closed_forms() -> None:
    x = torch.randn(3, 3, 8, 8)
    captured = capture(Everything().eval(), (x,))
    found = {(each.layer, each.operation): each.macs for each in layers_of(captured.program, captured.batch_axis)}
    steps = 144
    assert found["conv", "conv2d"] == 36 * 8 * 27
    assert found["up", "conv_transpose2d"] == 36 * 8 * 4 * 4
    assert found["rnn", "lstm"] == steps * 2 * 4 * 6 * (12 + 6)
    assert found["q", "linear"] == steps * 12 * 12
    rest = {
        operation: value for (_, operation), value in found.items() if operation not in ("conv2d", "linear", "lstm")
    }
    assert rest["scaled_dot_product_attention"] == steps * steps * (12 + 12)
    assert rest["matmul"] == steps * 12 * steps
    assert sum(found.values()) == macs(Everything().eval(), (x[:1],)).total


def test_programs_of_one_structure_are_known_by_it_however_their_tensors_are_stored() -> None:
    def digest(width: int, stored: bool) -> str:
        net = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3)).eval()
        if stored:  # as a frozen bias is: buffers come after all parameters in a program's signature
            bias = net[0].bias
            del net[0].bias
            net[0].register_buffer("bias", bias.detach())
        return structure_of(capture(net, (torch.randn(2, 3, 8, 8),)).program)

    assert digest(4, stored=True) == digest(4, stored=False)
    assert digest(4, stored=False) != digest(6, stored=False)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "int4-weights", "int8-dynamic"])
def test_bits_and_activations_are_read_from_the_graph(scheme: str) -> None:
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(trained_conv(), (x,), scheme=scheme, runtime="eager")
    if scheme == "int8":
        prepared.calibrate([(x,)])
    captured = capture(convert(prepared), (x,))
    layers = {each.layer: each for each in layers_of(captured.program, captured.batch_axis)}
    assert set(layers) == {"stem", "depthwise", "pointwise", "hidden", "head"}
    assert {each.weight_bits for each in layers.values()} == {4 if "4" in scheme else 8}
    kinds = {each.activations for name, each in layers.items() if name in ("hidden", "head")}
    assert kinds == {{"int8": "static", "int8-dynamic": "dynamic"}.get(scheme, "float")}


@pytest.mark.slow
def test_every_layer_of_a_quantized_network_runs_on_integers() -> None:
    x = torch.randn(4, 3, 8, 8)
    deployed = ts.deploy(ts.quantize.static(trained_conv(), [(x,)]), (x,), runtime="onnxruntime")
    found = lowered(deployed)
    assert found.integer_share == 1
    assert all(each.integer and not each.why for each in found.layers)
    assert not any("computed in float" in each for each in found.warnings)
    floating = lowered(ts.deploy(trained_conv(), (x,), runtime="onnxruntime"))
    assert floating.integer_share == 0
    assert not floating.warnings
    assert {each.why for each in floating.layers} == {"not quantized"}


@pytest.mark.slow
def test_a_layer_in_float_says_why() -> None:
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(trained_conv(), (x,), layers={"pointwise": "float"})
    prepared.calibrate([(x,)])
    found = lowered(ts.deploy(convert(prepared), (x,), runtime="onnxruntime"), prepared.records)
    by_layer = {each.layer: each for each in found.layers}
    assert not by_layer["pointwise"].integer
    assert by_layer["pointwise"].why == Reason.AS_ASKED
    assert 0 < found.integer_share < 1
    assert "pointwise" in found.table().splitlines()[3], "what is in float comes first"


@pytest.mark.slow
def test_silent_float_is_told() -> None:
    """A graph made for another runtime: the pairs that ONNX Runtime wants are not there."""
    x = torch.randn(4, 3, 8, 8)
    deployed = ts.deploy(ts.quantize.static(trained_conv(), [(x,)], runtime="openvino"), (x,), runtime="onnxruntime")
    found = lowered(deployed)
    assert found.integer_share < 1
    assert any("computed in float on onnxruntime" in each for each in found.warnings)


@pytest.mark.slow
def test_a_record_never_contradicts_the_kernels() -> None:
    """A layer that is recorded with rounded activations and runs in float says why."""
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(trained_conv(), (x,), runtime="openvino")
    prepared.calibrate([(x,)])
    found = lowered(ts.deploy(convert(prepared), (x,), runtime="onnxruntime"), prepared.records)
    merged = executed([asdict(record) for record in prepared.records], found)
    assert {each["integer"] for each in merged} == {True, False}
    for record in merged:
        assert record["integer"] == (not record["reason"])


@pytest.mark.slow
def test_it_survives_saving(tmp_path: Any) -> None:
    x = torch.randn(4, 3, 8, 8)
    deployed = ts.deploy(ts.quantize.static(trained_conv(), [(x,)]), (x,), runtime="onnxruntime")
    ts.save(deployed, tmp_path / "artifact")
    assert lowered(ts.load(tmp_path / "artifact")).to_dict() == lowered(deployed).to_dict()


@pytest.mark.slow
def test_the_layer_that_loses_most_comes_first() -> None:
    """A weight with one huge value leaves no resolution for the rest of its channel."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[2].weight[:, 0] = 0
        model[2].weight[:, 3] = 1000.0
        model[0].weight[3] = 0
        model[0].bias[3] = 0
    x = torch.randn(64, 8)
    task = ts.Task(val=[(x, torch.zeros(64, dtype=torch.long))], calibration=[(x, None)], metric="accuracy")
    context = Context(task=task, teacher=model, example_inputs=(x,))
    for quantize in (Quantize(checks=None), Quantize("int8-weights", checks=None)):
        records = quantize(copy.deepcopy(model), context).layers
        assert records[0].layer == "2"
        assert records[0].sqnr_db is not None
        assert records[0].sqnr_db < 15 < records[1].sqnr_db or records[1].layer == "4"


@pytest.mark.slow
def test_the_command_line_tells_of_an_artifact(tmp_path: Any) -> None:
    x = torch.randn(4, 3, 8, 8)
    ts.save(ts.deploy(ts.quantize.static(trained_conv(), [(x,)]), (x,), runtime="onnxruntime"), tmp_path / "artifact")
    done = CliRunner().invoke(cli, ["kernels", str(tmp_path / "artifact")])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("100.0 % of the multiply-accumulates run on integers on onnxruntime")
    found = json.loads(CliRunner().invoke(cli, ["kernels", str(tmp_path / "artifact"), "--json"]).output)
    assert {each["layer"] for each in found["layers"]} == {"stem", "depthwise", "pointwise", "hidden", "head"}


@pytest.mark.slow
def test_eager_tells_of_its_dynamic_kernels(tmp_path: Any) -> None:
    x = torch.randn(4, 3, 8, 8)
    deployed = ts.deploy(ts.quantize.dynamic(trained_conv(), (x,), runtime="eager"), (x,), runtime="eager")
    by_layer = {each.layer: each for each in lowered(deployed).layers}
    assert by_layer["hidden"].integer
    assert by_layer["hidden"].kernel == "DynamicLinear"
    assert not by_layer["stem"].integer
    ts.save(deployed, tmp_path / "artifact")
    assert lowered(ts.load(tmp_path / "artifact")).to_dict() == lowered(deployed).to_dict()


@pytest.mark.slow
def test_a_module_of_the_name_that_captures_wrap_with_keeps_it() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    x = torch.randn(4, 8)
    deployed = ts.deploy(ts.quantize.dynamic(Outer().eval(), (x,), runtime="eager"), (x,), runtime="eager")
    assert [each.layer for each in lowered(deployed).layers] == ["model.0", "model.2"]
    assert [each.layer for each in ts.runtimes.kernels(deployed) if each.integer] == ["model.0", "model.2"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        ("eager", ["PyTorch.*integer LSTM.*slower"]),
        ("openvino", [r"no layer.*openvino \(lstm: .*no integer kernel"]),
        ("onnxruntime", []),
    ],
)
def test_a_recurrent_network_says_where_int8_will_not_pay(runtime: str, said: list[str]) -> None:
    x = torch.randn(2, 5, 8)
    prepared = prepare(Recurrent(), (x,), runtime=runtime, scheme="int8-dynamic")
    deployed = ts.deploy(convert(prepared), (x,), runtime=runtime, threads=1)
    warnings = lowered(deployed, prepared.records).warnings
    assert len(warnings) == len(said)
    assert all(re.search(words, warning) for warning, words in zip(warnings, said, strict=True))
