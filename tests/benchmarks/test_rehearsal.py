"""The benchmark of rehearsals: longer trainings, shares, and the place of its figures in the docs."""

from __future__ import annotations

import pytest

import torchslim as ts
from benchmarks.rehearsal import BEGIN, END, PAGE, Cost, longer, table


def test_every_training_gets_longer_and_other_steps_stay() -> None:
    assert longer(ts.Finetune(epochs=3), 10) == ts.Finetune(epochs=30)
    trained = ts.Quantize("int8", mode="qat", train=ts.Distill(epochs=2))
    assert longer(trained, 10) == ts.Quantize("int8", mode="qat", train=ts.Distill(epochs=20))
    for step in (ts.Prune(sparsity=0.5), ts.Quantize("int8")):
        assert longer(step, 10) is step


def test_a_share_is_that_of_the_whole_run() -> None:
    cost = Cost(name="a", seconds=60, processor=30, run=1140, load=2.3)
    assert cost.share == pytest.approx(0.05)
    text = table([cost])
    assert "| a | 60 s | 30 s | 19 min | 5.0% |" in text
    assert "a load of\n2." in text


def test_the_page_has_the_place_of_the_figures_once() -> None:
    text = PAGE.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index("| recipe | rehearsal |") < text.index(END)
