"""A size that a program does not take is an error that says which sizes it takes, and the line that needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import torchslim as ts
from torchslim.errors import DeployError, ExportError, QuantizeError
from torchslim.graph.allowed_sizes import refusal
from torchslim.graph.export import capture
from torchslim.graph.size_guards import InputSizes, broken


def refused(guards: list[str], *shape: int) -> str:
    return refusal(InputSizes(sizes=[[None] * len(shape)], guards=guards), [shape], ["x"]) or ""


@settings(max_examples=20)
@given(st.integers(2, 64), st.integers(1, 400))
def test_multiples_are_listed(divisor: int, size: int) -> None:
    text = refused([f"{divisor} * (s0_1 // {divisor}) == s0_1", f"s0_1 // {divisor} >= 1"], 2, size)
    if size % divisor == 0:
        assert text == ""
    else:
        multiples = ", ".join(str(divisor * count) for count in (1, 2, 3))
        assert f"x.shape[1] must be a multiple of {divisor}: {multiples}, ..." in text


@settings(max_examples=20)
@given(st.integers(2, 300), st.integers(0, 100), st.integers(1, 400))
def test_bounds_are_named(low: int, width: int, size: int) -> None:
    text = refused([f"s0_1 >= {low}", f"s0_1 <= {low + width}"], 2, size)
    if low <= size <= low + width:
        assert text == ""
    elif width >= 2:
        assert f"x.shape[1] must be from {low} to {low + width};" in text
    else:
        assert f"must be {', '.join(map(str, range(low, low + width)))}{' or ' if width else ''}{low + width};" in text


@settings(max_examples=20)
@given(st.lists(st.integers(1, 700), min_size=2, max_size=6, unique=True))
def test_every_named_size_is_taken(sizes: list[int]) -> None:
    guards = [" or ".join(f"s0_1 == {size}" for size in sizes)]
    text = refused(guards, 2, max(sizes) + 1)
    assert all(f"{size}" in text.partition(";")[0] or len(sizes) > 8 for size in sizes)
    assert all(broken(guards, [(2, size)]) is None for size in sizes)


def test_sizes_that_depend_on_each_other_are_named_for_this_call() -> None:
    assert "x.shape[0], with the other sizes of this call, must be 7;" in refused(["s0_0 == s0_1 + 2"], 3, 5)
    assert "at most" not in refused(["s0_0 % 2 == s0_0 % 2 + 1"], 3, 5)


class Table(nn.Module):
    """Positions of which there are 20."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.layer = nn.Parameter(torch.randn(1, 20, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.places[:, : x.shape[1]])  # the table is too short


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 100:  # the branch
            return 2 * x
        return x


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.query.expand(x.shape[0], 8, 4)  # the expand


class Viewed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 8, 4).sum(1)  # the view


class Pyramid(nn.Module):
    """Halves both sizes five times and doubles them again, as a U-Net does."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(5):
            y = functional.max_pool2d(y, 2)
        for _ in range(5):
            y = functional.interpolate(y, scale_factor=2)
        return x + y  # the skip


@pytest.mark.parametrize(("model", "lengths", "wrong", "sizes", "line"), [
    (Table(), (8, 12), 30, "x.shape[1] must be at most 20", "the table is too short"),
    (Branch(), (110, 120), 30, "x.shape[1] must be at least 101", "the branch"),
])  # fmt: skip
def test_the_line_that_bounds_a_size_is_named(
    model: nn.Module, lengths: tuple[int, int], wrong: int, sizes: str, line: str
) -> None:
    examples: list[Any] = [(torch.randn(2, length, 4),) for length in lengths]
    with pytest.raises(DeployError) as caught:
        ts.deploy(model, examples, runtime="eager")(torch.randn(1, wrong, 4))
    for part in (sizes, f"# {line}", "test_allowed_sizes.py:", f"got x (1, {wrong}, 4)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("model", "line"), [(Expanded(), "the expand"), (Viewed(), "the view")])
def test_the_line_that_fixes_a_size_is_named(model: nn.Module, line: str) -> None:
    captured = capture(model, (torch.randn(2, 8, 4),), {"x": [1]})
    (note,) = captured.notes
    assert "dimension 1 of input 'x' at 8" in note
    assert f"# {line}" in note


def test_a_pyramid_says_which_multiples_it_takes(tmp_path: Any) -> None:
    examples: list[Any] = [(torch.randn(2, 3, 64, 64),), (torch.randn(2, 3, 96, 128),)]
    deployed = ts.deploy(Pyramid(), examples, threads=1)
    ts.save(deployed, tmp_path)
    for model in (deployed, ts.load(tmp_path)):
        with pytest.raises(DeployError, match=r"x\.shape\[2\] must be a multiple of 32: 32, 64, 96, \.\.\."):
            model(torch.randn(1, 3, 80, 64))
        with pytest.raises(DeployError, match=r"# the skip"):
            model(torch.randn(1, 3, 64, 80))
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Pyramid())
    quantized = ts.quantize.static(network, examples)
    with pytest.raises(QuantizeError, match=r"multiple of 32"):
        quantized(torch.randn(1, 3, 80, 64))


def test_an_example_that_the_program_does_not_take_is_named() -> None:
    captured = capture(Branch(), [(torch.randn(2, 90, 4),), (torch.randn(2, 120, 4),)])
    (note,) = captured.notes
    assert "an example is refused" in note
    assert "at least 101" in note
    assert "# the branch" in note
    assert captured.example["x"].shape == (2, 120, 4)  # inputs that the program takes


def ragged() -> Any:
    """A batch of a collate function that has not padded."""
    return ([torch.randn(5, 4), torch.randn(7, 4)],)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: capture(Branch(), [(torch.randn(2, 8, 4),), (torch.randn(2, 8),)]), ExportError, "3 dimensions.*2 in"),
    (lambda: capture(Table(), ragged()), ExportError, "fails on its example inputs.*too short"),
    (lambda: capture(Table(), [(torch.randn(2, 5, 4),), ragged()]), ExportError, "differ in more than sizes"),
    (lambda: capture(Table(), [(torch.randn(2, 8, 4),), (torch.randn(2, 24, 4),)]), ExportError, "24.*20"),
    (lambda: ts.quantize.static(Table(), [(torch.randn(2, 8, 4),), (torch.randn(2, 8),)]), ExportError, "example 2"),
    (lambda: ts.deploy(Table(), (torch.randn(2, 8, 4),), runtime="eager")(*ragged()), DeployError, "x"),
    (lambda: ts.deploy(Table(), (torch.randn(2, 8, 4),), runtime="eager")(torch.randn(2, 8)), DeployError, r"any, 8, 4"),
])  # fmt: skip
def test_bad_input_is_a_clear_error(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
