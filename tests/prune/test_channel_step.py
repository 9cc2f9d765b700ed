"""The step that removes channels: budgets, rounds, masks, what it says, and a kill in the middle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from tests.support.channel_steps import context, wide
from torchslim.artifact.model_size import macs, parameters
from torchslim.core.fingerprint import canonical, fingerprint
from torchslim.core.reason import Reason
from torchslim.core.step import check_order
from torchslim.errors import PruneError, SelectError
from torchslim.pipeline.recipe import parse_recipe
from torchslim.prune.criteria.registry import CRITERIA

TRAIN = ts.Finetune(epochs=2, optimizer="sgd", lr=0.02)


def step(**fields: Any) -> ts.Prune:
    return ts.Prune(**{"pattern": "channel", "sparsity": 0.5} | fields)


def widths(model: nn.Module) -> list[int]:
    return [each.weight.shape[0] for each in (model.stem, model.inner, model.last)]


def left(model: nn.Module, of: str) -> float:
    """What is left, counted by what knows nothing of pruning."""
    if of == "channels":
        return sum(widths(model)) / sum(widths(wide()))
    counts = [
        parameters(each) if of == "params" else macs(each, (toy.images(1, 0)[0],)).total for each in (model, wide())
    ]
    return counts[0] / counts[1]


def test_every_field_survives_a_recipe() -> None:
    text = """
        model = "tests.support.toy:model"
        task = "tests.support.toy:task"
        [[step]]
        do = "prune"
        pattern = "channel"
        sparsity = 0.6
        of = "macs"
        criterion = "taylor"
        scope = "layer"
        round_to = 4
        min_channels = 4
        heads = "whole"
        reduction = "sum"
        normalization = "max"
        exclude = ["head"]
        schedule = "iterative"
        rounds = 2
        train = { do = "finetune", epochs = 1 }
        sparsify = "group-lasso"
        strength = 1e-3
        sparsify_train = { do = "distill", epochs = 2 }
        """
    (made,) = parse_recipe(text).steps
    assert made == ts.Prune(
        pattern="channel", sparsity=0.6, of="macs", criterion="taylor", scope="layer", round_to=4, min_channels=4,
        heads="whole", reduction="sum", normalization="max", exclude=("head",), schedule="iterative", rounds=2,
        train=ts.Finetune(epochs=1), sparsify="group-lasso", strength=1e-3, sparsify_train=ts.Distill(epochs=2),
    )  # fmt: skip
    assert canonical(made) != canonical(replace(made, strength=1e-4))
    check_order([made, ts.Distill(), ts.Quantize("int8")])
    with pytest.raises(ts.TorchslimError, match="move step 2 before step 1"):
        check_order([ts.Quantize("int8"), made])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 0.1, "sparsity": None}, r"one sparsity.*threshold=0\.1"),
        ({"sparsity": {"conv1": 0.5}}, r"one sparsity.*sparsity=\{'conv1': 0\.5\}.*include"),
        ({"sparsity": None}, "nothing to do.*sparsity"),
        ({"sparsity": 1.0}, r"sparsity.*\[0, 1\)"),
        ({"n": 1.0}, "n .*'slice'.*1.0.*leave n out"),
        ({"dim": 1}, "dim.*'slice'.*got 1"),
        ({"of": "joules"}, "of .*'params', 'macs', 'channels', 'latency'.*'joules'"),
        ({"scope": "block"}, "scope.*'global', 'layer'.*'block'"),
        ({"round_to": 0}, "round_to.*whole number.*at least 1.*got 0"),
        ({"min_channels": 0}, "min_channels must be"),
        ({"heads": "half"}, "heads.*'auto', 'whole', 'dim'.*'half'"),
        ({"reduction": "median"}, "reduction must be one of"),
        ({"normalization": "l2"}, "normalization must be one of"),
        ({"criterion": "l7"}, "criterion 'l7'"),
        ({"schedule": "gradual", "train": TRAIN}, "'gradual'.*'channel'.*shapes"),
        ({"schedule": "iterative"}, "schedule 'iterative' needs train="),
        ({"rounds": 0}, "rounds.*whole number"),
        ({"sparsify": "l0", "train": TRAIN}, "sparsify.*'group-lasso', 'bn-l1'.*'l0'"),
        ({"sparsify": "bn-l1"}, "sparsify='bn-l1'.*training.*sparsify_train="),
        ({"sparsify": "bn-l1", "train": TRAIN, "strength": 0.0}, "strength.*above 0.*0.0"),
        ({"strength": 1e-3}, "belong to sparsify='group-lasso' or 'bn-l1'"),
        ({"sparsify_train": TRAIN}, "belong to sparsify="),
        ({"sparsify_train": "finetune"}, "sparsify_train must be Finetune"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_for_channels_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        step(**fields)


@pytest.mark.parametrize("pattern", ["unstructured", "slice", "2:4"])
@pytest.mark.parametrize(
    "fields",
    [{"of": "macs"}, {"round_to": 8}, {"min_channels": 8}, {"heads": "auto"}, {"reduction": "mean"},
     {"normalization": "mean"}, {"sparsify": "bn-l1"}, {"strength": 1.0}, {"sparsify_train": TRAIN}],
)  # fmt: skip
def test_what_is_of_channels_is_refused_for_weights(pattern: str, fields: dict[str, Any]) -> None:
    (name,) = fields
    amount = {} if ":" in pattern else {"sparsity": 0.5}
    with pytest.raises(PruneError, match=f"{name}.*'channel'.*'{pattern}'.*leave {name} out"):
        ts.Prune(pattern=pattern, **amount, **fields)


def test_single_weights_have_no_channels() -> None:
    with pytest.raises(PruneError, match=r"ts.prune.channels\(model, example_inputs"):
        ts.prune.weights(toy.model(), 0.5, pattern="channel")


def test_the_check_needs_no_work() -> None:
    ctx = context()
    with pytest.raises(SelectError, match="'stam'.*stem"):
        step(include="stam").check(ctx)
    unlabeled = replace(ctx, task=replace(ctx.task, target=lambda batch: None))
    with pytest.raises(PruneError, match="'taylor' needs labels"):
        step(criterion="taylor").check(unlabeled)
    for fields in ({"train": TRAIN}, {"sparsify": "bn-l1", "sparsify_train": TRAIN}):
        with pytest.raises(ts.TorchslimError, match="Finetune needs labels"):
            step(**fields).check(unlabeled)
    step(criterion="l2", exclude="type:Linear").check(unlabeled)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["params", "macs", "channels"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_a_budget_is_met_as_others_count_it(of: str, scope: str, sparsity: float) -> None:
    outcome = step(of=of, scope=scope, sparsity=sparsity, round_to=1, min_channels=1)(wide(), context())
    # one channel of the widest layer is the finest step that there is; layers take their steps together
    assert left(outcome.model, of) == pytest.approx(1 - sparsity, abs=0.01 if scope == "global" else 0.03)
    about = ts.surgery(outcome.model)["rounds"][0]["about"]
    assert about["left"] == pytest.approx(left(outcome.model, of))
    assert about["parameters"][1] == parameters(outcome.model)
    rounded = step(of=of, scope=scope, sparsity=sparsity)(wide(), context())
    assert all(each % 8 == 0 for each in widths(rounded.model))


def test_it_does_what_the_function_does() -> None:
    model, ctx = wide(), context()
    by_hand = ts.prune.channels(model, ctx.example_inputs, 0.5, of="macs")
    outcome = step(of="macs")(wide(), replace(ctx, task=replace(ctx.task, calibration=[toy.images(4, 1)])))
    assert fingerprint(outcome.model.state_dict()) == fingerprint(by_hand.state_dict())
    assert ts.surgery(outcome.model) == ts.surgery(by_hand)
    assert re.search("batch norms.*not recalibrated.*8 samples", outcome.warnings[0])


def test_batch_norms_fit_what_is_left() -> None:
    ctx = context()
    outcome, model = step()(wide(), ctx), None
    model = ts.prune.channels(wide(), ctx.example_inputs, 0.5)
    images = torch.cat([batch[0] for batch in ctx.task.train])
    with torch.no_grad():
        for each, fits in ((outcome.model, True), (model, False)):
            values = each.stem(images)
            gap = (each.norm.running_mean - values.mean((0, 2, 3))).abs().max()
            assert bool(gap < 0.05) == fits
    assert outcome.model.norm.momentum == 0.1
    assert not any(module.training for module in outcome.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("of", ["params", "macs", "channels"])
def test_rounds_end_where_one_shot_does(of: str) -> None:
    one = step(of=of, round_to=1, min_channels=1)(wide(), context())
    many = step(of=of, round_to=1, min_channels=1, schedule="iterative", rounds=3, train=TRAIN)(wide(), context())
    assert left(many.model, of) == pytest.approx(left(one.model, of), abs=0.01)
    assert left(many.model, of) == pytest.approx(0.5, abs=0.01)
    record = ts.surgery(many.model)["rounds"]
    assert len(record) == 3
    shares = [each["about"]["left"] for each in record]
    assert shares == pytest.approx([0.5 ** (1 / 3)] * 3, abs=0.02)
    assert [row["round"] for row in many.history] == [1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_rounds_of_whole_steps_end_where_one_shot_does() -> None:
    one = step(of="channels", scope="layer")(wide(), context())
    many = step(of="channels", scope="layer", schedule="iterative", rounds=2, train=TRAIN)(wide(), context())
    assert widths(one.model) == widths(many.model) == [16, 24, 32]


@pytest.mark.slow
def test_a_round_too_small_for_a_step_is_passed_over() -> None:
    outcome = step(
        sparsity=0.3, of="channels", scope="layer", round_to=16, schedule="iterative", rounds=6, train=TRAIN
    )(wide(), context())
    assert len(ts.surgery(outcome.model)["rounds"]) < 6
    assert max(row["round"] for row in outcome.history) == 6
    assert left(outcome.model, "channels") == pytest.approx(0.7, abs=0.1)
    with pytest.raises(PruneError, match="removes no channel.*16"):
        step(sparsity=0.01, round_to=16)(wide(), context())


@pytest.mark.slow
def test_a_target_that_cannot_be_reached_is_said_once_and_of_the_whole() -> None:
    fields = {"sparsity": 0.95, "min_channels": 24, "of": "channels"}
    for more in ({}, {"schedule": "iterative", "rounds": 2, "train": TRAIN}):
        outcome = step(**fields, **more)(wide(), context())
        (warning,) = outcome.warnings
        assert re.search("0.95 of channels.*cannot be reached.*round_to=8.*min_channels=24", warning)
        assert f"{1 - left(outcome.model, 'channels'):.2f} is the nearest" in warning
        assert widths(outcome.model) == [24, 24, 24]


@pytest.mark.slow
def test_later_rounds_obey_what_held_in_the_first() -> None:
    """Units narrower than `round_to` or `min_channels` ignore them; none becomes so."""
    fields = {"sparsity": 0.8, "of": "channels", "schedule": "iterative", "rounds": 4, "train": TRAIN}
    assert all(each % 8 == 0 for each in widths(step(**fields)(wide(), context()).model))
    assert min(widths(step(**fields, round_to=1, min_channels=10)(wide(), context()).model)) == 10
    outcome = step(**fields, round_to=40)(wide(), context())
    assert widths(outcome.model)[1:] == [40, 40]  # the stem never had 40 and is cut in steps of one
    assert widths(outcome.model)[0] < 32


def test_each_layer_and_each_refused_group_has_a_record() -> None:
    outcome = step(exclude="head", of="channels", scope="layer")(wide(), context())
    pruned = {each.layer: each for each in outcome.layers if each.action == "pruned"}
    assert pruned["stem"].reason == "32 x 1 x 3 x 3 -> 16 x 1 x 3 x 3"
    assert pruned["norm"].reason == "32 -> 16"
    assert pruned["inner"].reason == "48 x 32 x 3 x 3 -> 24 x 16 x 3 x 3"
    assert pruned["inner"].sparsity == pytest.approx(1 - (24 * 16 * 9 + 24) / (48 * 32 * 9 + 48))
    assert pruned["last"].reason == "64 x 32 x 3 x 3 -> 64 x 16 x 3 x 3"
    assert set(pruned) == {"stem", "norm", "inner", "inner_norm", "back", "last"}
    refused = [(each.layer, each.reason) for each in outcome.layers if each.action == "refused"]
    assert refused == [("last.weight", Reason.EXCLUDED), ("head.weight", Reason.OUTPUT)]
    assert not any("extent" in reason for _, reason in refused)
    assert outcome.warnings == []


class Unruled(nn.Module):
    """Sorts its channels by an operation that nobody has a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 32), nn.Linear(32, 32)
        self.three = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, toy.CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x.mean(1).mean(1)))
        return self.three(torch.relu(self.two(x))) + torch.linalg.eigvalsh(x.T @ x).sum()


