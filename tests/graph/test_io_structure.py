"""The shape of inputs and outputs: taken apart and put together again, in this process and in another."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchslim.errors import DeployError, ExportError
from torchslim.graph.io_structure import Record, build, describe, flatten, leaf_names


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass
class Box:
    keys: Any  # called like a method of dict
    size: Any = None
    area: Any = field(default=7, init=False)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text(st.sampled_from("abcxyz_"), min_size=1, max_size=4)
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(names, inner, max_size=3),
        st.builds(Point, inner, inner),
        st.builds(Box, inner, inner),
    )


scalars = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(width=32), st.text("ab", max_size=3))
tensors = st.integers(0, 9).map(lambda value: torch.full((2,), float(value)))
trees = st.recursive(st.one_of(scalars, tensors, tensors), containers, max_leaves=12)


def fields_of(box: Box) -> dict[str, Any]:
    return {"keys": box.keys, "size": box.size, "area": box.area}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, Box):
        return equal(fields_of(a), fields_of(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def plain(value: Any) -> Any:
    """A tree with lists for tuples and dicts for classes: what is left where the classes are unknown."""
    if isinstance(value, Box):
        value = fields_of(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in dict.items(value)}
    return [plain(each) for each in value] if isinstance(value, (tuple, list)) else value


@given(trees)
def test_what_is_taken_apart_is_put_together_again(tree: Any) -> None:
    leaves: list[Tensor] = []
    classes: dict[str, type] = {}
    structure = describe(tree, leaves, classes)

    assert equal(build(structure, leaves, classes), tree)
    again = flatten(structure, tree)
    assert len(again) == len(leaves)
    assert all(a is b for a, b in zip(again, leaves, strict=True))
    assert len(leaf_names(structure)) == len(leaves)


@given(trees)
def test_a_structure_survives_json_and_a_process_without_the_classes(tree: Any) -> None:
    leaves: list[Tensor] = []
    structure = json.loads(json.dumps(describe(tree, leaves, {}), allow_nan=False))

    rebuilt = build(structure, leaves)

    assert equal(plain(rebuilt), plain(tree))
    assert len(flatten(structure, rebuilt)) == len(leaves), "what is built fits its own structure"


@given(trees, trees)
def test_another_structure_is_refused(one: Any, other: Any) -> None:
    """Flattening another tree gives all of its tensors, as many as there should be, or a DeployError."""
    structure = describe(one, [], {})
    held: list[Tensor] = []
    describe(other, held, {})
    try:
        found = flatten(structure, other)
    except DeployError:
        return
    assert len(found) == len(leaf_names(structure))
    assert sorted(map(id, found)) == sorted(map(id, held))


def test_records_of_unknown_classes_are_read_by_name_key_and_position() -> None:
    leaves: list[Tensor] = []
    structure = describe(Box(torch.zeros(1), torch.ones(1)), leaves, {})
    record = build(structure, leaves)

    assert isinstance(record, Record)
    assert record.size is record["size"] is record[1] is leaves[1]
    assert record.keys is leaves[0], "a field wins over a method of dict"
    with pytest.raises(AttributeError, match="no field 'sizes'; there are keys, size, area"):
        _ = record.sizes


def test_named_tuples_of_unknown_classes_can_be_unpacked() -> None:
    leaves: list[Tensor] = []
    structure = describe(Point(torch.zeros(1), torch.ones(1)), leaves, {})
    point = build(structure, leaves)
    first, second = point
    assert first is leaves[0]
    assert second is point.y is leaves[1]


def test_what_topk_returns_keeps_its_type_and_its_fields() -> None:
    found = torch.topk(torch.tensor([1.0, 3.0, 2.0]), 2)
    leaves: list[Tensor] = []
    classes: dict[str, type] = {}
    structure = describe(found, leaves, classes)
    assert type(build(structure, leaves, classes)) is type(found)
    assert build(structure, leaves).indices.tolist() == [1, 2]


def test_only_the_fields_that_are_set_count_in_a_mapping_dataclass() -> None:
    """Hugging Face outputs are dicts and dataclasses at once, and leave out what is None."""

    @dataclass
    class Output(OrderedDict):  # type: ignore[type-arg]
        logits: Any = None
        loss: Any = None

        def __post_init__(self) -> None:
            for name in ("logits", "loss"):
                if getattr(self, name) is not None:
                    self[name] = getattr(self, name)

    leaves: list[Tensor] = []
    classes: dict[str, type] = {}
    structure = describe(Output(logits=torch.ones(2)), leaves, classes)
    assert list(structure["fields"]) == ["logits"]
    rebuilt = build(structure, leaves, classes)
    assert rebuilt.loss is None
    assert rebuilt["logits"] is rebuilt.logits is leaves[0]


@pytest.mark.parametrize(
    ("captured", "given_", "words"),
    [
        (torch.zeros(1), [1], "input must be a tensor, got list"),
        (2, 3, "input.*fixed at 2.*captured.*got 3"),
        (2, 2.0, "fixed at 2 .* got 2.0"),
        (True, 1, "fixed at True .* got 1"),
        (None, torch.zeros(1), r"fixed at None .* got a tensor of shape \(1,\)"),
        (math.nan, 0.0, "fixed at nan .* got 0.0"),
        ((torch.zeros(1),), (torch.zeros(1), torch.zeros(1)), "must be a tuple of 1, .* got tuple of 2"),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, "must have the keys a, .* got the keys b"),
        ({"a": {"b": torch.zeros(1)}}, {"a": {"b": None}}, r"input\['a'\]\['b'\] must be a tensor, got NoneType"),
        (Point(torch.zeros(1), 1), [torch.zeros(1), 1], "must have the keys x, y, .* got list of 2"),
    ],
)
def test_errors_say_where_what_and_how(captured: Any, given_: Any, words: str) -> None:
    with pytest.raises(DeployError, match=words) as caught:
        flatten(describe(captured, [], {}), given_)
    assert "captured" in str(caught.value), "every message says what was expected, and since when"


def test_nan_is_the_nan_it_was_fixed_at() -> None:
    assert flatten(describe(math.nan, [], {}), math.nan) == []


@pytest.mark.parametrize("value", [{1: torch.zeros(1)}, object(), torch.float32, {1, 2}, 1j])
def test_what_no_runtime_can_give_is_refused(value: Any) -> None:
    with pytest.raises(ExportError, match="an output"):
        describe(value, [], {})


def test_names_lead_to_the_tensors() -> None:
    tree = {"x": torch.zeros(1), "pair": (torch.zeros(1), None, torch.zeros(1)), "box": Box(torch.zeros(1))}
    assert leaf_names(describe(tree, [], {})) == ["x", "pair_0", "pair_2", "box_keys"]
