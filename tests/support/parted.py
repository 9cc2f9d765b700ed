"""Models that cannot be captured whole: a branch on data, a greedy decoder of CTC, an encoder-decoder with a cache.

Their heavy parts can be: the code around them stays in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import torchslim as ts

CLASSES = 4


class Body(nn.Sequential):
    """Convolutions with a batch norm; features of 8 channels, averaged."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 8),
        )


class Branching(nn.Module):
    """A branch on the data chooses between two heads; the second one is tied to the first one's weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.backbone = Body(width)
        self.neck = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.low, self.high = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)
        self.high.weight = self.low.weight

    def forward(self, x: Tensor) -> Tensor:
        features = self.neck(self.backbone(x))
        return self.high(features) if bool(features.mean() > 0) else self.low(features)


class TiedToTheRest(nn.Module):
    """The part's first layer is also used, with another input, by the rest of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.rest = nn.Linear(8, 8)
        self.rest.weight = self.part[0].weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.rest(y) if bool(y.sum() > 0) else self.rest(-y)


class Speech(nn.Module):
    """Convolutions and an LSTM; the greedy decoder of CTC collapses repeated symbols in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SpeechEncoder()

    def forward(self, x: Tensor) -> list[list[int]]:
        return [collapse(row) for row in self.encoder(x).argmax(2).tolist()]


class SpeechEncoder(nn.Module):
    """Log probabilities of 6 symbols, one frame each two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 8, 5, 2, 2)
        self.recurrent = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.relu(self.convolution(x[:, None])).transpose(1, 2)
        return self.head(self.recurrent(frames)[0]).log_softmax(2)


def collapse(symbols: Iterable[int]) -> list[int]:
    """The symbols without repetitions and blanks, which are 0."""
    kept, last = [], 0
    for symbol in symbols:
        if symbol not in (last, 0):
            kept.append(symbol)
        last = symbol
    return kept


class Cache:
    """Keys and values of the steps so far, in lists by layer: no tensor, no container."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], 1)
            self.values[layer] = torch.cat([self.values[layer], value], 1)
        return self.keys[layer], self.values[layer]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1] if self.keys else 0


class Attention(nn.Module):
    """Attention of one head over a memory or over a cache."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.width = width

    def forward(self, x: Tensor, memory: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        key, value = self.k(memory), self.v(memory)
        if cache is not None:
            key, value = cache.add(layer, key, value)
        scores = self.q(x) @ key.transpose(1, 2) / self.width**0.5
        return x + self.out(scores.softmax(-1) @ value)


class Decoder(nn.Module):
    """One step: a token of every sentence, the memory, and the cache, which is changed in place."""

    def __init__(self, tokens: int, width: int, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(tokens, width)
        self.places = nn.Embedding(64, width)
        self.own = nn.ModuleList(Attention(width) for _ in range(layers))
        self.cross = nn.ModuleList(Attention(width) for _ in range(layers))

    def forward(self, token: Tensor, memory: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        x = self.words(token) + self.places(torch.tensor([cache.length], device=token.device))
        for layer, (own, cross) in enumerate(zip(self.own, self.cross, strict=True)):
            x = own(x, x, cache, layer)
            x = cross(x, memory)
        return x, cache


class Translator(nn.Module):
    """An encoder, and a decoder that generates with a cache; the head is tied to the decoder's words."""

    def __init__(self, tokens: int = 20, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(tokens, width)
        self.encoder = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.decoder = Decoder(tokens, width)
        self.turn = nn.Linear(width, width)
        self.head = nn.Linear(width, tokens)
        self.head.weight = self.decoder.words.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of the tokens after those of `target`, which are given one at a time."""
        memory, cache = self.encoder(self.words(source)), Cache()
        steps = []
        for token in target.split(1, 1):
            x, cache = self.decoder(token, memory, cache=cache)
            steps.append(self.head(self.turn(x)))
        return torch.cat(steps, 1)

    def generate(self, source: Tensor, steps: int = 5) -> Tensor:
        """The most probable tokens, greedily; stops when all sentences end with the token 1."""
        memory, cache = self.encoder(self.words(source)), Cache()
        token = torch.zeros(len(source), 1, dtype=torch.long)
        tokens = [token]
        for _ in range(steps):
            x, cache = self.decoder(token, memory, cache=cache)
            token = self.head(self.turn(x)).argmax(-1)
            tokens.append(token)
            if bool((token == 1).all()):
                break
        return torch.cat(tokens, 1)


class Memory:
    """A buffer of a fixed number of places, written in place, and an option that is no tensor."""

    def __init__(self, batch: int, scale: float = 1.0, places: int = 12) -> None:
        self.buffer = torch.zeros(batch, places, 8)
        self.scale = scale


class Writing(nn.Module):
    """Writes into the memory in place, and does not return it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, place: Tensor, memory: Memory) -> Tensor:
        y = self.layer(x) * memory.scale
        memory.buffer.index_copy_(1, place, y[:, None])
        return memory.buffer.sum(1)


class Remembering(nn.Module):
    """Calls `Writing` for every place of a series; the option comes from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Writing()

    def forward(self, x: Tensor) -> Tensor:
        memory = Memory(len(x), scale=2.0 if bool(x[0, 0, 0] > 0) else 1.0)
        for place in range(x.shape[1]):
            y = self.step(x[:, place], torch.tensor([place]), memory)
        return y + memory.buffer[:, 0]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with the same weights each time, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def images(count: int, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise whose level tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return torch.randn(count, 1, size, size, generator=generator) + labels.view(-1, 1, 1, 1), labels


def task(**fields: Any) -> ts.Task:
    """Images for `Branching`."""
    train = [images(16, seed=seed) for seed in range(4)]
    return ts.Task(train=train, val=[images(32, seed=8)], test=[images(32, seed=9)], metric="accuracy", **fields)


def sentences(count: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sources of a length, and targets of 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(2, 20, (count, length), generator=generator),
        torch.randint(2, 20, (count, 4), generator=generator),
    )


def generation_task() -> ts.Task:
    """The metric generates with the model under test, and counts the tokens that the sources share with its output."""

    def overlap(predict: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        hits = total = 0
        for source, _ in batches:
            generated = predict.generate(source)
            hits += int((generated[:, 1:, None] == source[:, None]).any(2).sum())
            total += generated[:, 1:].numel()
        return 100 * hits / total

    val = [sentences(3, 5, 1), sentences(4, 7, 2), sentences(4, 6, 3)]
    return ts.Task(
        train=val,
        val=val,
        metric=ts.Metric(fn=overlap, unit="%"),
        inputs=lambda batch: batch,
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs.flatten(0, 1), batch[1].flatten()),
    )


class Counted:
    """Wraps the calls of deployed parts, and counts those that the runtime computes."""

    def __init__(self, deployed: Any) -> None:
        self.calls: dict[str, int] = dict.fromkeys(deployed.parts, 0)
        for path, part in deployed.parts.items():
            session = part.session

            def run(leaves: Any, path: str = path, session: Any = session) -> Any:
                self.calls[path] += 1
                return session(leaves)

            part.session = run


def branching() -> nn.Module:
    """The model of a recipe."""
    return seeded(Branching)
