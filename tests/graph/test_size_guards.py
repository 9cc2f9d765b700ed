"""Sizes that a program takes: the first misfit of any inputs is named."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchslim.graph.size_guards import InputSizes, readable_sizes

SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_shapes_fit_whichever_of_their_sizes_are_free(shapes: list[list[int]], data: st.DataObject) -> None:
    sizes = [[data.draw(st.sampled_from([None, size])) for size in shape] for shape in shapes]
    assert InputSizes(sizes=sizes).misfit(shapes) is None


@given(SHAPES, st.data())
def test_the_first_input_of_another_shape_is_named(shapes: list[list[int]], data: st.DataObject) -> None:
    wrong = data.draw(st.sets(st.integers(0, len(shapes) - 1), min_size=1))
    sizes: list[list[int | None]] = [list(shape) for shape in shapes]
    for index in wrong:
        if data.draw(st.booleans()):
            sizes[index].append(None)  # a free size is a dimension, too
        else:
            dim = data.draw(st.integers(0, len(shapes[index]) - 1))
            sizes[index][dim] = shapes[index][dim] + data.draw(st.integers(1, 3))
    assert InputSizes(sizes=sizes, guards=["s0_0 == 0"]).misfit(shapes) == min(wrong)


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_broken_guard_is_named_if_the_shapes_fit(one: int, two: int) -> None:
    guards = ["s0_1 % 4 == 0", "s0_1 >= s1_0"]
    expected = guards[0] if one % 4 else guards[1] if one < two else None
    assert InputSizes(sizes=[[3, None], [None]], guards=guards).misfit([[3, one], [two]]) == expected


def test_free_sizes_are_readable() -> None:
    assert readable_sizes([None, 3, 8]) == "(any, 3, 8)"
