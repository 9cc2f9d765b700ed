"""Which weights a pattern means, and what a pattern that means none is told."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from tests.support import models, toy
from torchslim.core.layer_patterns import by_pattern, covering, matches, select_weights
from torchslim.errors import SelectError


class Table(nn.Embedding):
    """An embedding by another name."""


class Zoo(nn.Module):
    """One layer of each kind that has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.bilinear = nn.Linear(4, 4), nn.Bilinear(3, 4, 5)
        self.conv = nn.ModuleList([nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3)])
        self.up = nn.ModuleList([nn.ConvTranspose1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)])
        self.lstm, self.gru = nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3), nn.GRU(4, 6)
        self.cells = nn.ModuleList([nn.LSTMCell(4, 6), nn.GRUCell(4, 6), nn.RNNCell(4, 6)])
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.LayerNorm((4, 4)), nn.GroupNorm(2, 4), nn.RMSNorm((4, 4))])
        self.embed = nn.ModuleList([nn.Embedding(9, 8), nn.EmbeddingBag(9, 8)])
        self.table = Table(9, 8)
        self.act, self.odd, self.empty = nn.PReLU(4), nn.Parameter(torch.randn(3, 3)), nn.Linear(0, 4)


PRUNED = {
    "line.weight", "bilinear.weight", "conv.0.weight", "conv.1.weight", "conv.2.weight", "up.0.weight", "up.1.weight",
    *(f"lstm.weight_{kind}_l{layer}{way}" for kind in ("ih", "hh", "hr") for layer in (0, 1) for way in ("", "_reverse")),
    "gru.weight_ih_l0", "gru.weight_hh_l0", *(f"cells.{i}.weight_{kind}" for i in range(3) for kind in ("ih", "hh")),
    "attention.in_proj_weight", "attention.out_proj.weight", "cross.q_proj_weight", "cross.k_proj_weight",
    "cross.v_proj_weight", "cross.out_proj.weight",
}  # fmt: skip


def test_weights_are_chosen_and_biases_norms_embeddings_and_loose_parameters_are_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the empty layer
        model = Zoo()
    chosen = select_weights(model)
    assert set(chosen) == PRUNED
    assert list(chosen) == [name for name, _ in model.named_parameters() if name in PRUNED]
    assert all(chosen[name] is model.get_parameter(name) for name in chosen)


PATHS = st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join)


@given(PATHS)
def test_a_path_its_prefixes_and_a_star_cover_it_and_a_stranger_does_not(path: str) -> None:
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        assert matches(".".join(parts[:end]), path, {})
    assert matches("*", path, {})
    assert matches(path[0] + "*", path, {})
    assert not matches(path + ".x", path, {})
    assert not matches(path + "x", path, {})
    assert not matches("x" + path, path, {})


