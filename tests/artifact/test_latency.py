"""Measuring: fair turns, honest spreads, and counts that agree with closed forms."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.support.compiled import deploy
from tests.support.deployment_models import Recurrent, TwoInputs, trained_conv
from tests.support.timing import restore
from torchslim.artifact import latency
from torchslim.artifact.latency import Timings, compare, interleave, percentiles, resized
from torchslim.artifact.model_size import macs, nonzeros, parameters
from torchslim.core.hardware import describe_machine, instruction_set, saturates
from torchslim.core.measurement import Speedup
from torchslim.errors import TorchslimError
from torchslim.quantize import static

finite = st.floats(1e-3, 1e3)

# --- latency ---


class Clock:
    """Time that passes only when a candidate runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)
        restore(monkeypatch)

    def candidate(self, name: str, *milliseconds: float) -> Any:
        """A function that takes these times in turn, the last one for ever."""
        left = list(milliseconds)

        def run() -> None:
            self.calls.append(name)
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_candidates_take_turns(clock: Clock) -> None:
    timings = interleave({name: clock.candidate(name, 100) for name in "abc"}, rounds=7)
    assert clock.calls[-21:] == list("abc") * 7
    assert {name: len(each) for name, each in timings.rounds.items()} == {"a": 7, "b": 7, "c": 7}
    assert timings.latency("a").value == pytest.approx(100)


def test_warming_up_is_not_measured(clock: Clock) -> None:
    timings = interleave({"a": clock.candidate("a", 5000, 300, 100)}, rounds=5)
    assert max(timings.rounds["a"]) == pytest.approx(100)


def test_short_calls_are_repeated_until_the_clock_can_tell(clock: Clock) -> None:
    timings = interleave({"fast": clock.candidate("fast", 0.1), "slow": clock.candidate("slow", 10)}, rounds=5)
    assert clock.calls[-21:] == ["fast"] * 20 + ["slow"]
    assert timings.latency("fast").value == pytest.approx(0.1)
    assert timings.latency("slow").value == pytest.approx(10)


def test_the_time_limit_ends_the_rounds_but_five_are_made(clock: Clock) -> None:
    timings = interleave({"a": clock.candidate("a", 1000)}, rounds=50, seconds=3.5)
    assert timings.latency("a").rounds == 5
    timings = interleave({"a": clock.candidate("a", 1000)}, rounds=50, seconds=8.5)
    assert timings.latency("a").rounds == 9


def test_no_rounds_at_all_are_refused() -> None:
    with pytest.raises(TorchslimError, match="rounds.*at least 1.*got 0.*50"):
        interleave({"a": lambda: None}, rounds=0)


@given(st.lists(finite, min_size=1, max_size=40))
def test_percentiles_are_numpys(values: list[float]) -> None:
    np.testing.assert_allclose(percentiles(values), np.percentile(values, [10, 50, 90]), rtol=1e-12)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=20))
def test_speedups_come_from_paired_rounds(pairs: list[tuple[float, float]]) -> None:
    slow, fast = zip(*pairs, strict=True)
    timings = Timings({"base": slow, "new": fast})
    found = timings.speedup("new", "base")
    expected = np.percentile(np.array(slow) / np.array(fast), [10, 50, 90])
    np.testing.assert_allclose((found.p10, found.value, found.p90), expected, rtol=1e-12)
    assert timings.speedup("new", "new").verdict == "no difference"


@pytest.mark.parametrize(
    ("low", "median", "high", "verdict"),
    [
        (1.1, 1.5, 2.0, "faster"),
        (0.5, 0.7, 0.9, "slower"),
        (0.9, 1.5, 2.0, "no difference"),
        (0.5, 0.8, 1.0, "no difference"),
        (1.0, 1.0, 1.0, "no difference"),
    ],
)
def test_a_spread_that_holds_one_is_no_difference(low: float, median: float, high: float, verdict: str) -> None:
    assert Speedup(p10=low, value=median, p90=high).verdict == verdict


