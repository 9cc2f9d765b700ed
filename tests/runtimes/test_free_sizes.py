"""A runtime that cannot have a free batch gets a fixed one, and what a converter fixes in silence is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from torchslim.errors import DeployError
from torchslim.graph.export import Captured
from torchslim.runtimes import find_runtime
from torchslim.runtimes.base import Runtime
from torchslim.runtimes.spec import Session, Spec

X = (torch.randn(3, 4),)


def runtime(make: Any, **options: Any) -> Runtime:
    return replace(find_runtime("eager"), make=make, **options)


def fixed_alone(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    """Takes no free size."""
    if any(size is None for sizes in spec.sizes for size in sizes):
        raise DeployError("free sizes are too hard; use another runtime")
    return find_runtime("eager").make(captured, spec, threads)


def never(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    raise ValueError("no model at all")


def of_two(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    """Converts to something of the example's batch size."""
    session, payload = find_runtime("eager").make(captured, spec, threads)
    size = captured.example["input"].shape[0]

    def run(leaves: list[Tensor], /) -> list[Tensor]:
        return [each[:size] for each in session(leaves)]

    return run, payload


def test_a_batch_that_cannot_be_free_is_fixed_at_the_examples() -> None:
    deployed = runtime(fixed_alone).compile(nn.Linear(4, 2), X)
    assert deployed.spec.batch_axis is None
    assert deployed.spec.sizes == [[3, 4]]
    assert any("free sizes are too hard" in note and "batch size 3" in note for note in deployed.spec.notes)
    assert deployed(*X).shape == (3, 2)


def test_sizes_that_the_user_has_freed_are_not_fixed() -> None:
    with pytest.raises(DeployError, match="free sizes are too hard.*dynamic_shapes=None"):
        runtime(fixed_alone).compile(nn.Linear(4, 2), X, {"input": {0: Dim.DYNAMIC}})


@pytest.mark.parametrize("dynamic_shapes", ["batch", None])
def test_a_failure_that_fixed_sizes_do_not_mend_is_told_as_it_is(dynamic_shapes: Any) -> None:
    with pytest.raises(DeployError, match="ValueError: no model at all"):
        runtime(never).compile(nn.Linear(4, 2), X, dynamic_shapes)


def test_a_converter_that_fixes_the_batch_in_silence_is_noticed() -> None:
    deployed = runtime(of_two, converts=True).compile(nn.Linear(4, 2), X)
    assert deployed.spec.batch_axis is None
    assert any("for a batch of 3" in note for note in deployed.spec.notes)
    assert runtime(of_two).compile(nn.Linear(4, 2), X).spec.batch_axis == 0  # nobody looks
