"""Dates in words to numbers, "seventeen of march nineteen eighty four" to 1984-03-17: an encoder and a decoder."""

from __future__ import annotations

from calendar import month_name
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import torchslim as ts
from examples import gallery

UNITS = "oh one two three four five six seven eight nine ten eleven twelve"
TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
ONES, MONTHS = f"{UNITS} {TEENS}".split(), [name.lower() for name in month_name[1:]]
WORDS = ["", "of", "hundred", *ONES, *TENS.split(), *MONTHS]  # number 0 is padding
START, DIGITS = 10, 8  # the token before the first digit; digits of a date
Row = tuple[Tensor, Tensor]


def spoken(number: int) -> list[str]:
    """A number below 100 in words; nothing for zero."""
    if number < len(ONES):
        return [ONES[number]] if number else []
    return [TENS.split()[number // 10 - 2], *spoken(number % 10)]


def dates(count: int, seed: int) -> list[Row]:
    """Words of random dates from 1900 to 2099, and their digits after the start token."""
    days = torch.randint(
        (date(2100, 1, 1) - date(1900, 1, 1)).days, (count,), generator=torch.Generator().manual_seed(seed)
    )
    rows = []
    for day in days.tolist():
        when = date(1900, 1, 1) + timedelta(days=day)
        century, year = divmod(when.year, 100)
        years = ["oh", *spoken(year)] if 0 < year < 10 else spoken(year) or ["hundred"]
        words = [*spoken(when.day), "of", MONTHS[when.month - 1], *spoken(century), *years]
        digits = [START, *map(int, when.strftime("%Y%m%d"))]
        rows.append((torch.tensor([WORDS.index(word) for word in words]), torch.tensor(digits)))
    return rows


class Translator(nn.Module):
    """Words (batch, length) and the digits so far (batch, steps) -> logits of the next digits (batch, steps, 10).

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.words, self.digits = nn.Embedding(len(WORDS), width), nn.Embedding(START + 1, width)
        self.places = nn.Parameter(torch.randn(32, width) / 10)
        self.transformer = nn.Transformer(width, 4, 2, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, words: Tensor, digits: Tensor) -> Tensor:
        padding = words == 0
        source = self.words(words) + self.places[: words.shape[1]]
        target = self.digits(digits) + self.places[: digits.shape[1]]
        future = torch.ones(digits.shape[1], digits.shape[1], dtype=torch.bool).triu(1)
        states = self.transformer(
            source, target, tgt_mask=future, src_key_padding_mask=padding, memory_key_padding_mask=padding
        )
        return self.head(states)


def exact(predict: Callable[..., Tensor], batches: Iterable[dict[str, Tensor]]) -> float:
    """Percentage of dates of which all digits are right, decoded greedily: every digit is fed back for the next.

    All calls have eight digits; those that are still unknown come later, where the decoder does not look.
    """
    right = []
    for batch in batches:
        digits = torch.full((len(batch["words"]), DIGITS + 1), START)
        for step in range(DIGITS):
            digits[:, step + 1] = predict(words=batch["words"], digits=digits[:, :-1])[:, step].argmax(-1)
        right.append((digits[:, 1:] == batch["labels"]).all(1))
    return 100 * float(torch.cat(right).double().mean())


def batch(rows: list[Row]) -> dict[str, Tensor]:
    """Words padded to the longest date, digits without the last, and the digits that follow them."""
    digits = torch.stack([digits for _, digits in rows])
    words = pad_sequence([words for words, _ in rows], batch_first=True)
    return {"words": words, "digits": digits[:, :-1], "labels": digits[:, 1:]}


def model() -> nn.Module:
    """The translator, trained by the first call."""
    return gallery.trained("seq2seq", Translator, task(), ts.Finetune(epochs=12, lr=1e-3, warmup=0.1))


def task() -> ts.Task:
    """Train on 4,000 dates, select on 200, report on 500."""
    return loaders(dates(4_000, 1), dates(200, 2), dates(500, 3))


def loaders(train: list[Row], val: list[Row], test: list[Row], batch_size: int = 50) -> ts.Task:
    """The task of three lists of dates."""
    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": batch}
    return ts.Task(
        train=DataLoader(train, shuffle=True, **options),
        val=DataLoader(val, **options),
        test=DataLoader(test, **options),
        metric=ts.Metric(fn=exact, name="exact dates", unit="%"),
    )
