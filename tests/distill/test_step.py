"""Distillation: exact losses, labels that count once, a teacher that nothing touches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import models, toy
from torchslim.core.batches import predictor
from torchslim.core.fingerprint import fingerprint
from torchslim.distill import kl_divergence
from torchslim.errors import DistillError

LOGITS = st.integers(0, 2**31 - 1).map(
    lambda seed: torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
)


def numpy_kd(student: Any, teacher: Any, target: Any, temperature: float, alpha: float) -> float:
    def log_softmax(x: Any) -> Any:
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    s, t = log_softmax(student / temperature), log_softmax(teacher / temperature)
    soft = (np.exp(t) * (t - s)).sum(1).mean() * temperature**2
    hard = -log_softmax(student)[np.arange(len(target)), target].mean()
    return float((1 - alpha) * hard + alpha * soft)


@given(LOGITS, st.floats(0.5, 10), st.floats(0, 1))
def test_kd_is_the_papers_formula(logits: Tensor, temperature: float, alpha: float) -> None:
    student, teacher = logits
    target = torch.tensor([0, 6, 3, 3, 1])
    expected = numpy_kd(student.numpy(), teacher.numpy(), target.numpy(), temperature, alpha)
    assert ts.KD(temperature=temperature, alpha=alpha)(student, teacher, target).item() == pytest.approx(expected)
    order = torch.randperm(5)
    shuffled = ts.KD(temperature=temperature, alpha=alpha)(student[order], teacher[order], target[order])
    assert shuffled.item() == pytest.approx(expected)


def test_kd_by_hand() -> None:
    # one sample, two classes: teacher (3/4, 1/4), student (1/2, 1/2): KL = log 2 + 3/4 log 3/4 + 1/4 log 1/4
    student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    expected = np.log(2) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    assert kl_divergence(student, teacher).item() == pytest.approx(expected)


@given(LOGITS)
def test_kd_is_zero_at_the_teacher_and_sends_it_no_gradient(logits: Tensor) -> None:
    assert ts.KD(alpha=1.0)(logits[0], logits[0]).item() == pytest.approx(0, abs=1e-12)
    teacher = logits[1].clone().requires_grad_()
    student = logits[0].clone().requires_grad_()
    ts.KD(alpha=1.0)(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_kd_gradients_and_half_precision() -> None:
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    assert torch.autograd.gradcheck(lambda s: ts.KD()(s, teacher, target), (student,))
    assert torch.isfinite(ts.KD()(student.bfloat16() * 50, teacher.bfloat16() * 50, target))


def test_kd_refuses_what_cannot_be() -> None:
    for fields in (
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"alpha": -0.1},
        {"alpha": float("nan")},
    ):
        with pytest.raises(DistillError, match="must be"):
            ts.KD(**fields)
    with pytest.raises(DistillError, match="set alpha=1"):
        ts.KD(alpha=0.5)(torch.zeros(1, 2), torch.zeros(1, 2), None)
    with pytest.raises(DistillError, match="differ in shape"):
        ts.KD()(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1).long())
    with pytest.raises(DistillError, match="label_weight must be"):
        ts.Distill(label_weight=-1)
    with pytest.raises(DistillError, match="response 'kl'.*kd"):
        ts.compress(toy.model(), toy.task(), [ts.Distill(response="kl")], runtime="eager")


def scaled_mse(student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
    return (student - teacher).square().mean()


@pytest.mark.parametrize(
    ("step", "label_weight"),
    [(ts.Distill(), 0.1), (ts.Distill(response=ts.KD(alpha=0.25)), 0.75), (ts.Distill(label_weight=2.0), 2.0),
     (ts.Distill(response=scaled_mse), 0.0), (ts.Distill(response="tests.distill.test_step:scaled_mse", label_weight=0.5), 0.5)],
)  # fmt: skip
def test_the_label_loss_counts_once_with_its_weight(step: ts.Distill, label_weight: float) -> None:
    task, student, teacher = toy.task(), toy.model(), toy.model()
    nn.init.normal_(teacher.head.weight)
    teacher.eval()
    state = fingerprint(teacher.state_dict())
    batch = toy.images(16, 4)
    ctx = ts.Context(task=task, teacher=teacher.train(), example_inputs=(batch[0],))
    with step.lesson(student, ctx) as lesson:
        parts = lesson.objective(student, batch)
    with torch.no_grad():
        ours, theirs = student(batch[0]), predictor(teacher)(batch[0])
    label = nn.functional.cross_entropy(ours, batch[1])
    response = (
        scaled_mse(ours, theirs, None)
        if step.response not in (ts.KD(), ts.KD(alpha=0.25))
        else step.response.soft(ours, theirs)
    )
    expected = label_weight * label + response
    assert sum(parts.values()).item() == pytest.approx(expected.item(), rel=1e-4)
    sum(parts.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert fingerprint(teacher.state_dict()) == state


@given(st.integers(0, 1000), st.sampled_from([torch.bfloat16, torch.float16]), st.floats(1, 1000))
def test_half_precision_is_computed_as_float32_would(seed: int, dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 3, 4, generator=generator) * size).to(dtype)
    assert kl_divergence(student, teacher, temperature=4.0).item() == pytest.approx(
        kl_divergence(student.float(), teacher.float(), temperature=4.0).item()
    )


@given(st.floats(0.5, 10), st.floats(0, 1))
def test_kd_over_tokens_and_pixels_is_kd_over_their_positions(temperature: float, alpha: float) -> None:
    kd = ts.KD(temperature=temperature, alpha=alpha)
    tokens, labels = torch.randn(2, 3, 4, 5), torch.randint(5, (3, 4))  # (batch, time, classes)
    expected = kd(*tokens.flatten(1, 2), labels.flatten()).item()
    assert kd(*tokens, labels).item() == pytest.approx(expected, rel=1e-5)
    pixels = tokens.movedim(-1, 2)  # (batch, classes, length)
    assert kd(*pixels, labels).item() == pytest.approx(expected, rel=1e-5)


def test_dense_logits_that_nothing_explains_are_refused() -> None:
    logits = torch.randn(2, 3, 4)
    with pytest.raises(DistillError, match=r"\(batch, classes, length\) or \(batch, time, classes\)"):
        ts.KD(alpha=1.0)(logits, logits, None)
    images = torch.randn(2, 3, 4, 4)
    assert ts.KD(alpha=1.0)(images, images, None).item() == 0


@pytest.mark.parametrize("shape", [(4,), (4, 1), ()])
def test_one_output_is_no_distribution(shape: tuple[int, ...]) -> None:
    with pytest.raises(DistillError, match="two classes.*shape"):
        kl_divergence(torch.zeros(shape), torch.zeros(shape))


def test_padding_does_not_count() -> None:
    student, teacher = models.Encoder(), models.Encoder()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    tokens = torch.randint(models.WORDS, (2, 5))
    batch = {"tokens": tokens, "attention_mask": mask}
    task = ts.Task(val=[batch], train=[batch], metric=lambda predict, batches: 0.0)
    ctx = ts.Context(task=task, teacher=teacher, example_inputs=batch)
    step = ts.Distill(response=ts.KD(alpha=1.0, temperature=2.0))
    with step.lesson(student, ctx) as lesson:
        parts = lesson.objective(student.train(), batch)
    ours, theirs = student(tokens, mask)[mask.bool()], predictor(teacher)(tokens, mask)[mask.bool()]
    assert parts.keys() == {"response"}
    expected = kl_divergence(ours, theirs, temperature=2.0).item()
    assert parts["response"].item() == pytest.approx(expected, rel=1e-4)
    other = dict(batch, tokens=torch.where(mask.bool(), tokens, (tokens + 1) % models.WORDS))
    with step.lesson(student, ctx) as lesson:
        assert lesson.objective(student, other)["response"].item() == pytest.approx(expected, rel=1e-4)


def test_the_teacher_answers_in_eval_mode_and_without_gradients() -> None:
    seen: list[tuple[bool, bool, bool]] = []
    teacher, student = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train(), nn.Linear(4, 3)
    teacher.register_forward_hook(
        lambda module, _, out: seen.append((module.training, module[1].training, out.requires_grad))
    )
    teacher[0].eval()
    x, y = torch.randn(6, 4), torch.zeros(6).long()
    task = ts.Task(val=[(x, y)], train=[(x, y)] * 3, metric="accuracy")
    ctx = ts.Context(task=task, teacher=teacher, example_inputs=(x,))
    ts.Distill(epochs=2)(student, ctx)
    assert seen == [(False, False, False)] * 6
    assert [module.training for module in teacher.modules()] == [True, False, True]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_students_response_falls_towards_its_teacher() -> None:
    x = torch.randn(64, 4)
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    task = ts.Task(val=[(x,)], train=[(x,)] * 20, metric=lambda predict, batches: 0.0)
    ctx = ts.Context(task=task, teacher=teacher, example_inputs=(x,))
    step = ts.Distill(response=ts.KD(alpha=1.0), epochs=5, lr=0.05, weight_decay=0.0, keep="last")
    step.check(ctx)
    outcome = step(student, ctx)
    losses = [row["loss_response"] for row in outcome.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.01 * losses[0]
    agree = (student(x).argmax(1) == teacher(x).argmax(1)).float().mean()
    assert agree == 1


def unlabeled(**fields: Any) -> ts.Context:
    x = torch.randn(8, 4)
    task = ts.Task(val=[(x,)], train=[(x,)], metric=lambda predict, batches: 0.0, **fields)
    return ts.Context(task=task, teacher=nn.Linear(4, 3), example_inputs=(x,))


@pytest.mark.parametrize(
    "step",
    [ts.Distill(), ts.Distill(response=ts.KD(alpha=1.0), label_weight=0.1), ts.Distill(response="kd")],
)
def test_labels_that_count_but_are_missing_are_an_error_before_any_work(step: ts.Distill) -> None:
    with pytest.raises(DistillError, match="labels.*weight 0.1.*Task.target.*None.*alpha=1"):
        step.check(unlabeled())
    with pytest.raises(DistillError, match="labels.*weight"):
        ts.Prune(sparsity=0.5, train=step).check(unlabeled())
    step.check(unlabeled(loss=lambda outputs, batch: outputs.mean()))


@pytest.mark.parametrize(
    "step",
    [ts.Distill(response=ts.KD(alpha=1.0)), ts.Distill(label_weight=0.0), ts.Distill(response=scaled_mse)],
)
def test_labels_that_do_not_count_are_not_asked_for(step: ts.Distill) -> None:
    ctx = unlabeled()
    step.check(ctx)
    outcome = step(nn.Linear(4, 3), replace(ctx))
    assert all(math.isfinite(row["loss_response"]) and "loss_label" not in row for row in outcome.history)


LEFT_OUT = 3


class Halved:
    """A response of the user's own with settings."""

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return 0.5 * scaled_mse(student, teacher, target)


