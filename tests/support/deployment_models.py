"""Small models of many shapes, and what the tests of capturing, deploying and saving share."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Prediction:
    logits: Tensor
    hidden: Tensor | None = None
    values: Tensor | None = None  # called like a method of dict


class Conv(nn.Module):
    """Conv, batch norm, relu, depthwise, relu6, a residual addition, max pool, a linear head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.act = nn.ReLU6()
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.pointwise(self.act(self.depthwise(x))) + x)
        x = self.pool(x).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


def trained_conv(seed: int = 0) -> Conv:
    """A `Conv` with batch norm statistics and biases that are not their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Conv()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name and value.is_floating_point():
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif name.endswith("bias"):
                value.copy_(torch.randn(value.shape, generator=generator) / 4)
    return model.eval()


class Upsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


class Recurrent(nn.Module):
    def __init__(self, kind: str, *, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(6, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class TokenClassifier(nn.Module):
    """Embedding, a transformer layer, a padding mask that may be left out; a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Any]:
        hidden = self.layer(self.embed(ids), src_key_padding_mask=mask)
        return {"logits": self.head(hidden) * scale, "hidden": [hidden, None], "classes": 3}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.attend(x, x, x)


class TwoInputs(nn.Module):
    """Another size in each input; the second is given by name alone; the third is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left: Tensor, *, right: Tensor, unused: Tensor | None = None) -> Pair:
        return Pair(self.left(left), self.right(right))


class Structured(nn.Module):
    """A dict and a tuple go in, a dataclass comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Any]) -> Prediction:
        hidden = batch["x"] + batch["extra"][0] * batch["extra"][1]
        return Prediction(self.linear(hidden), hidden=hidden)


class Variadic(nn.Module):
    def forward(self, first: Tensor, *rest: Tensor, double: bool = False, **named: Tensor) -> list[Any]:
        total = first + sum(rest)
        return [total * 2 if double else total, *(each - 1 for each in named.values()), "text"]


def architectures() -> dict[str, tuple[nn.Module, Any]]:
    """Models by name, with example inputs of three samples."""
    torch.manual_seed(3)
    image, sequence = torch.randn(3, 3, 8, 8), torch.randn(3, 7, 6)
    ids, mask = torch.randint(20, (3, 6)), torch.arange(6).repeat(3, 1) >= torch.tensor([[6], [4], [5]])
    return {
        "conv": (trained_conv(), (image,)),
        "transposed": (Upsample(), (image,)),
        "lstm": (Recurrent("LSTM"), (sequence,)),
        "gru": (Recurrent("GRU"), (sequence,)),
        "attention": (Attention(), (torch.randn(3, 5, 8),)),
        "tokens": (TokenClassifier(), {"ids": ids, "mask": mask}),
        "two inputs": (TwoInputs(), {"left": torch.randn(3, 4), "right": torch.randn(3, 5), "unused": image}),
        "structured": (Structured(), ({"x": torch.randn(3, 4), "extra": (torch.randn(3, 4), 2.0)},)),
        "variadic": (
            Variadic(),
            {"first": torch.randn(3, 4), "double": True, "more": torch.randn(3, 2)},
        ),
        "dense": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 4)), (torch.randn(3, 3, 8),)),
        "identity": (nn.Identity(), (torch.randn(3, 4),)),
    }


def resize(tree: Any, count: int) -> Any:
    """The same inputs with another number of samples, each another value."""

    def one(leaf: Tensor) -> Tensor:
        taken = leaf[torch.arange(count) % len(leaf)]
        return taken.flip(-1) if leaf.dim() > 1 else taken

    return torch.utils._pytree.tree_map_only(Tensor, one, tree)


def same_structure(a: Any, b: Any, tolerance: float) -> bool:
    """Equal containers of equal types, with tensors of equal dtypes that differ by at most `tolerance`."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, atol=tolerance, rtol=tolerance)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_structure(a[key], b[key], tolerance) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_structure(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, Prediction):
        return same_structure(vars(a), vars(b), tolerance)
    return bool(a == b)


def fresh_python(code: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter that finds the tests' modules, and detects the processor that is forced."""
    if "TORCHSLIM_PROCESSOR" in os.environ:
        code = f"import tests\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "default", **environment},
    )
