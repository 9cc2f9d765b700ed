"""Static quantization: the integers are the right ones, the runtime computes them, and what cannot be says so."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from tests.support.compiled import deploy
from tests.support.deployment_models import Prediction, Recurrent, TokenClassifier, trained_conv
from tests.support.processors import SATURATING
from torchslim.core.fingerprint import fingerprint
from torchslim.errors import DeployError, QuantizeError
from torchslim.quantize import Quantize, QuantizedModule, sqnr, static
from torchslim.quantize.backend_profiles import PROFILES
from torchslim.quantize.preparation import convert, prepare
from torchslim.quantize.schemes import weight_range
from torchslim.runtimes import Deployed, kernels

LOW, HIGH = weight_range("onnxruntime")
QUANTIZED = torch.ops.quantized_decomposed


def images(count: int, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained_conv()


@pytest.fixture(scope="module")
def quantized(model: nn.Module) -> QuantizedModule:
    return static(model, [(images(32, seed=seed),) for seed in range(3)])  # type: ignore[return-value]


@pytest.fixture(scope="module")
def deployed(quantized: nn.Module) -> Deployed:
    return deploy(quantized, (images(2),))


def recorded(model: nn.Module, inputs: tuple[Any, ...], runtime: str) -> tuple[QuantizedModule, Any]:
    """A quantized model, and what was recorded about its layers."""
    prepared = prepare(model, inputs, runtime=runtime)
    prepared.calibrate([inputs])
    return convert(prepared), prepared.records


def stored_integers(model: nn.Module, runtime: str = "onnxruntime") -> list[tuple[Tensor, Tensor]]:
    """The weights of a converted graph: integers and their scales, in the graph's order."""
    graph = model.program
    found = []
    for node in graph.graph.nodes:
        if node.target is QUANTIZED.dequantize_per_channel.default:
            integers, scale, zero_point = (getattr_path(graph, each.target) for each in node.args[:3])
            assert not zero_point.any(), "symmetric"
            assert node.args[4:6] == weight_range(runtime)
            found.append((integers, scale))
    return found