def test_deployed_models_are_timed_on_one_sample() -> None:
    model = nn.Linear(4, 2)
    deployed = deploy(model, (torch.randn(3, 4),), runtime="eager")
    assert [each.shape for each in resized(deployed)] == [(1, 4)]
    assert [each.shape for each in resized(deployed, 5)] == [(5, 4)]
    with pytest.raises(TorchslimError, match="batch must be at least 1, got 0"):
        resized(deployed, 0)
    seen = []
    session = deployed.session
    deployed.session = lambda tensors: (seen.append(tensors[0].shape), session(tensors))[1]  # type: ignore[func-returns-value]
    timings = compare({"a": deployed}, batch=2, rounds=2, seconds=0)
    assert set(seen) == {(2, 4)}
    assert timings.latency("a").value > 0


@pytest.mark.slow
def test_sizes_that_are_fixed_stay() -> None:
    fixed = deploy(nn.Linear(4, 2), (torch.randn(3, 4),), runtime="eager", dynamic_shapes=None)
    assert [each.shape for each in resized(fixed, 5)] == [(3, 4)]
    second = deploy(Recurrent("GRU", batch_first=False), (torch.randn(7, 3, 6),), runtime="eager")
    assert [each.shape for each in resized(second)] == [(7, 1, 6)]


# --- sizes ---


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert parameters(model) == 32
    model[1].weight = model[0].weight
    assert parameters(model) == nonzeros(model) == 16
    with torch.no_grad():
        model[0].weight[0] = 0
    assert nonzeros(model) == 12


