"""Sizes that a module checks before its layers run: its attributes are mended, and only what they forbid stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support.channel_laws import assert_runs, remove, scramble


class Translation(nn.Module):
    """torch's own transformer between embeddings, with a buffer of positions and masks."""

    def __init__(self, *, causal: bool, padded: bool, wide: int = 16, words: int = 20) -> None:
        super().__init__()
        self.causal, self.padded, self.wide = causal, padded, wide
        self.source, self.target = nn.Embedding(words, wide), nn.Embedding(words, wide)
        self.core = nn.Transformer(wide, 4, 1, 1, 24, batch_first=True)
        self.head = nn.Linear(wide, words)
        self.register_buffer("place", torch.randn(1, 10, wide), persistent=False)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(1)) if self.causal else None
        source = self.source(source) * math.sqrt(self.wide) + self.place[:, : source.size(1)]
        target = self.target(target) * math.sqrt(self.wide) + self.place[:, : target.size(1)]
        more = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding} if self.padded else {}
        return self.head(self.core(source, target, tgt_mask=mask, **more))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("causal", "padded", "fields"),
    [(False, False, {}), (True, True, {}), (False, True, {"include": "core.*.linear1"}), (True, True, {"exclude": "source"})],
)  # fmt: skip
def test_a_transformer_that_checks_its_width(causal: bool, padded: bool, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = scramble(Translation(causal=causal, padded=padded))
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    inputs = (torch.randint(20, (2, 5)), torch.randint(20, (2, 4)), padding)
    shrunk = ts.prune.channels(model, inputs, 0.5, round_to=1, min_channels=1, **fields)
    done = ts.surgery(shrunk)["rounds"][0]
    assert done["about"]["largest_error"] < 1e-6
    cuts = {(cut["weight"], cut["dim"]) for cut in done["cuts"]}
    assert ("core.encoder.layers.0.linear1.weight", 0) in cuts
    if "exclude" not in fields:  # heads shrink with the width that their size is computed from
        assert shrunk.core.d_model == shrunk.source.weight.shape[1] < 16
        assert shrunk.core.encoder.layers[0].self_attn.in_proj_weight.shape[0] == 3 * shrunk.core.d_model
    else:
        assert shrunk.core.d_model == 16
    assert_runs(model, shrunk, inputs, sizes=(1, 2))


class Inner(nn.Module):
    """A hidden layer in a stream whose width its parent checks; `width` is a number, or what nobody can mend."""

    def __init__(self, width: Any) -> None:
        super().__init__()
        self.width = width
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != int(self.width):
            raise ValueError(f"expected {self.width} features")
        return x + self.down(self.up(x).relu())


class Nested(nn.Module):
    """A stack of those, with the width once more above them."""

    def __init__(self, width: Any) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(Inner(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == int(self.width), "the stream has another width"
        for layer in self.layers:
            x = layer(x)
        return x


def nested(width: Any) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(5, 12), Nested(width), nn.Linear(12, 3))
    return scramble(model), (torch.randn(2, 5),)


def test_attributes_of_parents_are_mended_as_those_of_layers_are() -> None:
    model, inputs = nested(12)
    _, done = remove(model, inputs, 0, 0.5, scope="layer")
    assert done.rollbacks == ()
    width = done.model[0].out_features
    assert width < 12
    assert [done.model[1].width, *(layer.width for layer in done.model[1].layers)] == [width] * 3
    assert_runs(model, done.model, inputs)


def test_what_a_check_forbids_stays_and_what_it_does_not_goes() -> None:
    model, inputs = nested("12")  # text, which nobody mends
    _, done = remove(model, inputs, 0, 0.5, scope="layer")
    assert done.model[0].out_features == 12
    assert all(layer.up.out_features < 20 for layer in done.model[1].layers)
    reasons = {group.name: group.reason for group in done.coupling.groups}
    assert "another width" in reasons["0.weight[0]"]
    assert_runs(model, done.model, inputs)
