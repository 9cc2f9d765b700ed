"""Dynamic ranges of recurrent layers: their kernels round all steps of a call with one range; padding is not in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torchslim as ts

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}
STEPS = 6
COMPILED: dict[tuple[str, str, str], Any] = {}


class Packed(nn.Module):
    """Two layers on packed sequences: padding has no part in them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = KINDS[kind](4, 8, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


class Plain(nn.Module):
    """A layer on padded sequences, in one direction: later steps do not change earlier ones."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = KINDS[kind](4, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def compiled(model: str, kind: str, runtime: str) -> Any:
    """An int8-dynamic deployment for series of `STEPS` steps, made once."""
    if (model, kind, runtime) not in COMPILED:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = (Packed(kind) if model == "packed" else Plain(kind)).eval()
            x = torch.randn(3, STEPS, 4)
        inputs: Any = (x, torch.tensor([STEPS, 3, 2])) if model == "packed" else (x,)
        quantized = ts.quantize.dynamic(net, inputs, runtime=runtime, checks=None)
        COMPILED[model, kind, runtime] = ts.deploy(quantized, inputs, runtime=runtime, threads=1)
    return COMPILED[model, kind, runtime]


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(st.lists(st.integers(1, STEPS), min_size=2, max_size=2), st.floats(-100, 100), st.integers(0, 100))
def test_the_contents_of_padding_do_not_change_packed_sequences(
    kind: str, runtime: str, lengths: list[int], loud: float, seed: int
) -> None:
    x = torch.randn(3, STEPS, 4, generator=torch.Generator().manual_seed(seed))
    given_lengths = torch.tensor([STEPS, *lengths])
    other = torch.where(torch.arange(STEPS)[None, :, None] < given_lengths[:, None, None], x, torch.tensor(loud))
    deployed = compiled("packed", kind, runtime)
    assert torch.equal(deployed(x, given_lengths), deployed(other, given_lengths))


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(st.integers(1, STEPS), st.floats(0, 5), st.booleans(), st.integers(0, 100))
def test_zeros_do_not_widen_the_range(
    kind: str, runtime: str, steps: int, shift: float, negative: bool, seed: int
) -> None:
    """Zero is on every grid: steps of zeros behind change no step before, even where all inputs have one sign."""
    x = torch.randn(2, STEPS, 4, generator=torch.Generator().manual_seed(seed)) + shift
    x = -x.abs() if negative else x
    x[:, steps:] = 0
    constant = x.clone()
    constant[:, steps:] = x[:, :1]  # steps that are there already
    deployed = compiled("plain", kind, runtime)
    assert torch.equal(deployed(x)[:, :steps], deployed(constant)[:, :steps])