def test_an_operation_without_a_rule_is_named() -> None:
    outcome = step(sparsity=0.1, round_to=1)(Unruled(), context())
    assert any(each.startswith("no rule for aten._linalg_eigh") for each in outcome.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_ranks_channels(criterion: str) -> None:
    outcome = step(criterion=criterion, of="channels", scope="layer")(wide(), context())
    assert widths(outcome.model) == [16, 24, 32]
    again = step(criterion=criterion, of="channels", scope="layer")(wide(), context())
    assert fingerprint(again.model.state_dict()) == fingerprint(outcome.model.state_dict())
    assert torch.isfinite(outcome.model(toy.images(4, 0)[0])).all()


@pytest.mark.slow
def test_statistics_are_gathered_again_for_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchslim.prune.criteria import gathering

    seen: list[list[int]] = []
    gather = gathering.gather

    def spy(model: nn.Module, *args: Any, **fields: Any) -> Any:
        seen.append(widths(model))
        return gather(model, *args, **fields)

    monkeypatch.setattr(gathering, "gather", spy)
    step(criterion="taylor", schedule="iterative", rounds=2, train=TRAIN)(wide(), context())
    assert len(seen) == 2
    assert sum(seen[1]) < sum(seen[0])


@pytest.mark.slow
def test_masks_of_weights_that_were_pruned_before_are_cut_with_them() -> None:
    steps = [ts.Prune(sparsity=0.5, scope="layer"), step(), ts.Finetune(epochs=1, optimizer="sgd", lr=0.05)]
    result = ts.compress(wide(), toy.task(), steps, runtime="eager", threads=1)
    before, _ = ts.Prune(sparsity=0.5, scope="layer").masks(wide(), {}, 0.5, 0)
    kept = {(each["weight"], each["dim"]): each["kept"] for each in ts.surgery(result.module)["rounds"][0]["cuts"]}
    assert set(result.masks) == set(before)
    for name, mask in before.items():
        for dim in range(mask.dim()):
            if (name, dim) in kept:
                mask = mask.index_select(dim, torch.tensor(kept[name, dim]))
        assert torch.equal(result.masks[name], mask)
        weight = result.module.get_parameter(name)
        assert weight.shape == mask.shape
        assert bool((weight[~mask] == 0).all())
        assert bool((weight[mask] != 0).any())


def test_masks_of_shared_weights_are_found_by_any_name() -> None:
    from torchslim.prune.channel_state import cut_masks
    from torchslim.prune.structured.surgery import Cut, Surgery

    model = nn.Module()
    model.one, model.two = nn.Linear(4, 4), nn.Linear(4, 4)
    model.two.weight = model.one.weight
    mask = torch.arange(16).reshape(4, 4) % 3 == 0
    done = Surgery((Cut("one.weight", 0, 4, (1, 3)), Cut("one.weight", 1, 4, (0, 2))), ())
    assert torch.equal(cut_masks({"two.weight": mask}, done, model)["two.weight"], mask[[1, 3]][:, [0, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["group-lasso", "bn-l1"])
def test_a_penalty_acts_in_every_training_that_a_cut_follows(kind: Any) -> None:
    made = step(
        sparsify=kind, strength=1e-3, sparsify_train=ts.Finetune(epochs=1, optimizer="sgd", lr=0.02),
        schedule="iterative", rounds=2, train=TRAIN,
    )  # fmt: skip
    history = made(wide(), context()).history
    assert [row["round"] for row in history] == [0, 1, 1, 2, 2]
    assert [("loss_penalty" in row) for row in history] == [True, True, True, False, False]
    once = step(sparsify=kind, train=TRAIN)(wide(), context()).history
    assert [("loss_penalty" in row) for row in once] == [True, True, False, False]


class Killed(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [("sparsify", 5), ("cut-1", 1), ("prune-1", 3), ("cut-2", 1), ("prune-2", 2), ("prune-2", 6), ("", 0)]
)
def test_a_killed_step_goes_on_with_the_right_shapes(moment: tuple[str, int], tmp_path: Path) -> None:
    made = step(schedule="iterative", rounds=2, criterion="taylor", train=TRAIN, sparsify="group-lasso")
    masks = {"inner.weight": torch.rand(48, 32, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.7}
    ctx = context(masks=masks)
    whole = made(wide(), ctx)
    seen: Mapping[str, list[int]] = {}

    def kill(event: ts.Event) -> None:
        count = seen.setdefault(event.phase, [0])  # type: ignore[attr-defined]
        count[0] += 1
        if (event.phase, count[0]) == moment:
            raise Killed

    resumable = replace(ctx, state=tmp_path)
    if moment[0]:
        with pytest.raises(Killed):
            made(wide(), replace(resumable, progress=kill))
    else:
        made(wide(), resumable)
    phases: list[str] = []
    resumed = made(wide(), replace(resumable, progress=lambda event: phases.append(event.phase)))
    if moment[0] in ("prune-2", ""):
        assert not any(phase.startswith("cut") for phase in phases)  # the stored round is taken, not made again
    assert fingerprint(resumed.model.state_dict()) == fingerprint(whole.model.state_dict())
    assert fingerprint(dict(resumed.masks)) == fingerprint(dict(whole.masks))
    assert ts.surgery(resumed.model) == ts.surgery(whole.model)
    assert (resumed.history, resumed.layers, resumed.warnings) == (whole.history, whole.layers, whole.warnings)


@pytest.mark.parametrize("damage", [b"", b"junk"])
def test_a_damaged_round_is_warned_of_and_pruning_starts_over(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(damage)
    with pytest.warns(UserWarning, match=r"cut\.ckpt.*truncated or changed.*start over"):
        found = step()(wide(), context(state=tmp_path))
    assert widths(found.model) == widths(step()(wide(), context()).model)


@pytest.mark.slow
def test_a_second_pruning_counts_from_what_it_receives() -> None:
    fields = {"of": "channels", "scope": "layer", "round_to": 1, "min_channels": 1}
    first, second = step(**fields), step(**fields, schedule="iterative", rounds=2, train=TRAIN)
    result = ts.compress(wide(), toy.task(), [first, second], runtime="eager", threads=1)
    assert widths(result.module) == [8, 12, 16]
    assert len(ts.surgery(result.module)["rounds"]) == 3


@pytest.mark.slow
def test_a_finished_run_is_picked_up_whole(tmp_path: Path) -> None:
    phases: list[tuple[str, str]] = []

    def run(**fields: Any) -> ts.Result:
        steps = [step(), ts.Finetune(epochs=1), ts.Quantize("int8")]
        return ts.compress(wide(), toy.task(), steps, runtime="eager", threads=1, workdir=tmp_path, **fields)

    first = run()
    second = run(progress=lambda event: phases.append((event.step, event.phase)))
    assert [name for name, phase in phases if phase == "resumed"] == ["prune", "finetune", "quantize"]
    assert fingerprint(second.module.state_dict()) == fingerprint(first.module.state_dict())
    assert ts.surgery(second.module) == ts.surgery(first.module)