def getattr_path(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def reference(weight: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel symmetric quantization: scale = max|w| / ((high - low) / 2), round half to even, clip."""
    flat = weight.reshape(len(weight), -1).astype(np.float32)
    scale = np.abs(flat).max(1) / np.float32((high - low) / 2)
    steps = np.rint(flat * (np.float32(1) / scale)[:, None]).clip(low, high)
    return steps.reshape(weight.shape).astype(np.int8), scale


# --- the numbers ---


@pytest.mark.slow
def test_weights_are_the_reference_integers(model: Any, quantized: nn.Module) -> None:
    folded = model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)
    weights = [
        model.stem.weight * folded.view(-1, 1, 1, 1),
        model.depthwise.weight,
        model.pointwise.weight,
        model.hidden.weight,
        model.head.weight,
    ]
    stored = stored_integers(quantized)
    assert len(stored) == len(weights)
    for (integers, scale), weight in zip(stored, weights, strict=True):
        expected, steps = reference(weight.detach().numpy(), LOW, HIGH)
        assert integers.dtype == torch.int8
        assert integers.min() >= LOW
        assert integers.max() <= HIGH
        np.testing.assert_allclose(scale.numpy(), steps, rtol=1e-5)
        # batch norm is folded in another order of operations: a value between two steps may go either way
        difference = np.abs(integers.numpy().astype(int) - expected.astype(int))
        assert difference.max() <= (1 if weight is weights[0] else 0)
        assert (difference != 0).mean() < 0.02


@pytest.mark.slow
@settings(max_examples=4)
@given(seed=st.integers(0, 1000), spread=st.floats(1e-6, 1e6), outputs=st.integers(1, 6))
def test_any_linear_layer_gets_the_reference_integers(seed: int, spread: float, outputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(7, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, 7, generator=generator) * spread)
    ((integers, scale),) = stored_integers(static(layer, [(torch.randn(9, 7, generator=generator),)]))
    expected, steps = reference(layer.weight.detach().numpy(), LOW, HIGH)
    np.testing.assert_allclose(scale.numpy(), steps, rtol=1e-6)
    assert np.array_equal(integers.numpy(), expected)


def test_activations_are_unsigned_bytes(quantized: nn.Module) -> None:
    seen: list[Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is QUANTIZED.quantize_per_tensor.default:
                assert n.args[3:] == (0, 255, torch.uint8)
                seen.append(value)
            return value

    Watch(quantized.program).run(10 * images(4))
    assert len(seen) >= 7
    assert all(each.dtype == torch.uint8 for each in seen)
    assert max(int(each.max()) for each in seen) == 255, "values beyond the calibrated range are clipped"


def test_the_quantized_model_is_close_to_the_float_one(model: nn.Module, quantized: nn.Module) -> None:
    x = images(200, seed=9)
    assert sqnr(model(x), quantized(x)) >= 25


@pytest.mark.slow
def test_zeros_stay_zeros(model: nn.Module) -> None:
    pruned = copy.deepcopy(model)
    for name, value in pruned.named_parameters():
        if value.dim() >= 2 and "stem" not in name:
            value.data[torch.rand(value.shape) < 0.6] = 0
    for (integers, _), layer in zip(
        stored_integers(static(pruned, [(images(16),)])),
        (pruned.stem, pruned.depthwise, pruned.pointwise, pruned.hidden, pruned.head),  # type: ignore[union-attr]
        strict=True,
    ):
        assert torch.equal(integers[layer.weight == 0], torch.zeros_like(integers[layer.weight == 0]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_channel_without_weights_keeps_its_bias_on_the_runtime(kind: str) -> None:
    """Integer kernels add the bias in steps of input scale x weight scale: a dead channel's must not get lost."""
    layer = nn.Conv2d(3, 4, 3) if kind == "conv" else nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[2] *= 1e-12
        layer.bias.copy_(torch.tensor([0.1, 0.5, -0.7, 0.3]))
    x = images(8) if kind == "conv" else torch.randn(8, 3)
    quantized = static(nn.Sequential(layer, nn.Identity()), [(x,)])
    for answer in (quantized(x), deploy(quantized, (x,))(x)):
        channels = answer.movedim(1, 0).flatten(1)
        assert torch.allclose(channels[1], torch.tensor(0.5), atol=0.02)
        assert torch.allclose(channels[2], torch.tensor(-0.7), atol=0.02)


def test_no_float_copy_of_the_weights_is_left(quantized: nn.Module) -> None:
    stored = list(quantized.state_dict().values())
    integers = sum(each.numel() for each in stored if each.dtype == torch.int8)
    others = sum(each.numel() * each.element_size() for each in stored if each.dtype != torch.int8 and each.dim() <= 1)
    total = sum(each.numel() * each.element_size() for each in stored)
    assert integers == 216 + 72 + 64 + 128 + 80
    assert total <= 1.05 * (integers + others)


# --- on the runtime ---


@pytest.mark.slow
def test_onnx_runtime_answers_as_the_converted_graph(quantized: nn.Module, deployed: Deployed) -> None:
    x = images(200, seed=9)
    ours, theirs = quantized(x), deployed(x)
    assert sqnr(ours, theirs) >= 30
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.99
    for count in (1, 3):
        assert sqnr(quantized(x[:count]), deployed(x[:count])) >= 30


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


OPERATIONS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(3, 6, 3),
    "conv-relu": nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU()),
    "conv-relu6": nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6()),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3),
    "dilated same": nn.Conv2d(3, 6, 3, dilation=2, padding="same"),
    "conv-pool": nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2)),
    "add": Residual(),
    "linear-relu": nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ReLU()),
    "linear on sequences": nn.Sequential(nn.Linear(8, 8), nn.Identity()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_at_most_one_step_from_the_converted_graph(name: str) -> None:
    torch.manual_seed(5)
    operation = OPERATIONS[name].eval()
    quantized = static(operation, [(images(32),)])
    last = [node for node in quantized.program.graph.nodes if node.target is QUANTIZED.dequantize_per_tensor.default][
        -1
    ]
    step = float(last.args[1])
    x = images(64, seed=8)
    difference = (quantized(x) - deploy(quantized, (x[:2],))(x)).abs()
    assert (difference <= 1.001 * step).float().mean() >= 0.999
    assert (difference < 0.01 * step).float().mean() >= 0.98, "and nearly always the same step"


def optimized_operations(payload: bytes, path: Any) -> list[str]:
    """What ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def test_every_layer_runs_on_integers(deployed: Deployed, tmp_path: Any) -> None:
    operations = optimized_operations(deployed.payload or b"", tmp_path / "optimized.onnx")
    assert operations.count("QLinearConv") == 3
    assert operations.count("QGemm") == 2
    assert not {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm"} & set(operations)


NETWORKS = {  # every kind of block once
    "resnet": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 2, 1, 1], num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.MobileNetV2(
        num_classes=10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 160, 1, 2]]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks_run_on_integers_alone(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for module in network.modules():  # zeros would be dropped from the graph, and hide a head that stays float
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias, std=0.1)
    layers = {path for path, each in network.named_modules() if isinstance(each, (nn.Conv2d, nn.Linear))}
    before = fingerprint(network.state_dict())

    quantized, records = recorded(network, (images(8, 64),), "onnxruntime")
    deployed = deploy(quantized, (images(2, 64),))

    assert {record.layer for record in records if record.action == "quantized"} == layers
    assert not [record for record in records if record.action == "refused"]
    assert fingerprint(network.state_dict()) == before
    operations = optimized_operations(deployed.payload or b"", tmp_path / "optimized.onnx")
    assert operations.count("QLinearConv") + operations.count("QGemm") == len(layers)
    assert not {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm"} & set(operations)
    x = images(8, 64, seed=3)
    assert sqnr(network(x), quantized(x)) >= 20, "random weights; trained networks keep more"
    assert sqnr(quantized(x), deployed(x)) >= 30
    assert deployed.size_bytes is not None
    assert deployed.size_bytes < 0.3 * sum(4 * each.numel() for each in network.parameters())


def test_biases_of_gemms_are_integers_at_the_scale_of_their_products(deployed: Deployed) -> None:
    graph = onnx.load_from_string(deployed.payload or b"").graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    gemms = [node for node in graph.node if node.op_type == "Gemm"]
    assert len(gemms) == 2
    for gemm in gemms:
        left, right, bias = (producers[name] for name in gemm.input)
        assert constants[bias.input[0]].dtype == np.int32
        np.testing.assert_allclose(
            constants[bias.input[1]], constants[left.input[1]] * constants[right.input[1]], rtol=1e-6
        )


# --- the model around it ---


@pytest.mark.slow
def test_the_callers_model_is_unchanged(model: nn.Module) -> None:
    trainee = copy.deepcopy(model).train()
    before = fingerprint(trainee.state_dict())
    random = torch.get_rng_state()
    static(trainee, [(torch.ones(4, 3, 8, 8),)])
    assert fingerprint(trainee.state_dict()) == before
    assert all(module.training for module in trainee.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_quantized_model_cannot_be_trained(quantized: nn.Module) -> None:
    with pytest.raises(QuantizeError, match="cannot be trained"):
        quantized.train()
    assert quantized.eval() is quantized
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_a_copy_of_a_quantized_model_answers_the_same(quantized: nn.Module) -> None:
    x = images(3)
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))


@pytest.mark.slow
def test_it_is_called_like_the_model() -> None:
    torch.manual_seed(0)
    model = TokenClassifier().eval()
    ids = torch.randint(20, (4, 6))
    quantized = static(model, [{"ids": ids}, {"ids": ids.flip(0)}])
    answer = quantized(ids)
    assert list(answer) == ["logits", "hidden", "classes"]
    assert torch.equal(quantized(ids, None, scale=1.0)["logits"], answer["logits"])
    assert sqnr(model(ids), answer) > 20
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokens'"):
        quantized(ids, tokens=ids)
    with pytest.raises(DeployError, match=r"inputs\['scale'\].*fixed.*1.0"):
        quantized(ids, scale=2.0)


@pytest.mark.slow
def test_records_name_the_layers_of_a_model_with_a_dataclass_output() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Conv2d(3, 4, 3)
            self.up = nn.ConvTranspose2d(4, 4, 2)

        def forward(self, x: Tensor) -> Prediction:
            return Prediction(self.up(self.model(x)))

    quantized, records = recorded(Wrapped().eval(), (images(4),), "eager")
    assert isinstance(quantized(images(2)), Prediction)
    by_layer = {record.layer: record for record in records}
    assert by_layer["model"].action == "quantized"
    assert (by_layer["model"].weight_bits, by_layer["model"].activation_bits) == (8, 8)
    assert by_layer["up"].action == "quantized"
    on_runtime = {record.layer: record for record in recorded(Wrapped().eval(), (images(4),), "onnxruntime")[1]}
    assert (on_runtime["up"].weight_bits, on_runtime["up"].activation_bits) == (8, None)
    assert "no integer kernel" in on_runtime["up"].reason


@pytest.mark.slow
def test_one_weight_in_two_places_is_stored_once() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Tanh())
    quantized = static(model, [(torch.randn(32, 6),)])
    x = torch.randn(16, 6)
    assert sqnr(model(x), quantized(x)) >= 25
    assert sqnr(quantized(x), deploy(quantized, (x,))(x)) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_inputs_calibrate(value: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    x = torch.full((2, 3, 8, 8), value)
    quantized = static(model, [(x,), (x,)])
    assert torch.allclose(quantized(x), model(x), atol=0.05)
    if value == 0.0:  # the smallest scale there is, on the runtime too
        assert torch.allclose(deploy(quantized, (x,))(x), model(x), atol=0.05)
    assert torch.isfinite(quantized(images(2))).all()


@pytest.mark.slow
def test_an_all_zero_layer_quantizes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    x = images(4)
    quantized = static(model, [(x,)])
    assert torch.allclose(quantized(x), model(x), atol=0.01)
    assert torch.allclose(deploy(quantized, (x,))(x), model(x), atol=0.01)


# --- errors ---


def test_what_is_quantized_already_is_refused(quantized: nn.Module) -> None:
    for each in (quantized, nn.Sequential(quantized)):
        with pytest.raises(QuantizeError, match="quantized already.*float model"):
            static(each, [(images(2),)])


def test_no_batches_are_refused(model: nn.Module) -> None:
    with pytest.raises(QuantizeError, match="calibration batches.*100 to 500"):
        static(model, [])


def test_batches_that_are_no_inputs_are_refused(model: nn.Module) -> None:
    message = r"tuple.*dict.*tensor of shape .*\(x,\)"
    with pytest.raises(QuantizeError, match=message):
        static(model, [images(2)])  # type: ignore[list-item]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_their_batch_and_input(model: nn.Module, bad: float) -> None:
    broken = images(4)
    broken[1, 2, 3, 4] = bad
    with pytest.raises(QuantizeError, match=r"batch 2.*not finite.*input 0 \('x'\)"):
        static(model, [(images(4),), (broken,), (images(4),)])


def test_overflow_inside_the_model_names_its_layer_and_batch() -> None:
    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).exp())

    with pytest.raises(QuantizeError, match="batch 2.*not finite at exp"):
        static(Explodes(), [(images(4),), (1e4 * images(4),)])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[1].weight.mul_(1e30)  # type: ignore[operator]
    with pytest.raises(QuantizeError, match="batch 1.*not finite at 1;"):
        static(model, [(1e20 * images(4),)])


@pytest.mark.slow
def test_batches_of_other_sizes_are_refused(model: nn.Module) -> None:
    with pytest.raises(QuantizeError, match=r"'x'.*\(any, 3, 8, 8\).*\(4, 3, 9, 9\)"):
        static(model, [(images(4),), (images(4, 9),)], dynamic_shapes="batch")


def test_nothing_to_quantize_says_why() -> None:
    with pytest.raises(QuantizeError, match="nothing to quantize.*bilinear.*no integer kernel") as caught:
        static(nn.Bilinear(6, 6, 4), [(torch.randn(3, 6), torch.randn(3, 6))])
    assert "leave the quantization out" in str(caught.value)
    with pytest.raises(QuantizeError, match="no layer has weights"):
        static(nn.ReLU(), [(images(2),)])


@pytest.mark.slow
def test_models_of_other_precisions_are_quantized_and_keep_their_type() -> None:
    x = images(16)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(dtype)
        quantized = static(model, [(x.to(dtype),)], runtime="eager")
        assert quantized(x.to(dtype)).dtype == dtype
        assert sqnr(model(x.to(dtype)), quantized(x.to(dtype))) >= 25


@pytest.mark.slow
def test_a_weight_that_is_computed_is_folded_or_refused(processor: str) -> None:
    class FromInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.first.weight * x.mean()
            return self.last(nn.functional.linear(x, weight))

    x = torch.randn(8, 4)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3)).eval()
    quantized, records = recorded(normed, (x,), "eager")
    assert [(record.layer, record.action) for record in records] == [("0", "quantized"), ("2", "quantized")]
    assert len(stored_integers(quantized, "eager")) == 2, "stored as integers, not computed at each call"
    assert sqnr(normed(x), quantized(x)) > 25
    _, records = recorded(FromInput().eval(), (x,), "eager")
    reasons = {record.layer: (record.action, record.reason) for record in records}
    assert any(action == "refused" and "computed from the input" in reason for action, reason in reasons.values())
    assert reasons["last"][0] == "quantized"


def test_schemes_and_modes_are_checked() -> None:
    with pytest.raises(QuantizeError, match="scheme 'int3'.*'int8'"):
        Quantize("int3")
    with pytest.raises(QuantizeError, match="mode.*'ptq', 'qat'.*'later'"):
        Quantize(mode="later")  # type: ignore[arg-type]
    with pytest.raises(QuantizeError, match="observer 'max'.*min-max"):
        Quantize(observer="max")
    with pytest.raises(QuantizeError, match="belong to mode='qat'"):
        Quantize(learned_step=True)


@pytest.mark.slow
def test_a_recurrent_network_is_quantized_where_it_can_be() -> None:
    quantized, records = recorded(Recurrent("LSTM").eval(), (torch.randn(3, 7, 6),), "onnxruntime")
    assert [(record.layer, record.action) for record in records] == [
        ("rnn", "quantized"),
        ("head", "quantized"),
    ]
    assert records[0].activation_bits is None
    assert "static ranges" in records[0].reason
    assert torch.isfinite(quantized(torch.randn(2, 7, 6))).all()


# --- the machine ---


def test_weights_use_seven_bits_where_sums_would_saturate(processor: str) -> None:
    for runtime in PROFILES:
        # eager computes on floats, and XNNPACK widens to 16 bits before it multiplies
        largest = 63 if processor in SATURATING and runtime not in ("eager", "executorch") else 127
        assert weight_range(runtime) == (-largest, largest)
    for runtime in ("onnxruntime", "eager"):
        quantized = static(nn.Linear(8, 4), [(torch.randn(16, 8),)], runtime=runtime)
        ((integers, _),) = stored_integers(quantized, runtime)
        assert integers.abs().max() == weight_range(runtime)[1]


def test_seven_bit_weights_cannot_saturate() -> None:
    assert 2 * 255 * 64 < 2**15 <= 2 * 255 * 127


# --- signal to noise ---


def test_sqnr_is_ten_log_ten_of_the_power_ratio() -> None:
    signal, noise = torch.tensor([3.0, 4.0]), torch.tensor([0.3, -0.4])
    assert sqnr(signal, signal + noise) == pytest.approx(20.0, abs=1e-4)
    assert sqnr({"a": signal, "n": 3}, {"a": signal, "n": 3}) == float("inf")
    assert sqnr(torch.zeros(2), noise) == float("-inf")
    assert sqnr((signal, torch.tensor([1])), (signal + noise, torch.tensor([2]))) == pytest.approx(20.0, abs=1e-4)


def test_the_onnx_file_is_integers_too(deployed: Deployed) -> None:
    """Weights as bytes, not as floats that are quantized at load time."""
    graph = onnx.load_from_string(deployed.payload or b"").graph
    large = [each for each in graph.initializer if int(np.prod(each.dims)) >= 64]
    assert {each.data_type for each in large} == {onnx.TensorProto.INT8}


class Bounded(nn.Module):
    """A linear layer, an activation that bounds its output, and a reader: in float, or on integers behind a move."""

    def __init__(self, activation: nn.Module, *, bias: bool, reader: str) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(8, 8, bias=bias), activation
        self.last, self.reader = nn.Linear(6 if reader == "moved" else 8, 4), reader

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.activation(self.layer(x))
        if self.reader == "float":
            return y.softmax(-1)
        return self.last(y.transpose(1, 2) if self.reader == "moved" else y).softmax(-1)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardtanh(-0.5, 0.7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reader", ["float", "integers", "moved"])
def test_a_linear_layer_with_bounds_runs_on_integers_whatever_reads_it(
    activation: nn.Module, bias: bool, reader: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8)
    quantized = static(Bounded(activation, bias=bias, reader=reader).eval(), [(x,)])
    deployed = deploy(quantized, (x,))
    types = [kernel.type for kernel in kernels(deployed)]
    assert "MatMul" not in types
    assert "Gemm" not in types
    assert sqnr(quantized(x), deployed(x)) > 90
