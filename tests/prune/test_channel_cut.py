"""Pruning in parts: the rest of the model stays bit for bit, and sparsities are those of the part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support.parted import Branching, TiedToTheRest, images, seeded, task
from torchslim.core.fingerprint import fingerprint
from torchslim.core.step import Context
from torchslim.errors import PruneError
from torchslim.training.calibration import part_examples

CHANNELS = ts.Prune(pattern="channel", of="channels", sparsity=0.5, round_to=1, min_channels=1, criterion="l1")


def vectors() -> ts.Task:
    """For `TiedToTheRest`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 8, generator=generator)
    return ts.Task(train=[(x, x)], val=[(x, x)], metric="mae")


def context(model: nn.Module, data: ts.Task, *paths: str, **fields: Any) -> Context:
    return Context(
        task=data,
        model=model,
        teacher=model,
        example_inputs=data.inputs(next(iter(data.val))),
        parts=part_examples(model, data, paths),
        **fields,
    )


def sizes(model: nn.Module, path: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(path).parameters())


def outside_of(model: nn.Module, *paths: str) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in model.state_dict().items()
        if not any(name.startswith(f"{path}.") for path in paths)
    }


@settings(max_examples=6)
@given(
    sparsity=st.sampled_from([0.25, 0.5, 0.7]),
    of=st.sampled_from(["channels", "params", "macs"]),
    criterion=st.sampled_from(["l1", "taylor", "random"]),
)
def test_everything_outside_of_the_part_is_bit_equal(sparsity: float, of: Any, criterion: str) -> None:
    model = seeded(Branching)
    step = replace(CHANNELS, sparsity=sparsity, of=of, criterion=criterion)
    pruned = step(seeded(Branching), context(model, task(), "backbone")).model
    before, after = outside_of(model, "backbone"), outside_of(pruned, "backbone")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert sizes(pruned, "backbone") < sizes(model, "backbone")
    assert pruned.high.weight is pruned.low.weight
    x, _ = images(3)
    assert pruned.backbone(x).shape == model.backbone(x).shape, "the outputs of a part stay"


@pytest.mark.parametrize("part", ["backbone", "neck"])
def test_the_sparsity_is_that_of_the_part(part: str) -> None:
    model = seeded(Branching)
    pruned = CHANNELS(seeded(Branching), context(model, task(), part)).model
    widths = {"backbone": ("0", "3"), "neck": ("0",)}[part]
    inner, before = pruned.get_submodule(part), model.get_submodule(part)
    removed = [len(before.get_submodule(name).weight) - len(inner.get_submodule(name).weight) for name in widths]  # type: ignore[arg-type]
    assert sum(removed) == {"backbone": 12, "neck": 6}[part], "half of the removable channels"


def test_several_parts_keep_their_own_sparsity() -> None:
    model = seeded(Branching)
    pruned = CHANNELS(seeded(Branching), context(model, task(), "backbone", "neck")).model
    assert len(pruned.neck[0].weight) == 6
    assert len(pruned.backbone[0].weight) + len(pruned.backbone[3].weight) == 12
    assert [cut["about"]["part"] for cut in ts.surgery(pruned)["rounds"]] == ["backbone", "neck"]  # type: ignore[index]


def test_a_part_that_cannot_shrink_stays_and_does_not_stop_the_others() -> None:
    """A single layer has no channel inside of it."""
    outcome = CHANNELS(seeded(Branching), context(seeded(Branching), task(), "neck.0", "backbone"))
    assert sizes(outcome.model, "backbone") < sizes(seeded(Branching), "backbone")
    assert sizes(outcome.model, "neck.0") == sizes(seeded(Branching), "neck.0")
    assert [warning for warning in outcome.warnings if "'neck.0'" in warning]
    with pytest.raises(PruneError):
        CHANNELS(seeded(Branching), context(seeded(Branching), task(), "neck.0"))


