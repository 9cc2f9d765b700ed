"""Distillation from several sides at once: parts that add up, who teaches, who learns, and inside other steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests.support.distilled import conv_net, seeded
from tests.support.states import hooks
from torchslim.core.batches import predictor
from torchslim.core.fingerprint import fingerprint
from torchslim.distill import RKD, VID, AttentionTransfer, Hint
from torchslim.errors import DistillError


def context(**fields: Any) -> ts.Context:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 3, 16, 16, generator=generator), torch.arange(32) % 5
    train = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    task = ts.Task(train=train, val=[(x, y)], metric="accuracy")
    given = {"task": task, "teacher": seeded(conv_net, 8), "model": seeded(conv_net, 4), "example_inputs": (x[:2],)}
    return ts.Context(**given | fields)


def objective(step: ts.Distill, model: nn.Module, ctx: ts.Context) -> tuple[dict[str, Tensor], Any]:
    batch = next(iter(ctx.task.val))
    with step.lesson(model, ctx) as lesson:
        return dict(lesson.objective(model, batch)), batch


# parts ----------------------------------------------------------------------------------------------------------------


def flat_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.mean(1) - b.mean(1)).square().mean() for a, b in zip(student, teacher, strict=True)]).sum()


def spread(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.flatten(1).std() - teacher.flatten(1).std()).square()


def test_parts_are_named_weighted_and_add_up() -> None:
    ctx, model = context(), seeded(conv_net, 4).eval()
    step = ts.Distill(
        response=ts.KD(alpha=0.5),
        feature=[Hint(), AttentionTransfer(weight=2.0), AttentionTransfer(weight=3.0), flat_mse],
        relation=(RKD(), spread),
        taps={"0": "0", "1": "1"},
        label_weight=0.25,
    )
    parts, (x, y) = objective(step, model, ctx)
    assert list(parts) == [
        "response", "hint", "attention_transfer", "attention_transfer_2", "flat_mse", "rkd", "spread", "label"
    ]  # fmt: skip
    teacher = ctx.teacher.eval()
    ours, theirs = [model[:1](x), model[:2](x)], [teacher[:1](x), teacher[:2](x)]
    expected = {
        "response": ts.KD(alpha=0.5).soft(model(x), teacher(x)),
        "attention_transfer": AttentionTransfer(weight=2.0)(ours, theirs),
        "attention_transfer_2": AttentionTransfer(weight=3.0)(ours, theirs),
        "flat_mse": flat_mse(ours, theirs),
        "rkd": RKD()(ours[-1], theirs[-1]),
        "spread": spread(ours[-1], theirs[-1]),
        "label": 0.25 * nn.functional.cross_entropy(model(x), y),
    }
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_without_a_response_the_labels_count_in_full_and_the_teachers_logits_are_not_asked_for() -> None:
    step = ts.Distill(response=None, feature=Hint())
    assert step.resolved_label_weight() == 1
    parts, _ = objective(step, seeded(conv_net, 4), context())
    assert set(parts) == {"hint", "label"}


def test_what_needs_no_labels_works_without() -> None:
    x = torch.randn(16, 3, 16, 16)
    task = ts.Task(train=[(x[:8],), (x[8:],)], val=[(x,)], metric=lambda predict, batches: 0.0)
    ctx = context(task=task)
    step = ts.Distill(response=ts.KD(alpha=1), feature=[VID(), AttentionTransfer()], relation=[RKD(), "crd"], epochs=2)
    step.check(ctx)
    outcome = step(seeded(conv_net, 4), ctx)
    assert all(math.isfinite(value) for row in outcome.history for value in row.values())


def test_features_may_be_learned_from_a_teacher_with_other_classes() -> None:
    teacher = seeded(conv_net, 8)
    teacher[-1] = nn.Linear(24, 9)
    ctx = context(teacher=teacher)
    ts.Distill(response=None, feature=Hint()).check(ctx)
    with pytest.raises(DistillError, match=r"shape.*\(8, 5\), \(8, 9\)"):
        ts.Distill(feature=Hint()).check(ctx)


def test_projections_learn_and_are_no_part_of_the_model() -> None:
    ctx, model = context(), seeded(conv_net, 4)
    names = set(model.state_dict())
    step = ts.Distill(response=None, feature=Hint(), label_weight=0.0, epochs=8, lr=0.02, keep="last")
    outcome = step(model, ctx)
    assert set(outcome.model.state_dict()) == names
    losses = [row["loss_hint"] for row in outcome.history]
    assert losses[-1] < 0.5 * losses[0]
    taught = [(each.layer, each.reason) for each in outcome.layers[1:]]
    assert taught[0] == ("0", "taught by 0 8x8x8 to 4x8x8, same name")


# teachers -------------------------------------------------------------------------------------------------------------

LOGITS = st.integers(0, 2**31 - 1).map(
    lambda seed: torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
)


@given(LOGITS, st.floats(0.5, 8), st.floats(0.05, 0.9))
def test_several_teachers_are_the_mean_of_their_softened_outputs(
    logits: Tensor, temperature: float, weight: float
) -> None:
    one, two, student = logits
    weights = (weight, 1 - weight)
    for loss in (ts.KD(temperature=temperature), ts.DKD(temperature=temperature), ts.DIST(temperature=temperature)):
        blended = loss.blend([one, two], weights)
        mean = sum(w * (each / temperature).softmax(1) for w, each in zip(weights, (one, two), strict=True))
        assert torch.allclose((blended / temperature).softmax(1), mean)  # type: ignore[arg-type]
    labels = ts.KD(temperature=temperature, kind="labels", alpha=1.0)
    mean = sum(w * (each / temperature).sigmoid() for w, each in zip(weights, (one, two), strict=True))
    assert torch.allclose((labels.blend([one, two], weights) / temperature).sigmoid(), mean)  # type: ignore[arg-type]
    outputs = ts.distill.MSE().blend([one, two], weights)
    assert torch.allclose(outputs, weight * one + (1 - weight) * two)
    assert torch.allclose(ts.KD(temperature=temperature).blend([one, one], weights).softmax(1), one.softmax(1))
    with pytest.raises(DistillError, match="teachers' logits.*shape"):
        ts.KD().blend([one, student[:, :3]], weights)


def test_several_teachers_teach_with_their_weights() -> None:
    ctx, model = context(), seeded(conv_net, 4).eval()
    one, two = seeded(conv_net, 6).eval(), seeded(conv_net, 5).eval()
    step = ts.Distill(response=ts.KD(alpha=1.0), teacher=[one, two], teacher_weights=[3.0, 1.0])
    parts, (x, _) = objective(step, model, ctx)
    mean = 0.75 * (one(x) / 4).softmax(1) + 0.25 * (two(x) / 4).softmax(1)
    expected = ts.KD(alpha=1.0)(model(x), 4 * mean.log())
    assert parts["response"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert step.teacher == (one, two)


def other_teacher() -> nn.Module:
    return seeded(conv_net, 7)


@pytest.mark.parametrize("teacher", ["tests.distill.test_parts:other_teacher", other_teacher()])
def test_a_teacher_may_be_named_or_given(teacher: Any) -> None:
    ctx, model = context(), seeded(conv_net, 4).eval()
    parts, (x, _) = objective(ts.Distill(response=ts.KD(alpha=1.0), teacher=teacher), model, ctx)
    expected = ts.KD(alpha=1.0)(model(x), predictor(other_teacher())(x))
    assert parts["response"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_students_own_average_teaches() -> None:
    ctx = context()
    seen: list[np.ndarray[Any, Any]] = []
    model = seeded(conv_net, 4)
    start = model[0][0].weight.detach().numpy().copy()

    class Watch(ts.training.Hook):
        def on_step(self, loop: Any) -> None:
            seen.append(model[0][0].weight.detach().numpy().copy())

    step = ts.Distill(teacher="ema", ema_decay=0.8, feature=AttentionTransfer(), epochs=2, lr=0.01)
    with step.lesson(model, ctx) as lesson:
        ts.fit(
            model, lesson.batches, lesson.objective, epochs=2, hooks=[Watch(), *lesson.hooks],
            companion=lesson.companion,
        )  # fmt: skip
        assert lesson.companion is not None
        average = lesson.companion.average
        assert isinstance(average, nn.Module)
        got = average.get_parameter("0.0.weight").detach().numpy()
        counted = average.get_buffer("0.1.num_batches_tracked")
    expected = start
    for number, weight in enumerate(seen, 1):
        part = max(0.2, 1 / (number + 1))
        expected = (1 - part) * expected + part * weight
    assert np.allclose(got, expected, atol=1e-6)
    assert counted == 8
    assert hooks(model) == 0


@pytest.mark.slow
def test_an_average_goes_on_after_a_kill(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(event: ts.Event) -> None:
        if event.values["epoch"] == 2:
            raise Killed

    step = ts.Distill(teacher="ema", feature=Hint(), epochs=3, lr=0.01)
    whole, again = seeded(conv_net, 4), seeded(conv_net, 4)
    step(whole, context())
    with pytest.raises(Killed):
        step(seeded(conv_net, 4), context(state=tmp_path, progress=kill))
    step(again, context(state=tmp_path))
    assert fingerprint(again.state_dict()) == fingerprint(whole.state_dict())


# students -------------------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return conv_net(2)


@pytest.mark.slow
def test_a_new_student_takes_the_models_place_and_can_be_pruned_and_quantized(tmp_path: Path) -> None:
    ctx, big = context(), seeded(conv_net, 8)
    steps = [
        ts.Distill(student="tests.distill.test_parts:small", feature=Hint(), epochs=1),
        ts.Prune(sparsity=0.5, include="1.0.weight", train=ts.Distill(epochs=1)),
        ts.Quantize("int8-weights"),
    ]
    before = fingerprint(big.state_dict())
    result = ts.compress(big, ctx.task, steps, runtime="eager", workdir=tmp_path / "work")
    assert fingerprint(big.state_dict()) == before
    parameters = [row["parameters"]["value"] for row in result.run["rows"]]
    assert parameters[0] > 5 * parameters[1]
    assert result.module[0][0].weight.shape == small()[0][0].weight.shape
    reasons = [layer["reason"] for layer in result.run["rows"][1]["layers"]]
    assert any("taught by" in reason for reason in reasons)
    again = ts.compress(big, ctx.task, steps, runtime="eager", workdir=tmp_path / "work")  # every step is taken up
    assert fingerprint(again.module.state_dict()) == fingerprint(result.module.state_dict())
    assert again.run["rows"][1]["seconds"] == result.run["rows"][1]["seconds"]
    result.save(tmp_path / "out")
    loaded = ts.load_module(tmp_path / "out", small)
    assert fingerprint(loaded.state_dict()) == fingerprint(result.module.state_dict())


def test_a_student_belongs_to_a_step_by_itself() -> None:
    step = ts.Distill(student=small(), epochs=1)
    step.check(context())
    for user in (ts.Prune(sparsity=0.5, train=step), ts.Quantize("int8", mode="qat", train=step)):
        with pytest.raises(DistillError, match="student.*as a step"):
            user.check(context())


# inside other steps ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pruning_and_quantization_train_on_all_parts_and_say_what_taught_them() -> None:
    ctx = context()
    train = ts.Distill(epochs=1, feature=[Hint(), AttentionTransfer()], relation=RKD())
    steps = [
        ts.Prune(sparsity=0.5, pattern="channel", round_to=1, schedule="iterative", rounds=2, train=train),
        ts.Quantize("int8", mode="qat", train=train),
    ]
    result = ts.compress(seeded(conv_net, 8), ctx.task, steps, runtime="eager")
    for row in result.run["rows"][1:3]:
        assert {"loss_response", "loss_hint", "loss_attention_transfer", "loss_rkd"} <= row["history"][0].keys()
        taught = [each for each in row["layers"] if each["action"] == "trained"]
        assert [each["layer"] for each in taught] == ["0", "1", "2"]
        assert all("same name" in each["reason"] for each in taught)
    assert not [name for name, _ in result.module.named_modules() if "_reader" in name]


# errors before any work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature": "hintt"}, "feature 'hintt'.*hint, attention_transfer"),
        ({"feature": "rkd"}, "feature 'rkd'.*relation loss.*relation='rkd'"),
        ({"relation": Hint()}, r"Hint.*feature loss.*feature=Hint\(...\)"),
        ({"response": RKD()}, r"RKD.*relation loss.*relation=RKD\(...\)"),
        ({"feature": Hint}, "feature.*Hint.*function"),
        ({"taps": {}}, "taps is empty"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"teacher": "ema", "cache": "x"}, "teacher='ema'.*every step"),
        ({"teacher": ("ema", "ema")}, "without other teachers"),
        ({"teacher_weights": (1.0, 2.0)}, "the 0 teachers"),
        (
            {"teacher": ("a:b", "c:d"), "teacher_weights": (1.0, math.nan)},
            "teacher_weights entry 2.*nan.*finite",
        ),
        ({"teacher": ("a:b", "c:d"), "teacher_weights": (1.0, -1.0)}, "none negative"),
        ({"response": None, "label_weight": 0.0}, "nothing to learn"),
        ({"taps": {"0": "0"}}, "taps.*no loss"),
        ({"cache": __file__}, "cache must be a folder"),
    ],
)
def test_a_step_that_cannot_work_says_so_when_it_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        ts.Distill(**fields)


def nothing() -> int:
    return 3


def vectors() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature": Hint(), "taps": {"layer3": "0"}}, "tap 'layer3'.*student"),
        ({"feature": Hint(), "taps": {"0": "layer3"}}, "tap 'layer3'.*teacher"),
        ({"teacher": "tests.distill.test_parts:nothing"}, "teacher.*module.*got 3"),
        ({"teacher": "tests.distill.test_parts:nobody"}, "has no 'nobody'"),
        ({"student": "tests.distill.test_parts:nothing"}, "student.*module.*got 3"),
        ({"feature": "tests.distill.test_parts:nobody"}, "has no 'nobody'"),
        ({"feature": AttentionTransfer(), "student": vectors(), "taps": {"3": "0"}}, "AttentionTransfer"),
    ],
)
def test_what_cannot_work_is_an_error_before_training(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        ts.Distill(**fields).check(context())


def test_a_teacher_in_training_mode_answers_in_eval_mode_and_stays_as_it_was() -> None:
    ctx = context()
    ctx.teacher.train()
    state = fingerprint(ctx.teacher.state_dict())
    step = ts.Distill(feature=Hint(), epochs=1)
    step(seeded(conv_net, 4), replace(ctx))
    assert ctx.teacher.training
    assert fingerprint(ctx.teacher.state_dict()) == state


def test_features_are_taken_before_activations_in_place_write_over_them() -> None:
    def in_place(width: int) -> nn.Module:
        net = conv_net(width)
        for block in net[:3]:
            block[2] = nn.ReLU(inplace=True)
        return net

    ctx = context(teacher=in_place(6), model=in_place(4))
    model = in_place(4).eval()
    step = ts.Distill(response=None, feature=flat_mse, taps={"0.1": "0.1"}, label_weight=0.0)
    parts, (x, _) = objective(step, model, ctx)
    expected = flat_mse([model[0][:2](x)], [ctx.teacher.eval()[0][:2](x)])
    assert parts["flat_mse"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_dropout_in_place_does_not_reach_the_feature_before_it() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.9, inplace=True), nn.Linear(8, 5)
        )

    zeros: list[float] = []

    def spy(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        zeros.append((student[0] == 0).double().mean().item())
        return flat_mse(student, teacher)

    ctx = context(teacher=net(), model=net())
    ts.Distill(feature=spy, taps={"1": "1"}, epochs=1)(net(), ctx)
    assert max(zeros) == 0


def label(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    return 0 * student[0].sum() + 1000


def hint_2(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    return 0 * student[0].sum() + 100


def test_no_part_is_lost_to_the_name_of_another() -> None:
    step = ts.Distill(feature=[label, hint_2, Hint(), Hint()])
    parts, _ = objective(step, seeded(conv_net, 4), context())
    assert list(parts) == ["response", "label_2", "hint_2", "hint", "hint_3", "label"]
    assert parts["label_2"].item() == 1000


def test_crd_refuses_samples_that_have_no_numbers() -> None:
    class Own(DataLoader[Any]):
        pass

    ctx = context()
    shuffled = Own(ctx.task.train.dataset, batch_size=8, shuffle=True)
    with pytest.raises(DistillError, match="CRD.*by sample"):
        ts.Distill(relation="crd").check(replace(ctx, task=replace(ctx.task, train=shuffled)))
    ts.Distill(relation="crd").check(ctx)


class Dropping(nn.Module):
    """A residual network that skips its layers at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            if not self.training or torch.rand(()) < 0.5:
                x = x + layer(x).relu()
        return self.head(x.mean((2, 3)))


