"""Size, work and speed: parameters, MACs, bytes, and latency with its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torchslim.core.isolation import quiet, unfused_attention
from torchslim.core.step import Inputs
from torchslim.core.task import call, device_of, to_device
from torchslim.errors import TorchslimError
from torchslim.graph.export import untouched
from torchslim.runtimes.base import Deployed

ROUND_SECONDS = 0.002  # a round repeats short calls until it lasts this long: the clock is no finer
WARMUP_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds for one call: the median round, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times faster than the baseline, from paired rounds."""

    median: float
    p10: float
    p90: float

    @property
    def verdict(self) -> str:
        """ "faster", "slower", or "no difference" where the spread holds 1."""
        if self.p10 <= 1 <= self.p90:
            return "no difference"
        return "faster" if self.median > 1 else "slower"


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds by candidate, one value a round; round i of every candidate was measured side by side."""

    rounds: Mapping[str, Sequence[float]]

    def latency(self, name: str) -> Latency:
        """The spread of one candidate."""
        p10, median, p90 = percentiles(self.rounds[name])
        return Latency(median=median, p10=p10, p90=p90, rounds=len(self.rounds[name]))

    def speedup(self, name: str, baseline: str) -> Ratio:
        """How many times faster `name` is than `baseline`."""
        pairs = zip(self.rounds[baseline], self.rounds[name], strict=True)
        p10, median, p90 = percentiles([slow / fast for slow, fast in pairs])
        return Ratio(median=median, p10=p10, p90=p90)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """10th, 50th and 90th percentile, linearly interpolated."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], statistics.median(values), tenths[-1]


def interleave(candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 50, seconds: float = 60.0) -> Timings:
    """Time the candidates in turn, A B A B ..., so that a machine that drifts drifts for all of them.

    Args:
        candidates: what to call, by name.
        rounds: how many rounds at most.
        seconds: after at least five rounds, stop when this much time is over.
    """
    if rounds < 1:
        raise TorchslimError(f"rounds must be at least 1, got {rounds}; 50 give a spread that can be trusted")
    repeats: dict[str, int] = {}
    for name, function in candidates.items():
        until = time.perf_counter() + WARMUP_SECONDS
        function()
        fastest = float("inf")
        while True:
            start = time.perf_counter()
            function()
            end = time.perf_counter()
            fastest = min(fastest, end - start)
            if end >= until:
                break
        repeats[name] = max(1, round(ROUND_SECONDS / max(fastest, 1e-7)))
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    stop = time.perf_counter() + seconds
    for number in range(rounds):
        for name, function in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            measured[name].append((time.perf_counter() - start) * 1e3 / repeats[name])
        if number >= 4 and time.perf_counter() > stop:
            break
    return Timings(measured)


def compare(
    deployed: Mapping[str, Deployed], *, batch: int | None = None, rounds: int = 50, seconds: float = 60.0
) -> Timings:
    """Interleaved latency of deployed models on their example inputs, resized to `batch` samples.

    Args:
        deployed: models by name; each runs on its own example, so compare models of the same task.
        batch: samples a call; None takes one where the batch is free, and the example's size where it is fixed.
        rounds, seconds: as for `interleave`.
    """
    return interleave({name: _caller(each, batch) for name, each in deployed.items()}, rounds=rounds, seconds=seconds)


def _caller(deployed: Deployed, batch: int | None) -> Callable[[], Any]:
    leaves = resized(deployed, batch)
    return lambda: deployed.run(leaves)


def resized(deployed: Deployed, batch: int | None = None) -> list[Tensor]:
    """The example inputs with `batch` samples (1 by default) along every free batch dimension."""
    if batch is not None and batch < 1:
        raise TorchslimError(f"batch must be at least 1, got {batch}; leave it out for one sample a call")
    axis = deployed.spec.batch_axis
    if axis is None:
        return list(deployed.example)
    count = batch or 1
    leaves = []
    for leaf, sizes in zip(deployed.example, deployed.spec.sizes, strict=True):
        if len(sizes) > axis and sizes[axis] is None:
            leaf = leaf.index_select(axis, torch.arange(count) % leaf.shape[axis]).contiguous()
        leaves.append(leaf)
    return leaves


def stored_weights(model: nn.Module) -> list[Tensor]:
    """The tensors that a model learnt, tied ones once; the integers of a quantized graph, but not its scales."""
    frozen = [value for name, value in model.named_buffers() if "_frozen_param" in name]
    return list({id(value): value for value in (*model.parameters(), *frozen)}.values())


def parameters(model: nn.Module) -> int:
    """How many numbers the model learnt."""
    return sum(value.numel() for value in stored_weights(model))


def nonzeros(model: nn.Module) -> int:
    """How many of them are not exactly zero."""
    return sum(int(torch.count_nonzero(value)) for value in stored_weights(model))


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-accumulate operations of one call, and the operations that nobody counts."""

    total: int
    uncounted: tuple[str, ...]


def macs(model: nn.Module, inputs: Inputs) -> Macs:
    """Multiply-accumulates of one forward pass in eval mode, on the inputs as given.

    Counted by `torch.utils.flop_counter` (two operations each), with the fused kernels that it counts as zero
    (LSTM and GRU, scaled dot-product attention on CPU, multi-head attention in eval mode) taken apart first.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    counter = FlopCounterMode(display=False)
    seen = _Operations()
    inputs = to_device(inputs, device_of(model))
    unfused = (unfused_attention(), torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH))
    with quiet(), untouched(model), unfused[0], unfused[1], unfused[2], counter, seen:
        call(model, inputs)
    uncounted = sorted(name for name, packet in seen.packets.items() if packet not in counter.flop_registry)
    return Macs(counter.get_total_flops() // 2, tuple(uncounted))


def sample_macs(model: nn.Module, deployed: Deployed) -> Macs:
    """Multiply-accumulates of the module that was deployed, on one sample where the batch is free."""
    return macs(_Positional(model), (deployed.spec.call_arguments(resized(deployed)),))


class _Positional(nn.Module):
    """Calls a model with (args, kwargs) given as one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, arguments: tuple[list[Any], dict[str, Any]]) -> Any:
        return self.model(*arguments[0], **arguments[1])


class _Operations(TorchDispatchMode):
    """Collects the operations that do more than a step for each element, or that torch knows nothing of."""

    KNOWN = ("aten", "prim", "prims", "quantized_decomposed")
    HEAVY = (
        "lstm",
        "gru",
        "rnn",
        "mkldnn",
        "fft",
        "_fft",
        "cdist",
        "_cdist",
        "_thnn",
        "quantized",
        "linalg",
        "_linalg",
    )

    def __init__(self) -> None:
        super().__init__()
        self.packets: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func.namespace}.{func._opname}"
        if func.namespace not in self.KNOWN or func._opname.startswith(self.HEAVY):
            self.packets[name] = func._overloadpacket
        return func(*args, **(kwargs or {}))