@given(st.sets(st.sampled_from(sorted(PRUNED))), st.sets(st.sampled_from(sorted(PRUNED))))
def test_what_is_named_is_chosen_unless_it_is_excluded(include: set[str], exclude: set[str]) -> None:
    if include - exclude:
        assert set(select_weights(ZOO, sorted(include), sorted(exclude))) == include - exclude
    else:
        with pytest.raises(SelectError, match="no layer.*left"):
            select_weights(ZOO, sorted(include), sorted(exclude))
    if set(PRUNED) - exclude:
        assert set(select_weights(ZOO, None, sorted(exclude))) == set(PRUNED) - exclude


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ZOO = Zoo()


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("conv", {"conv.0.weight", "conv.1.weight", "conv.2.weight"}),
        ("conv.*", {"conv.0.weight", "conv.1.weight", "conv.2.weight"}),
        ("c*s.1", {"cells.1.weight_ih", "cells.1.weight_hh"}),
        ("*.weight_hh*", {name for name in PRUNED if "weight_hh" in name}),
        ("type:GRU", {"gru.weight_ih_l0", "gru.weight_hh_l0"}),
        ("type:RNNBase", {name for name in PRUNED if name.startswith(("lstm", "gru"))}),
        ("type:Zoo", PRUNED),
        (["type:Conv?d", "line"], {"line.weight"}),
        (["line", "line.bias"], {"line.weight", "line.bias"}),
        ("norms.1.weight", {"norms.1.weight"}),
        ("embed.*.weight", {"embed.0.weight", "embed.1.weight"}),
        ("*.bias_k", {"attention.bias_k"}),
        ("odd", {"odd"}),
    ],
)
def test_patterns_mean_what_they_say(include: Any, expected: set[str]) -> None:
    if isinstance(include, list) and "type:Conv?d" in include:
        with pytest.raises(SelectError, match=r"'type:Conv\?d'.*near.*type:Conv\dd"):
            select_weights(ZOO, include)
        include = include[1:]
    assert set(select_weights(ZOO, include)) == expected


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ("lin", "'lin'.*near.*line"),
        ("conv.3.weight", r"near.*conv.\d.weight"),
        ("type:Linera", "'type:Linera'.*near.*type:Linear"),
        ("type:linear", "near.*type:Linear"),
        ("norms", "'norms'.*by default.*norms.0.weight, norms.0.bias"),
        ("type:Embedding", "parameter.*embed.0.weight"),
        ("line.bia?s", "near.*line.bias"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("use", ["include", "among others"])
def test_a_pattern_that_means_nothing_is_told_what_is_near(include: str, message: str, use: str) -> None:
    with pytest.raises(SelectError, match=message):
        select_weights(ZOO, include if use == "include" else ["line", include])


def test_a_layer_without_parameters_and_a_wrong_exclusion_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(SelectError, match="'1' .*no weight.*no parameters"):
        select_weights(model, "1")
    with pytest.raises(SelectError, match="'type:Relu'.*near.*type:ReLU"):
        select_weights(model, exclude="type:Relu")
    assert set(select_weights(model, exclude="type:ReLU")) == {"0.weight"}
    with pytest.raises(SelectError, match=r"\(ReLU\).*no parameters"):
        select_weights(nn.ReLU())
    with pytest.raises(SelectError, match="'0.weight'.*no shape.*batch"):
        select_weights(nn.Sequential(nn.LazyLinear(3)))


def test_a_table_that_is_also_the_head_is_left_alone_unless_it_is_named_by_either_name() -> None:
    model = models.Tied()
    assert set(select_weights(model)) == {"body.weight"}
    for name in ("head.weight", "embed.weight", "*.weight"):
        assert "embed.weight" in select_weights(model, name)
    assert "embed.weight" not in select_weights(model, "*.weight", exclude="head")
    with pytest.raises(SelectError, match="'head'.*by default.*embed.weight"):
        select_weights(model, "head")


def test_shared_layers_answer_to_all_their_names_and_count_once() -> None:
    line = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": line, "second": line, "third": nn.Linear(3, 3)})
    assert list(select_weights(model)) == ["first.weight", "third.weight"]
    assert list(select_weights(model, "second")) == ["first.weight"]
    assert list(select_weights(model, exclude="second")) == ["third.weight"]
    assert by_pattern({"second": 0.5}, ["first.weight", "third.weight"], model) == {"first.weight": "second"}


def test_weights_that_are_computed_from_others_are_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = weight_norm(nn.Linear(3, 4))
    model = nn.ModuleDict({"new": parametrizations.weight_norm(nn.Linear(3, 4)), "old": old, "line": nn.Linear(3, 4)})
    assert set(select_weights(model)) == {"old.weight_v", "line.weight"}  # zeros of v are zeros of the weight


class MyNorm(nn.Module):
    """A norm of the user's own with a weight of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_norms_of_the_users_own_are_known_by_their_name() -> None:
    assert set(select_weights(nn.Sequential(MyNorm(), nn.Linear(4, 4)))) == {"1.weight"}


def test_the_last_pattern_that_covers_a_weight_decides() -> None:
    chosen = select_weights(toy.model())
    found = by_pattern(["*", "type:Conv2d", "conv2"], chosen, toy.model())
    assert found == {"conv1.weight": "type:Conv2d", "conv2.weight": "conv2", "head.weight": "*"}
    assert by_pattern(["conv2", "*"], chosen, toy.model()) == dict.fromkeys(chosen, "*")
    with pytest.raises(SelectError, match="'bn1'.*chosen.*conv1.weight.*include="):
        by_pattern(["bn1"], chosen, toy.model())
    with pytest.raises(SelectError, match="'convs'.*near.*conv"):
        by_pattern(["convs"], chosen, toy.model())


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], {}),
        (["conv2"], {"conv2.weight": "conv2", "conv2.bias": "conv2"}),
        (["*", "type:BatchNorm2d"], {"conv1.weight": "*", "bn1.weight": "type:BatchNorm2d", "bn1.bias": "type:BatchNorm2d",
                                     "conv2.weight": "*", "conv2.bias": "*", "head.weight": "*", "head.bias": "*"}),
        (["type:BatchNorm2d", "bn?.bias"], {"bn1.weight": "type:BatchNorm2d", "bn1.bias": "bn?.bias"}),
    ],
)  # fmt: skip
def test_the_last_pattern_covers_any_parameter(patterns: list[str], expected: dict[str, str]) -> None:
    assert covering(patterns, toy.model()) == expected


def test_a_pattern_that_covers_nothing_names_what_is_near() -> None:
    with pytest.raises(SelectError, match=r"'covn1.*near names: .*conv1"):
        covering(["*", "covn1"], toy.model())
