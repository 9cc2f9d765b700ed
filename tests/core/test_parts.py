"""Parts: how they are named, and what stands in their place."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.parted import Branching, Cache, Decoder, TiedToTheRest, Translator, images, seeded
from torchslim.core.parts import (
    WHOLE,
    Fitted,
    Mounted,
    inside,
    mounted,
    outside,
    part_at,
    part_view,
    parts_of,
    patterns_inside,
    select_parts,
    signature_of,
    under,
)
from torchslim.errors import SelectError

NAMES = st.lists(st.sampled_from(["a", "b", "a1", "part"]), max_size=3).map(".".join)


class Doubles:
    """In place of a part: twice its output, for one rank alone."""

    def __init__(self, part: nn.Module, rank: int) -> None:
        self.part, self.rank, self.calls = part, rank, 0

    def fitted(self, args: Any, kwargs: Any, *, sizes: bool = False) -> Fitted | None:
        leaves = [*args, *kwargs.values()]
        return Fitted(leaves) if all(leaf.dim() == self.rank for leaf in leaves) else None

    def __call__(self, fitted: Fitted) -> Any:
        self.calls += 1
        return 2 * self.part(*fitted.leaves)


# --- names ---


@given(NAMES, NAMES)
def test_names_go_in_and_out_of_a_part(path: str, name: str) -> None:
    if name or not path:
        assert inside(path, under(path, name)) == name
    if path:
        assert inside(path, f"{path}1.weight") is None, "a longer name that begins like the part's is elsewhere"


@pytest.mark.parametrize(
    ("part", "paths"),
    [
        (None, ("",)),
        ("backbone", ("backbone",)),
        (["neck", "backbone"], ("backbone", "neck")),  # in the model's order
        ("*", ("backbone", "neck", "low", "high")),  # the outermost modules
        (["l*", "high"], ("low", "high")),
        ("backbone.*", tuple(f"backbone.{place}" for place in range(8))),
    ],
)
def test_names_and_globs_select_the_outermost_modules(part: Any, paths: tuple[str, ...]) -> None:
    assert select_parts(Branching(), part) == paths


@pytest.mark.parametrize(
    ("model", "part", "words"),
    [
        (Branching, "backbon", ("'backbon'", "backbone", "Branching")),
        (Branching, "", ("empty", "part")),
        (Branching, [], ("empty", "part")),
        (Branching, ["backbone", "backbone.3"], ("'backbone'", "'backbone.3'", "overlap")),
        (Decoder, "own", ("'own'", "ModuleList", "own.*")),
    ],
)
def test_a_wrong_part_is_named(model: Any, part: Any, words: tuple[str, ...]) -> None:
    made = Decoder(20, 16) if model is Decoder else model()
    with pytest.raises(SelectError) as caught:
        select_parts(made, part)
    assert all(word in str(caught.value) for word in words), caught.value


def test_patterns_over_the_whole_model_become_names_in_the_part() -> None:
    model = Branching()
    found = patterns_inside(model, "backbone", ["backbone.3", "type:Linear", "neck.*", "*"])
    assert found["backbone.3"] == ["3"]
    assert found["type:Linear"] == ["7"]
    assert found["neck.*"] == []
    assert found["*"] == [str(place) for place in range(8)]
    assert patterns_inside(model, WHOLE, ["neck.*"]) == {"neck.*": ["neck.*"]}


def test_all_parameters_are_inside_or_outside() -> None:
    model = TiedToTheRest()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rest = set(outside(model, ["part"]))
    assert rest == {"rest.weight", "rest.bias"}
    assert names - rest == {name for name in names if inside("part", name) is not None}


# --- mounting ---


def test_a_mounted_part_is_called_in_place_and_falls_back_for_other_calls() -> None:
    model = seeded(Branching)
    before = copy.deepcopy(model)
    double = Doubles(before.backbone, rank=4)
    whole = mounted(copy.deepcopy(model), {"backbone": double})
    assert parts_of(whole) == ("backbone",)
    assert parts_of(model) == (WHOLE,)
    x, _ = images(3)
    features = 2 * model.backbone(x)
    assert torch.equal(whole.backbone(x), features)
    assert double.calls == 1
    other = mounted(copy.deepcopy(model), {"backbone": Doubles(before.backbone, rank=3)})
    assert torch.equal(other.backbone(x), model.backbone(x)), "a call of another structure runs the module"


def test_a_mounted_part_has_the_attributes_and_the_signature_of_the_part() -> None:
    class Part(nn.Module):
        size = 7

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return x * scale

        def helper(self) -> str:
            return "help"

    model = nn.ModuleDict({"part": Part()})
    whole: Any = mounted(model, {"part": Doubles(Part(), rank=1)})
    assert whole["part"].size == 7
    assert whole["part"].helper() == "help"
    assert list(inspect.signature(whole["part"].forward).parameters) == ["x", "scale"]
    assert list(signature_of(whole["part"]).parameters) == ["x", "scale"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = whole["part"].nothing


def test_mounting_twice_replaces_the_first_and_copies_are_apart() -> None:
    model = seeded(Branching)
    part = model.backbone
    whole = mounted(model, {"backbone": Doubles(part, rank=4)})
    again = mounted(whole, {"backbone": Doubles(part, rank=3)})
    assert again.backbone.part is part
    copied = copy.deepcopy(again)
    with torch.no_grad():
        copied.backbone.part[7].bias.add_(1)
    x, _ = images(2)
    assert not torch.equal(copied.backbone.part(x), again.backbone.part(x))


def test_a_module_with_two_places_is_mounted_in_both() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU()))
    model[1].append(model[0])
    whole = mounted(model, {"0": Doubles(model[0], rank=2)})
    assert isinstance(whole[0], Mounted)
    assert whole[0] is whole[1][1]


def test_the_weights_of_a_mounted_part_are_not_the_models() -> None:
    model = seeded(Branching)
    whole = mounted(copy.deepcopy(model), {"backbone": Doubles(model.backbone, rank=4)})
    assert not any(name.startswith("backbone") for name in whole.state_dict())


def test_a_view_is_needed_for_objects_alone() -> None:
    model = seeded(Translator)
    plain = {"x": torch.ones(1)}
    assert part_view(model, "encoder", plain) is model.encoder
    cache = {"token": torch.ones(1, 1, dtype=torch.long), "memory": torch.ones(1, 2, 16), "cache": Cache()}
    view = part_view(model, "decoder", cache)
    assert view is not model.decoder
    assert isinstance(view, Decoder)
    assert part_at(model, "decoder") is model.decoder
