"""Networks whose inputs vary in size, with inputs of any sizes: padded text, images, series, audio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Text(nn.Module):
    """A sentence encoder with a padding mask, learned positions and a masked mean."""

    def __init__(self, longest: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(longest, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))[None]
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        mask = attention_mask[..., None].float()
        return self.head((x * mask).sum(1) / mask.sum(1))


class UNet(nn.Module):
    """Two poolings and skips: both sizes must be multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, m, 3, padding=1) for n, m in ((3, 8), (8, 8), (8, 8)))
        self.up, self.upper = nn.ConvTranspose2d(8, 8, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        b = torch.relu(self.b(functional.max_pool2d(a, 2)))
        c = torch.relu(self.c(functional.max_pool2d(b, 2)))
        return self.out(torch.cat([a, self.upper(torch.cat([b, self.up(c)], 1))], 1))


class ConvNet(nn.Module):
    """Convolutions and a global pooling: any size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer over a series of any length, in both directions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(4, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0].mean(1))


class Audio(nn.Module):
    """Strided convolutions over samples of any number, a frame each four samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 8, 5, 2, 2), nn.GELU(), nn.Conv1d(8, 8, 3, 2, 1), nn.GELU())
        self.head = nn.Conv1d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).log_softmax(1)


class Patches(nn.Module):
    """A vision transformer whose positions are interpolated to the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.places = nn.Parameter(torch.randn(1, 16, 4, 4) / 4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        places = functional.interpolate(self.places, size=x.shape[2:], mode="bilinear")
        x = (x + places).flatten(2).transpose(1, 2)
        return self.head(self.encoder(x).mean(1))


def text(batch: int, length: int, _: int = 0) -> dict[str, Tensor]:
    """Sentences of which the first is padded."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, (length + 1) // 2 :] = 0
    return {"input_ids": torch.randint(50, (batch, length), generator=generator), "attention_mask": mask}


def image(batch: int, height: int, width: int) -> tuple[Tensor]:
    return (torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * 50 + width)),)


def series(batch: int, length: int, _: int = 0) -> tuple[Tensor]:
    return (torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(length)),)


def audio(batch: int, length: int, _: int = 0) -> tuple[Tensor]:
    return (torch.randn(batch, 1, 4 * length, generator=torch.Generator().manual_seed(length)),)


@dataclass(frozen=True)
class Varying:
    """A network, its inputs by batch and two sizes, and what the sizes must be multiples of."""

    make: Callable[[], nn.Module]
    inputs: Callable[..., Any]
    multiple: int = 1

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().eval()

    def examples(self) -> list[Any]:
        return [
            self.inputs(batch, n * self.multiple, m * self.multiple)
            for batch, n, m in ((2, 5, 6), (3, 9, 7), (2, 7, 11))
        ]


VARYING = {
    "text": Varying(Text, text),
    "convolutions": Varying(ConvNet, image),
    "u-net": Varying(UNet, image, 4),
    "lstm": Varying(lambda: Recurrent("LSTM"), series),
    "gru": Varying(lambda: Recurrent("GRU"), series),
    "audio": Varying(Audio, audio),
    "patches": Varying(Patches, image, 4),
}