@pytest.mark.slow
def test_a_quantized_model_counts_its_integers_and_biases() -> None:
    model = trained_conv()
    with torch.no_grad():
        model.head.weight[:, ::2] = 0
    quantized = static(model, [(torch.randn(8, 3, 8, 8),)])
    weights = [each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    # the batch norm is folded: its convolution gets a bias
    assert parameters(quantized) == sum(each.weight.numel() + each.weight.shape[0] for each in weights)
    assert parameters(quantized) - nonzeros(quantized) >= 40


# --- multiply-accumulates ---


def lstm_macs(layers: int, directions: int, size: int, hidden: int, gates: int) -> int:
    """Each layer and direction: gates x hidden outputs of (inputs + hidden)."""
    total = 0
    for layer in range(layers):
        inputs = size if layer == 0 else hidden * directions
        total += directions * gates * hidden * (inputs + hidden)
    return total


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(kind: str, gates: int, layers: int, bidirectional: bool) -> None:
    model = getattr(nn, kind)(5, 7, num_layers=layers, bidirectional=bidirectional, batch_first=True)
    found = macs(model, (torch.randn(2, 9, 5),))
    assert found.total == 2 * 9 * lstm_macs(layers, 1 + bidirectional, 5, 7, gates)
    assert found.uncounted == ()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions(groups: int, stride: int) -> None:
    found = macs(nn.Conv2d(4, 8, 3, stride=stride, padding=1, groups=groups), (torch.randn(2, 4, 10, 10),))
    side = 10 // stride
    assert found.total == 2 * side * side * 8 * (4 // groups) * 9


def test_linear_layers_and_transposed_convolutions() -> None:
    assert macs(nn.Linear(5, 7), (torch.randn(3, 2, 5),)).total == 3 * 2 * 5 * 7
    # every input value meets every weight of its channel
    assert macs(nn.ConvTranspose2d(4, 6, 2, stride=2), (torch.randn(1, 4, 5, 5),)).total == 25 * 4 * 6 * 4


class Attend(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value)


def test_scaled_dot_product_attention() -> None:
    batch, heads, queries, keys, size, values = 2, 3, 5, 7, 4, 6
    found = macs(
        Attend(),
        (
            torch.randn(batch, heads, queries, size),
            torch.randn(batch, heads, keys, size),
            torch.randn(batch, heads, keys, values),
        ),
    )
    assert found.total == batch * heads * queries * keys * (size + values)
    assert found.uncounted == ()


@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention_in_eval_mode(training: bool) -> None:
    """Its fast path is one fused kernel that torch counts as nothing."""

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x, need_weights=False)[0]

    batch, length, width = 2, 5, 8
    model = Self().train(training)
    found = macs(model, (torch.randn(batch, length, width),))
    projections = batch * length * width * 4 * width
    assert found.total == projections + batch * length * length * width * 2
    assert model.training is training


def test_a_transformer_layer_is_the_sum_of_its_parts() -> None:
    batch, length, width, inner = 2, 5, 8, 16
    found = macs(nn.TransformerEncoderLayer(width, 2, inner, batch_first=True), (torch.randn(batch, length, width),))
    attention = batch * length * width * 4 * width + batch * length * length * width * 2
    assert found.total == attention + batch * length * 2 * width * inner
    assert found.uncounted == ()


@pytest.mark.slow
def test_a_network_and_its_quantized_graph_count_the_same() -> None:
    model = trained_conv()
    x = torch.randn(1, 3, 8, 8)
    expected = 64 * 8 * 27 + 64 * 8 * 9 + 64 * 64 + 8 * 16 + 16 * 5
    assert macs(model, (x,)).total == expected
    assert macs(static(model, [(x,)]), (x,)).total == expected


@torch.library.custom_op("torchslim_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x @ x.T


class Mystery(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mystery(x) + torch.fft.fft(x).abs().sum() + torch.cdist(x, x)


def test_operations_that_nobody_counts_are_named() -> None:
    found = macs(Mystery(), (torch.randn(3, 4),))
    assert "torchslim_tests.mystery" in found.uncounted
    assert any("fft" in name for name in found.uncounted)
    assert any("cdist" in name for name in found.uncounted)


def test_keywords_and_modes() -> None:
    model = TwoInputs().train()
    assert macs(model, {"left": torch.randn(2, 4), "right": torch.randn(3, 5)}).total == 2 * 12 + 3 * 15
    assert model.training


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("inside")


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(())


def settings() -> tuple[Any, ...]:
    cpu = torch.backends
    return (
        cpu.mha.get_fastpath_enabled(),
        cpu.mkldnn.is_available() and cpu.mkldnn.enabled,
        cpu.mkldnn.allow_tf32,
        cpu.cuda.math_sdp_enabled(),
        cpu.cuda.flash_sdp_enabled(),
        cpu.cuda.mem_efficient_sdp_enabled(),
        cpu.cuda.cudnn_sdp_enabled(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )


@pytest.mark.parametrize("fastpath", [False, True])
@pytest.mark.parametrize("model", [nn.Identity(), Raises(), Draws()])
def test_counting_leaves_the_global_settings_as_they_were(model: nn.Module, fastpath: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        before, random = settings(), torch.get_rng_state()
        if isinstance(model, Raises):
            with pytest.raises(KeyError, match="inside"):
                macs(model, (torch.ones(2, 4),))
        else:
            macs(model, (torch.ones(2, 4),))
        assert settings() == before
        assert torch.equal(torch.get_rng_state(), random)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- the machine ---


@pytest.mark.parametrize(
    ("capabilities", "name", "saturating"),
    [
        ({"amx_int8": True, "avx512_vnni": True, "avx2": True}, "amx", False),
        ({"avx512_vnni": True, "avx512_f": True, "avx2": True}, "avx512-vnni", False),
        ({"avx_vnni": True, "avx2": True}, "avx-vnni", False),
        ({"avx512_f": True, "avx2": True}, "avx512", True),
        ({"avx2": True}, "avx2", True),
    ],
)
def test_the_instruction_set_that_decides(
    capabilities: dict[str, bool], name: str, saturating: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    instruction_set.cache_clear()
    try:
        assert instruction_set() == name
        assert saturates() is saturating
    finally:
        monkeypatch.undo()
        instruction_set.cache_clear()


def test_the_description_of_the_machine_is_whole() -> None:
    found = describe_machine(threads=3)
    assert found["threads"] == 3
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )
    assert found["cores"] >= 1
    assert found["processor"]
    assert describe_machine()["threads"] == torch.get_num_threads()


def test_no_gap_in_the_rounds() -> None:
    """Real clock, real functions: rounds of both candidates interleave one to one."""
    order: list[str] = []
    interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=5, seconds=0)
    switches = sum(left != right for left, right in pairwise(order))
    assert switches == 2 * 5 - 1 + 2, "warm-up of a, of b, then a b a b ..."
