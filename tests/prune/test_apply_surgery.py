"""A record of removed channels rebuilds the pruned architecture, for checkpoints that other libraries have written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from tests.support.deployment_models import Conv, trained_conv
from torchslim.errors import PruneError

FINE: dict[str, Any] = {"round_to": 1, "min_channels": 1}


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model.eval()(pictures(5))
    return answer


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    return ts.prune.channels(trained_conv(), (pictures(),), 0.5, **FINE)


@given(sparsity=st.floats(0.2, 0.7), seed=st.integers(0, 100))
@settings(max_examples=8, deadline=None)
def test_the_record_does_to_the_original_what_pruning_did(sparsity: float, seed: int) -> None:
    """Costs 0.2 s an example."""
    original = trained_conv()
    shrunk = ts.prune.channels(original, (pictures(),), sparsity, criterion="random", seed=seed, **FINE)
    record = json.loads(json.dumps(ts.surgery(shrunk)))
    again = ts.prune.apply_surgery(original, record)
    assert ts.surgery(again) == record
    assert list(again.state_dict()) == list(shrunk.state_dict())
    assert all(torch.equal(value, shrunk.state_dict()[name]) for name, value in again.state_dict().items())
    assert ts.surgery(original) is None
    assert original.state_dict()["stem.weight"].shape == trained_conv().state_dict()["stem.weight"].shape


def test_a_checkpoint_of_the_pruned_model_loads_into_a_fresh_instance(pruned: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps(ts.surgery(pruned)))
    for record in (file, str(file), ts.surgery(pruned)):
        fresh = ts.prune.apply_surgery(Conv(), record)  # type: ignore[arg-type]
        fresh.load_state_dict(pruned.state_dict())
        assert torch.equal(run(fresh), run(pruned))


def test_rounds_are_applied_in_turn_and_finished_ones_are_kept(pruned: nn.Module) -> None:
    twice = ts.prune.channels(pruned, (pictures(),), 0.3, **FINE)
    record = ts.surgery(twice)
    assert record is not None
    for start in (trained_conv(), pruned, twice):
        again = ts.prune.apply_surgery(start, record)
        assert again is not start
        assert ts.surgery(again) == record
        assert torch.equal(run(again), run(twice))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "newer": (lambda record: record.update(version=2), "version 2.*reads 1"),
    "no base": (lambda record: record.pop("base"), "damaged.*base"),
    "indices": (lambda record: record["rounds"][0]["cuts"][0].update(kept=[0, 99]), "indices"),
    "text": (lambda record: record["rounds"][0]["patches"][0].update(new="8"), "damaged.*patches.0.new"),
    "private": (lambda record: record["rounds"][0]["patches"][0].update(name="_parameters"), "damaged"),
    "nowhere": (lambda record: record["rounds"][0]["patches"][0].update(module="nowhere"), "does not fit this Conv"),
    "weight": (lambda record: record["rounds"][0]["cuts"][0].update(weight="nothing"), "'nothing'.*lacks"),
    "dimension": (lambda record: record["rounds"][0]["cuts"][0].update(dim=9), "dimension 9"),
    "unknown": (lambda record: record.update(more=1), "damaged.*more"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_record_is_refused(pruned: nn.Module, name: str) -> None:
    change, message = CHANGES[name]
    record = copy.deepcopy(ts.surgery(pruned))
    change(record)
    with pytest.raises(PruneError, match=message):
        ts.prune.apply_surgery(Conv(), record)  # type: ignore[arg-type]


def test_another_model_or_file_is_refused(pruned: nn.Module, tmp_path: Path) -> None:
    record = ts.surgery(pruned)
    assert record is not None
    with pytest.raises(PruneError, match=r"deployment_models.Conv.*Net.*factory"):
        ts.prune.apply_surgery(toy.Net(), record)
    with pytest.raises(PruneError, match=r"record.json does not exist"):
        ts.prune.apply_surgery(Conv(), tmp_path / "record.json")
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(PruneError, match=r"record.json is damaged"):
        ts.prune.apply_surgery(Conv(), tmp_path / "record.json")
