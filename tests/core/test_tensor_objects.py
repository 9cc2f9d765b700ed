"""Objects with tensors: taken apart and put together they are the same, and set in place."""

from __future__ import annotations

import copy
import inspect
from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.parted import Cache, Decoder
from torchslim.core.object_states import become
from torchslim.core.tensor_objects import (
    by_structure,
    emptied,
    holds_objects,
    named_arguments,
    of_structure,
    packed,
    put,
    state_of,
    structure_of,
    tensors_in,
    unpacked,
    view_with_tensors,
    walk,
)
from torchslim.errors import TaskError

Pair = namedtuple("Pair", ["first", "second"])


class Plain:
    """An object of any attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def tensors() -> st.SearchStrategy[Tensor]:
    """Small tensors, no two alike."""
    shapes = st.lists(st.integers(1, 3), max_size=2)
    return st.builds(lambda shape, seed: torch.rand(shape, generator=torch.Generator().manual_seed(seed)),
                     shapes, st.integers(0, 10**6))  # fmt: skip


def objects() -> st.SearchStrategy[Any]:
    """Objects that nest dicts, lists, tuples and further objects around tensors and plain values."""
    leaves = tensors() | st.integers() | st.text(max_size=3) | st.none() | st.booleans()
    names = st.sampled_from(["a", "b", "keys", "values"])
    inner = st.recursive(
        leaves,
        lambda children: st.one_of(
            st.lists(children, max_size=3),
            st.lists(children, max_size=3).map(tuple),
            st.tuples(children, children).map(lambda pair: Pair(*pair)),
            st.dictionaries(names | st.integers(0, 3), children, max_size=3),
            st.dictionaries(names, children, max_size=3).map(lambda fields: Plain(**fields)),
        ),
        max_leaves=10,
    )
    return st.dictionaries(names, inner, min_size=1, max_size=3).map(lambda fields: Plain(**fields))


def same(one: Any, other: Any) -> bool:
    """Whether two objects have equal leaves at equal paths."""
    left, right = dict(walk(one)), dict(walk(other))
    return left.keys() == right.keys() and all(
        torch.equal(left[path], right[path]) if isinstance(left[path], Tensor) else left[path] == right[path]
        for path in left
    )


@given(objects(), objects())
def test_packing_inverts_unpacking(first: Any, second: Any) -> None:
    tree = {"x": torch.ones(2), "caches": [first, (second, first)], "flag": True}
    before = copy.deepcopy(tree)
    named: dict[str, Any] = {}
    flat = unpacked(tree, named)
    assert not holds_objects(flat)
    again = packed(flat, lambda name, own: put(named[name], own))
    assert again["caches"][0] is first
    assert again["caches"][1] == (second, first)
    assert same(first, before["caches"][0])
    assert same(second, before["caches"][1][0])


@given(objects())
def test_tensors_are_set_in_place(value: Any) -> None:
    containers = [item for _, item in walk_containers(value)]
    twice = {path: leaf * 2 + 1 for path, leaf in tensors_in(value).items()}
    plain = {path: leaf for path, leaf in walk(value) if not isinstance(leaf, Tensor)}
    assert put(value, twice) is value
    assert all(tensors_in(value)[path] is leaf for path, leaf in twice.items())
    assert {path: leaf for path, leaf in walk(value) if not isinstance(leaf, Tensor)} == plain
    after = [item for _, item in walk_containers(value)]
    assert all(one is other for one, other in zip(containers, after, strict=True)), "lists, dicts and objects are kept"


def walk_containers(value: Any, path: str = "") -> Any:
    """The objects, lists and dicts of an object."""
    if isinstance(value, (Plain, list, dict)):
        yield path, value
    items = vars(value) if isinstance(value, Plain) else value
    if isinstance(items, dict):
        items = list(items.values())
    if isinstance(items, (list, tuple)):
        for place, item in enumerate(items):
            yield from walk_containers(item, f"{path}.{place}")


@given(objects(), st.integers(1, 5))
def test_the_state_ignores_sizes_and_contents_alone(value: Any, length: int) -> None:
    state = state_of(value)
    other = copy.deepcopy(value)
    put(other, {path: torch.zeros([length] * leaf.dim()) for path, leaf in tensors_in(value).items()})
    assert state_of(other) == state
    for path, leaf in tensors_in(value).items():
        put(other, {path: leaf.double()})
        assert state_of(other) != state, "the type counts"
        put(other, {path: leaf})
    vars(other)["another"] = 3
    assert state_of(other) != state, "plain values count"


@given(objects())
def test_an_emptied_copy_has_no_tensors_and_leaves_the_object_alone(value: Any) -> None:
    before = copy.deepcopy(value)
    blank = emptied(value)
    assert not tensors_in(blank)
    assert same(value, before)
    refilled = put_all(blank, value)
    assert same(refilled, value)


@given(objects(), objects())
def test_an_object_is_brought_into_the_state_of_another(value: Any, other: Any) -> None:
    end, before = emptied(other), copy.deepcopy(other)
    result = become(value, end, tensors_in(other))
    assert result is value
    assert same(value, before)
    assert state_of(value) == state_of(before)
    assert not tensors_in(end), "the state is used again for other calls"
    of_end = {id(item) for _, item in walk_containers(end)}
    assert not any(id(item) in of_end for _, item in walk_containers(value)), "two objects do not share a list"


@given(objects())
def test_an_object_in_its_own_state_keeps_its_containers(value: Any) -> None:
    containers = [item for _, item in walk_containers(value)]
    become(value, emptied(value), tensors_in(value))
    after = [item for _, item in walk_containers(value)]
    assert len(after) == len(containers)
    assert all(one is item for one, item in zip(containers, after, strict=True))


def put_all(blank: Any, value: Any) -> Any:
    return put(blank, tensors_in(value))


def test_modules_dataclasses_and_functions_are_no_objects() -> None:
    for value in (nn.Linear(2, 2), len, {"x": torch.ones(1)}, [torch.ones(1)], 3, "text", torch.float32):
        assert not holds_objects(value)
    assert holds_objects([Cache()])


def cache_of(length: int, batch: int = 2) -> Cache:
    cache = Cache()
    for layer in range(2):
        cache.add(layer, torch.randn(batch, length, 16), torch.randn(batch, length, 16))
    return cache


def test_a_view_computes_what_the_module_does_and_shares_its_weights() -> None:
    torch.manual_seed(0)
    decoder = Decoder(20, 16).eval()
    signature = inspect.signature(decoder.forward)
    inputs = {"token": torch.tensor([[3], [4]]), "memory": torch.randn(2, 5, 16), "cache": cache_of(3)}
    view = view_with_tensors(decoder, signature, inputs)
    assert [id(p) for p in view.parameters()] == [id(p) for p in decoder.parameters()]
    named: dict[str, Any] = {}
    flat = unpacked(copy.deepcopy(inputs), named)
    outputs, grown = view(**flat)
    expected, cache = decoder(**inputs)
    assert torch.equal(outputs, expected)
    (back,) = [packed(grown, lambda name, own: put(named[name], own))]
    assert back is next(iter(named.values()))
    assert same(back, cache)
    assert back.length == 4


def test_calls_are_grouped_by_structure_not_by_size() -> None:
    calls = [{"cache": cache_of(n), "x": torch.ones(n, 2)} for n in (1, 2, 3)] + [
        {"cache": Cache(), "x": torch.ones(1, 2)}
    ]
    groups = by_structure(calls)
    assert [len(group) for group in groups] == [3, 1]
    chosen = of_structure(calls, calls[0])
    assert len(chosen) == 3
    assert not any(holds_objects(inputs) for inputs in chosen)
    assert structure_of(calls[0]) != structure_of({**calls[0], "x": torch.ones(1, 2, dtype=torch.int64)})


def test_arguments_are_named_by_the_signature() -> None:
    signature = inspect.signature(lambda x, y=1, **rest: None)
    assert named_arguments(signature, (1,), {"y": 2, "z": 3}) == {"x": 1, "y": 2, "z": 3}
    with pytest.raises(TaskError, match=r"\*args"):
        named_arguments(inspect.signature(lambda *args, key=0: None), (1, 2), {"key": 3})
