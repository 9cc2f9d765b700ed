"""Parts that can be captured: an error of a whole model names them with their share of the work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support.parted import Body, Branching, images, seeded, task
from torchslim.errors import ExportError
from torchslim.graph.capturable import capturable_parts

INPUTS = images(4)[:1]


class Nested(nn.Module):
    """A branch on data inside of the outer part; two parts without one inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = Branches()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Body(), nn.Linear(8, 400)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if bool(y.sum() > 0) else self.second(-y)


class Weightless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


def test_the_outermost_parts_are_named_with_their_share() -> None:
    parts = capturable_parts(seeded(Branching), INPUTS)
    assert list(parts) == ["backbone"], "the smaller parts are not worth a capture"
    assert 0.95 < parts["backbone"] <= 1


def test_parts_inside_of_one_that_cannot_be_captured_are_tried() -> None:
    parts = capturable_parts(seeded(Nested), INPUTS)
    assert list(parts) == ["outer.first"]
    convolutions = 4 * 64 * (9 * 8 + 9 * 8 * 16) + 4 * 16 * 8
    assert parts["outer.first"] == pytest.approx(convolutions / (convolutions + 4 * 8 * 400))


def test_no_part_is_named_where_none_multiplies_or_the_model_fails() -> None:
    assert capturable_parts(Weightless(), INPUTS) == {}
    assert capturable_parts(seeded(Branching), (torch.ones(2, 3),)) == {}


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "deploy": lambda model: ts.deploy(model, INPUTS, runtime="eager"),
    "compress": lambda model: ts.compress(model, task(), [ts.Prune(sparsity=0.5)], runtime="eager"),
    "static": lambda model: ts.quantize.static(model, [INPUTS]),
    "prepare": lambda model: ts.quantize.prepare(model, INPUTS),
    "suggest": lambda model: ts.suggest(model, task()),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_error_of_a_whole_model_names_a_part_and_its_share(name: str) -> None:
    with pytest.raises(ExportError) as caught:
        CALLS[name](seeded(Branching))
    assert "parted.py" in str(caught.value), "the line of the model's code"
    assert re.search(r"part='backbone' holds \d+ %", str(caught.value)), caught.value
    assert isinstance(caught.value.__cause__, ExportError)


def test_the_part_that_is_named_can_be_deployed() -> None:
    model = seeded(Branching)
    (part,) = capturable_parts(model, INPUTS)
    deployed = ts.deploy(model, INPUTS, runtime="eager", part=part)
    with torch.no_grad():
        assert torch.allclose(deployed(*INPUTS), model(*INPUTS), atol=1e-5)
