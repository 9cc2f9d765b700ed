"""Whatever selects, moves or reduces values between two integer layers: a runtime answers as the graph does.

One network holds all operations, every one between layers of its own, so that a runtime compiles once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.compiled import deploy
from torchslim.quantize import static

SHARE = 0.001  # of the elements may be off by more than a step
STEPS = 127  # over an output's range: a step of what the last layer reads can move it by more than 1 / 255

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax((2, 3)),
    "amax of rows": lambda x: x.amax(3),
    "amax of channels": lambda x: x.amax(1, keepdim=True),
    "amax in two steps": lambda x: x.amax(3).amax(2),
    "amin": lambda x: x.amin((2, 3)),
    "amin of channels": lambda x: x.amin(1, keepdim=True),
    "max with indices": lambda x: x.flatten(2).max(-1).values,
    "min with indices": lambda x: x.flatten(2).min(-1).values,
    "scaled down": lambda x: x.amax((2, 3)) * -0.5,
    "clamped": lambda x: x.amax((2, 3)).clamp(-1, 1),
    "relu before": lambda x: x.relu().amax((2, 3)),
    "relu behind": lambda x: x.amax((2, 3)).relu(),
    "gelu behind": lambda x: F.gelu(x.amax(3)),
    "range": lambda x: x.amax((2, 3)) - x.amin((2, 3)),
    "largest magnitude": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=3),
    "maxout": lambda x: x.unflatten(1, (2, 4)).amax(1),
    "mean and max": lambda x: torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1),
    "logsumexp": lambda x: x.logsumexp((2, 3)),
    "product": lambda x: (1 + 0.1 * x).prod(3),
    "l1": lambda x: x.norm(1, 3),
    "l2": lambda x: x.norm(2, 3),
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum((2, 3)),
    "variance": lambda x: x.var(3),
}
SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "top 3": lambda x: x.flatten(2).topk(3, -1).values,
    "sorted": lambda x: x.sort(3).values,
    "gathered": lambda x: x.gather(3, x.argmax(3, keepdim=True)).squeeze(3),
    "maximum": lambda x: torch.maximum(x, x.flip(3)),
    "minimum of halves": lambda x: torch.minimum(*x.chunk(2, 1)),
    "masked": lambda x: x.masked_fill(x < 0, 0.0),
    "chosen": lambda x: torch.where(x > 0, x, 0.1 * x),
    "rows by index": lambda x: x[:, [3, 1, 5]],
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool in 1d": lambda x: F.max_pool1d(x.flatten(2), 2),
    "min pool": lambda x: -F.max_pool2d(-x, 2),
    "global max pool": lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 2),
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, 2),
}
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(len(x), 4, 16, 8),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: x.roll(1, 3),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "slice": lambda x: x[:, 2:6, 1:, ::2],
    "select": lambda x: x[:, :, 3],
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "pad with ones": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "cat": lambda x: torch.cat([x, x.flip(3)], 1),
    "cat with zeros": lambda x: torch.cat([x, torch.zeros_like(x[:, :2])], 1),
    "stack": lambda x: torch.stack([x, x.relu()], 2).flatten(1, 2),
    "split": lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1),
    "unbind": lambda x: x.unbind(2)[1],
    "unfold": lambda x: F.unfold(x, 2),
}
GROUPS = {"reductions": REDUCTIONS, "selections": SELECTIONS, "moves": MOVES}
READERS: Mapping[int, Callable[[Tensor], nn.Module]] = {
    2: lambda y: nn.Linear(y.shape[-1], 6),
    3: lambda y: nn.Conv1d(y.shape[1], 6, 1),
    4: lambda y: nn.Conv2d(y.shape[1], 6, 1),
}


class Between(nn.Module):
    """A convolution, an operation, and the layer that takes what it gives, for every operation."""

    def __init__(self, operations: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor) -> None:
        super().__init__()
        self.operations = list(operations.values())
        self.before, self.after = nn.ModuleList(), nn.ModuleList()
        for operation in self.operations:
            self.before.append(nn.Conv2d(3, 8, 3, padding=1))
            value = operation(self.before[-1](x))
            self.after.append(READERS[value.dim()](value))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        layers = zip(self.before, self.operations, self.after, strict=True)
        return tuple(after(operation(before(x))) for before, operation, after in layers)


CASES = [(runtime, group) for runtime in ("onnxruntime", "openvino") for group in GROUPS] + [("eager", "reductions")]


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "group"), CASES)
def test_a_runtime_answers_as_the_graph_to_one_step(runtime: str, group: str) -> None:
    operations = GROUPS[group]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        x = torch.randn(4, 3, 8, 8)
        model = Between(operations, x).eval()
        quantized = static(model, [(x,)], runtime=runtime)
        deployed = deploy(quantized, (x,), runtime=runtime, threads=1)
        off = {}
        for name, wanted, found in zip(operations, quantized(x), deployed(x), strict=True):
            step = (wanted.max() - wanted.min()) / STEPS
            off[name] = float(((found - wanted).abs() > step).float().mean())
    assert {name: share for name, share in off.items() if share > SHARE} == {}