def test_weights_shared_with_the_rest_stay_whole_and_tied() -> None:
    model = seeded(TiedToTheRest)
    pruned = CHANNELS(seeded(TiedToTheRest), context(model, vectors(), "part")).model
    assert pruned.rest.weight is pruned.part[0].weight
    assert torch.equal(pruned.rest.weight, model.rest.weight)
    assert len(pruned.part[2].weight) == 6


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_single_weights_are_pruned_in_the_part_alone(pattern: str) -> None:
    model = seeded(Branching)
    step = ts.Prune(sparsity=0.5, pattern=pattern)  # type: ignore[arg-type]
    outcome = step(seeded(Branching), context(model, task(), "neck"))
    assert set(outcome.masks) == {"neck.0.weight", "neck.2.weight"}
    for name, mask in outcome.masks.items():
        assert bool((outcome.model.get_parameter(name)[~mask] == 0).all())
    zeros = sum(int((~mask).sum()) for mask in outcome.masks.values())
    assert zeros == round(0.5 * sum(mask.numel() for mask in outcome.masks.values()))
    before, after = outside_of(model, "neck"), outside_of(outcome.model, "neck")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_masks_follow_the_channels_of_a_part() -> None:
    model = seeded(Branching)
    sparse = ts.Prune(sparsity=0.4)(seeded(Branching), context(model, task(), "backbone", "neck"))
    cut = CHANNELS(sparse.model, context(sparse.model, task(), "backbone", masks=sparse.masks))
    assert set(cut.masks) == set(sparse.masks)
    for name, mask in cut.masks.items():
        weight = cut.model.get_parameter(name)
        assert mask.shape == weight.shape
        assert bool((weight[~mask] == 0).all())


def test_include_and_exclude_name_layers_of_the_whole_model() -> None:
    model = seeded(Branching)
    ctx = context(model, task(), "backbone", "neck")
    pruned = replace(CHANNELS, include="neck.0")(seeded(Branching), ctx).model
    assert len(pruned.neck[0].weight) == 6
    assert len(pruned.backbone[0].weight) == 8
    pruned = replace(CHANNELS, exclude="backbone.0")(seeded(Branching), ctx).model
    assert len(pruned.backbone[0].weight) == 8
    with pytest.raises(PruneError, match=r"'low'.*'backbone'"):
        replace(CHANNELS, include="low")(seeded(Branching), ctx)
    with pytest.raises(PruneError, match=r"'low'.*'backbone'"):
        ts.Prune(sparsity=0.5, include="low")(seeded(Branching), ctx)


@pytest.mark.parametrize("sparsify", ["group-lasso", "bn-l1"])
def test_the_penalty_of_a_part_trains_its_weights(sparsify: Any) -> None:
    model = seeded(Branching)
    step = replace(CHANNELS, sparsify=sparsify, train=ts.Finetune(epochs=1, optimizer="sgd", lr=1e-2))
    pruned = step(seeded(Branching), context(model, task(), "backbone")).model
    assert len(pruned.backbone[0].weight) + len(pruned.backbone[3].weight) == 12


class Stopped(Exception):
    """Raised by a progress callback, where a kill would come."""


STEPS = [
    ts.Prune(
        pattern="channel",
        of="channels",
        sparsity=0.6,
        round_to=1,
        min_channels=1,
        criterion="taylor",
        schedule="iterative",
        rounds=2,
        train=ts.Finetune(epochs=1, optimizer="sgd", lr=1e-2),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("at", [("cut-2", 0), ("prune-1", 3), ("prune-2", 2)])
def test_a_stopped_pruning_of_parts_goes_on_as_if_undisturbed(at: tuple[str, int], tmp_path: Path) -> None:
    def run(folder: str, progress: Any = lambda event: None) -> ts.Result:
        return ts.compress(
            seeded(Branching), task(), STEPS, runtime="eager", threads=1, part=["backbone", "neck"], seed=3,
            workdir=tmp_path / folder, progress=progress,
        )  # fmt: skip

    def stop(event: ts.Event) -> None:
        if (event.phase, event.current) == at:
            raise Stopped

    with pytest.raises(Stopped):
        run("stopped", stop)
    resumed, whole = run("stopped"), run("whole")
    assert fingerprint(resumed.module.state_dict()) == fingerprint(whole.module.state_dict())
    x, _ = images(4)
    assert torch.equal(resumed.deployed(x), whole.deployed(x))
