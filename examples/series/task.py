"""Spoken vowels of nine speakers: series of any length through a bidirectional LSTM with packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

import torchslim as ts
from examples import gallery

CHANNELS, SPEAKERS = 12, 9


def vowels(part: str) -> list[tuple[Tensor, int]]:
    """Series (steps, channels) with the number of the speaker; `part` is "TRAIN" or "TEST".

    Source: Kudo, Toyama & Shimbo 1999, Pattern Recognition Letters 20.
    """
    (content,) = gallery.files("aeon", f"*/JapaneseVowels_{part}.ts").values()
    rows = []
    for line in content.decode().split("@data", 1)[1].split():
        *channels, label = line.split(":")
        values = [[float(value) for value in channel.split(",")] for channel in channels]
        rows.append((torch.tensor(values).T, int(label) - 1))
    return rows


class Recurrent(nn.Module):
    """Series (batch, steps, channels) and lengths (batch,) -> logits (batch, speakers)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(CHANNELS, width, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * width, SPEAKERS)

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(series, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(states.sum(1) / lengths.unsqueeze(1))


def batch(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Series padded to the longest, their lengths, and the speakers."""
    series = [series for series, _ in rows]
    labels = torch.tensor([label for _, label in rows])
    return pad_sequence(series, batch_first=True), torch.tensor([len(row) for row in series]), labels


def model() -> nn.Module:
    """The LSTM, trained by the first call."""
    return gallery.trained("series", Recurrent, task(), ts.Finetune(epochs=60, lr=3e-3))


def task() -> ts.Task:
    """Train on 216 series, select on 54, report on 370."""
    rows = vowels("TRAIN")
    train = [row for number, row in enumerate(rows) if number % 5 != 4]
    return loaders(train, rows[4::5], vowels("TEST"))


def loaders(train: list[tuple[Tensor, int]], val: list[tuple[Tensor, int]], test: list[tuple[Tensor, int]]) -> ts.Task:
    """The task of three lists of rows."""
    return ts.Task(
        train=DataLoader(train, batch_size=16, shuffle=True, collate_fn=batch),
        val=DataLoader(val, batch_size=18, collate_fn=batch),
        test=DataLoader(test, batch_size=37, collate_fn=batch),
        metric="accuracy",
    )
