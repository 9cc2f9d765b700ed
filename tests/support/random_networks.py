"""Hypothesis strategies that draw a network of convolutions or of tokens, with its inputs."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from tests.support import channel_networks as net
from tests.support.channel_laws import (
    scramble,
)


def conv_block(draw: Any, rank: int, wide: int, plain: bool) -> tuple[nn.Module, int]:
    """A block and the channels that it gives."""
    norms = ["batch", "none"] if plain else ["batch", "none", "group", "instance", "layer"]
    norm = draw(st.sampled_from(norms))
    act = draw(st.sampled_from(["relu", "prelu", "silu", "tanh"]))
    new = draw(st.sampled_from([2, 4, 6, 8]))
    even = wide % 2 == 0
    kind = draw(st.sampled_from([
        "chain", "residual", "dense", "gate", "twice", "up", "depthwise", "pool",
        *([] if plain else ["normed"]), *(["grouped", "shuffle", "halves"] if even else []),
    ]))  # fmt: skip
    make = net.ConvAct
    if kind == "chain":
        return make(rank, wide, new, norm=norm, act=act), new
    if kind == "residual":
        return net.Residual(
            nn.Sequential(make(rank, wide, new, norm=norm, act=act), make(rank, new, wide, norm="none"))
        ), wide
    if kind == "dense":
        return net.Dense(rank, wide, new), 2 * new + 1 + wide
    if kind == "gate":
        return net.Gate(rank, wide), wide
    if kind == "twice":
        return net.Twice(make(rank, wide, wide, norm="none", act=act)), wide
    if kind == "up":
        return net.TRANSPOSED[rank - 1](wide, new, 3, padding=1, groups=2 if even and draw(st.booleans()) else 1), new
    if kind == "depthwise":
        return nn.Sequential(
            make(rank, wide, 2 * wide, groups=wide, norm="batch"), make(rank, 2 * wide, new, norm="none")
        ), new
    if kind == "pool":
        return (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank - 1](3, 1, 1), wide
    if kind == "normed":
        return parametrizations.weight_norm(net.CONV[rank - 1](wide, new, 1)), new
    if kind == "grouped":
        return make(rank, wide, new, groups=2, act=act), new
    if kind == "shuffle":
        return net.Shuffle(), wide
    return net.Halves(rank, wide), wide


@st.composite
def conv_networks(draw: Any, plain: bool = False) -> tuple[nn.Module, tuple[Any, ...]]:
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    wide = draw(st.sampled_from([4, 6, 8]))
    torch.manual_seed(draw(st.integers(0, 99)))
    stem = net.ConvAct(rank, 2, wide, norm="none")
    blocks = []
    for _ in range(draw(st.integers(1, 4))):
        block, wide = conv_block(draw, rank, wide, plain)
        blocks.append(block)
    heads = draw(st.integers(1, 2))
    model = net.Flow(rank, stem, blocks, wide, heads, draw(st.sampled_from(["tensor", "dict", "dataclass"])))
    return scramble(model), (torch.randn(draw(st.integers(1, 4)), 2, *[4] * rank),)


@st.composite
def token_networks(draw: Any, plain: bool = False) -> tuple[nn.Module, Any]:
    heads, size = draw(st.sampled_from([(2, 4), (4, 2), (2, 3), (4, 4)]))
    wide = heads * size if draw(st.booleans()) else draw(st.sampled_from([6, 8]))
    norm = "none" if plain else draw(st.sampled_from(["layer", "rms", "none"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    blocks: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["attention", "gqa", "fused", "torch", "mlp", "gated", "recurrent"]))
        if plain and kind in ("attention", "gqa", "fused", "torch"):
            kind = "gated"
        if kind == "torch" and wide % heads:
            kind = "attention"
        body: nn.Module
        if kind == "attention":
            sdpa = draw(st.booleans())
            body = net.Attention(wide, heads, size, sdpa=sdpa, mix=not sdpa and draw(st.booleans()))
        elif kind == "gqa":
            body = net.Attention(wide, heads, size, kv=heads // 2, sdpa=draw(st.booleans()))
        elif kind == "fused":
            body = net.Attention(wide, heads, size, fused=True, sdpa=draw(st.booleans()))
        elif kind == "torch":
            body = net.TorchAttention(wide, heads)
        elif kind == "gated":
            body = net.Gated(wide, draw(st.sampled_from([5, 8])), draw(st.booleans()))
        elif kind == "recurrent":
            core = draw(st.sampled_from(["LSTM", "GRU"]))
            body = net.Recurrent(
                wide, draw(st.sampled_from([4, 5])), core, draw(st.integers(1, 2)), draw(st.booleans())
            )
        else:
            body = nn.Sequential(nn.Linear(wide, 2 * wide), nn.GELU(), nn.Linear(2 * wide, wide))
        blocks.append(net.Normed(wide, body, norm))
    second = draw(st.booleans())
    as_ = draw(st.sampled_from(["tensor", "dict", "dataclass"]))
    model = net.Tokens(wide, blocks, tied=draw(st.booleans()), norm=norm, as_=as_, second=second)
    size_of_batch = draw(st.integers(1, 4))
    tokens = torch.randint(11, (size_of_batch, 5))
    if not second:
        return scramble(model), (tokens,)
    return scramble(model), {"tokens": tokens, "more": torch.randn(size_of_batch, 4)}