def test_layers_that_are_dropped_in_training_are_taught_when_they_run() -> None:
    step = ts.Distill(feature=["hint", "fsp"], relation=["rkd", "crd"], taps={"layers.*": "layers.*"}, epochs=2)
    ctx = context(model=seeded(Dropping), teacher=seeded(Dropping))
    step.check(ctx)
    outcome = step(seeded(Dropping), ctx)
    assert all(outcome.history[-1][f"loss_{name}"] > 0 for name in ("hint", "fsp", "rkd", "crd"))
    assert outcome.history[-1]["loss_rkd"] != outcome.history[-1]["loss_hint"]


def checkpointed(compute: Callable[..., Any]) -> nn.Module:
    """A model that computes its body in a way of its own."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(compute(self.body, self.stem(x)).mean((2, 3)))

    return seeded(Checkpointed)


def test_a_feature_without_a_gradient_is_an_error() -> None:
    step = ts.Distill(feature="token_mse", taps={"body.0": "body.0"}, epochs=1)
    silent = checkpointed(torch.no_grad()(lambda body, x: body(x)))
    with pytest.raises(DistillError, match="'body.0'.*gradient.*no_grad"):
        step(silent, context(teacher=silent))
    frozen = checkpointed(CHECKPOINTS["not reentrant"]).requires_grad_(False)
    frozen.head.requires_grad_(True)
    step(frozen, context(teacher=frozen))  # what is frozen on purpose is no mistake


CHECKPOINTS = {
    "reentrant": partial(torch.utils.checkpoint.checkpoint, use_reentrant=True),
    "not reentrant": partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_features_inside_a_checkpoint_are_learned_as_without(kind: str) -> None:
    trained = []
    for compute in (CHECKPOINTS[kind], lambda body, x: body(x)):
        model, teacher = checkpointed(compute), checkpointed(compute)
        with torch.no_grad():
            teacher.get_submodule("body.0").weight.mul_(2)
        ts.Distill(feature="token_mse", taps={"body.0": "body.0"}, epochs=1)(model, context(teacher=teacher))
        trained.append(model.state_dict())
    assert fingerprint(trained[0]) == fingerprint(trained[1])


@pytest.mark.parametrize("relation", ["rkd", "pkt", "similarity_preserving", "listwise_ranking"])
def test_a_small_last_batch_has_no_relations_but_small_batches_are_an_error(relation: str) -> None:
    x, y = torch.randn(17, 3, 16, 16), torch.arange(17) % 5
    task = ts.Task(train=DataLoader(TensorDataset(x, y), batch_size=8), val=[(x, y)], metric="accuracy")
    step = ts.Distill(relation=relation, epochs=1)
    step.check(context(task=task))
    assert step(seeded(conv_net, 4), context(task=task)).history[-1][f"loss_{relation}"] > 0
    with pytest.raises(DistillError, match="at least . samples"):
        step.check(context(task=replace(task, train=DataLoader(TensorDataset(x, y), batch_size=1))))


def test_numbers_may_be_one_for_each_sample() -> None:
    x = torch.randn(16, 3)
    task = ts.Task(train=[(x, x.sum(1))], val=[(x, x.sum(1))], metric=lambda predict, batches: 0.0)
    model, teacher = (nn.Sequential(nn.Linear(3, size), nn.Linear(size, 1), nn.Flatten(0)) for size in (4, 8))
    ctx = ts.Context(task=task, teacher=teacher, model=model, example_inputs=(x,))
    step = ts.Distill(response=ts.distill.MSE(), epochs=1)
    step.check(ctx)
    assert ts.distill.MSE().soft(model(x), teacher(x)).item() == pytest.approx(
        (model(x) - teacher(x)).square().mean().item()
    )


def test_inputs_must_have_the_batch_first() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][-1])

    x, y = torch.randn(9, 4, 3), torch.arange(4)
    task = ts.Task(train=[(x, y)], val=[(x, y)], metric="accuracy")
    ctx = ts.Context(task=task, teacher=TimeFirst(), model=TimeFirst(), example_inputs=(x,))
    with pytest.raises(DistillError, match="inputs' first dimension.*9.*logits'.*4.*batch size"):
        ts.Distill(relation="rkd").check(ctx)


def test_a_new_student_starts_the_same_whatever_the_random_state_is() -> None:
    ctx, step = context(), ts.Distill(student="tests.distill.test_parts:unseeded", epochs=1)
    first = step(seeded(conv_net, 4), ctx).model
    torch.rand(3)
    assert fingerprint(step(seeded(conv_net, 4), ctx).model.state_dict()) == fingerprint(first.state_dict())


def unseeded() -> nn.Module:
    return conv_net(3)