@pytest.mark.parametrize("response", [Halved(), "tests.distill.test_step:Halved"])
def test_a_response_may_be_an_object_or_be_named(response: Any) -> None:
    ctx = unlabeled()
    (x,) = ctx.task.train[0]
    student = nn.Linear(4, 3)
    with ts.Distill(response=response).lesson(student, ctx) as lesson:
        parts = lesson.objective(student, (x,))
    expected = 0.5 * (student(x) - ctx.teacher(x)).square().mean()
    assert parts["response"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response": ts.KD}, "response.*KD.*function"),
        ({"response": 3}, "response.*KD.*got 3"),
        ({"response": ts.KD(alpha=0.0), "label_weight": 0.0}, "nothing to learn"),
        ({"response": "kdd"}, "response 'kdd'.*kd, dkd, dist, mse.*'package.module:name'"),
        ({"label_weight": float("nan")}, "label_weight.*finite.*nan"),
    ],
)
def test_a_step_that_cannot_work_says_so_when_it_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        ts.Distill(**fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("tests.distill.test_step:nobody", "has no 'nobody'"), ("tests.nowhere:kd", "cannot be imported"),
     ("tests.distill.test_step:LEFT_OUT", "response must be KD")],
)  # fmt: skip
def test_a_named_response_that_is_not_there_is_an_error_before_any_work(spec: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        ts.Distill(response=spec).check(unlabeled())


def test_a_teacher_with_other_classes_is_an_error_that_names_both_shapes() -> None:
    ctx = replace(unlabeled(), teacher=nn.Linear(4, 7))
    with pytest.raises(DistillError, match=r"shape.*\(8, 3\), \(8, 7\)"):
        ts.Distill(response=ts.KD(alpha=1.0))(nn.Linear(4, 3), ctx)
