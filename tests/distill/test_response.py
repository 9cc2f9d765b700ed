"""Response losses: against NumPy from the papers' formulas, and their laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from torchslim.distill import LOSSES, MSE, kl_divergence
from torchslim.distill.losses.response import ResponseLoss, decoupled, positions, standardized
from torchslim.errors import DistillError

SEEDS = st.integers(0, 2**31 - 1)
CLASSES = 6
RESPONSES = {name: made for name, made in LOSSES.items() if issubclass(made, ResponseLoss)}
OPTIONS = [*RESPONSES.values(), *(lambda make=make: make(standardize=True) for make in RESPONSES.values())]


def logits(seed: int, batch: int = 5, size: float = 3.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, batch, CLASSES, dtype=torch.float64, generator=generator) * size
    return (*pair, torch.randint(CLASSES, (batch,), generator=generator))


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: Any, q: Any) -> Any:
    return (p * np.log(p / q)).sum(-1)


@given(SEEDS, st.floats(0.5, 8), st.floats(0, 2), st.floats(0.1, 8))
def test_dkd_is_the_papers_formula(seed: int, temperature: float, alpha: float, beta: float) -> None:
    student, teacher, target = logits(seed)
    expected = 0.0
    for s, t, y in zip(student.numpy(), teacher.numpy(), target.numpy(), strict=True):
        ps, pt = softmax(s / temperature), softmax(t / temperature)
        rest = np.arange(CLASSES) != y
        first = kl(np.array([pt[y], 1 - pt[y]]), np.array([ps[y], 1 - ps[y]]))
        second = kl(pt[rest] / pt[rest].sum(), ps[rest] / ps[rest].sum())
        expected += (alpha * first + beta * second) * temperature**2 / len(target)
    found = ts.DKD(temperature=temperature, alpha=alpha, beta=beta).soft(student, teacher, target)
    assert found.item() == pytest.approx(expected, rel=1e-6)


@given(SEEDS, st.floats(0.5, 8))
def test_both_parts_of_dkd_make_up_kd(seed: int, temperature: float) -> None:
    student, teacher, target = logits(seed, batch=1)
    first, second = decoupled(student, teacher, target, temperature=temperature)
    rest = 1 - (teacher / temperature).softmax(1)[0, target]
    expected = kl_divergence(student, teacher, temperature=temperature)
    assert (first + rest * second).item() == pytest.approx(expected.item(), rel=1e-8, abs=1e-12)


@given(SEEDS, st.floats(0.5, 8), st.floats(0, 3), st.floats(0.1, 3))
def test_dist_is_the_papers_formula(seed: int, temperature: float, beta: float, gamma: float) -> None:
    student, teacher, _ = logits(seed)
    s, t = (softmax(each.numpy() / temperature) for each in (student, teacher))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    found = ts.DIST(temperature=temperature, beta=beta, gamma=gamma).soft(student, teacher)
    assert found.item() == pytest.approx((beta * inter + gamma * intra) * temperature**2, rel=1e-5, abs=1e-9)


@pytest.mark.slow
@given(SEEDS, st.floats(0.2, 5), st.floats(-10, 10))
def test_dist_does_not_see_shifts_of_logits(seed: int, scale: float, shift: float) -> None:
    student, teacher, _ = logits(seed)
    assert ts.DIST().soft(student + shift, teacher).item() == pytest.approx(ts.DIST().soft(student, teacher).item())
    for loss in (ts.KD(alpha=1.0, standardize=True), MSE(standardize=True), ts.DIST(standardize=True)):
        moved = loss.soft(student * scale + shift, teacher)
        assert moved.item() == pytest.approx(loss.soft(student, teacher).item(), rel=1e-4, abs=1e-6)


@given(SEEDS)
def test_standardized_logits_have_mean_zero_and_deviation_one(seed: int) -> None:
    found = standardized(logits(seed)[0]).numpy()
    assert np.allclose(found.mean(1), 0, atol=1e-9)
    assert np.allclose(found.std(1), 1, atol=1e-4)


@given(SEEDS, st.floats(0.5, 8))
def test_labels_that_hold_at_once_are_two_classes_each(seed: int, temperature: float) -> None:
    student, teacher, _ = logits(seed)
    found = kl_divergence(student, teacher, temperature=temperature, kind="labels")
    two = [torch.stack([each, torch.zeros_like(each)], -1).reshape(-1, 2) for each in (student, teacher)]
    assert found.item() == pytest.approx(kl_divergence(*two, temperature=temperature).item() * CLASSES, rel=1e-6)


def test_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    assert MSE(weight=3.0)(student, teacher, torch.tensor([1])).item() == pytest.approx(
        3 * 2.5 + np.log(1 + np.exp(-2)), rel=1e-6
    )
    # opposite order of two classes: correlation -1
    assert ts.DIST(gamma=0).soft(student, teacher).item() == pytest.approx(2.0)
    # (1/2, 1/4, 1/4) taught to uniform logits, target 0: KL of (1/2, 1/2) against (1/3, 2/3), and nothing beside it
    target, taught = torch.tensor([0]), torch.tensor([[2.0, 1.0, 1.0]]).log()
    first, second = decoupled(torch.zeros(1, 3), taught, target)
    assert first.item() == pytest.approx(0.5 * np.log(1.5) + 0.5 * np.log(0.75), rel=1e-6)
    assert second.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIONS)
@given(seed=SEEDS)
def test_laws_of_every_response(make: Any, seed: int) -> None:
    loss = make()
    student, teacher, target = logits(seed)
    at_teacher = teacher.clone().requires_grad_()
    assert loss.soft(at_teacher, teacher, target).item() == pytest.approx(0, abs=1e-9)
    pupil, tutor = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    value = loss.soft(pupil, tutor, target)
    value.backward()
    assert tutor.grad is None
    assert pupil.grad is not None
    assert value.item() > 0
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert loss.soft(student[order], teacher[order], target[order]).item() == pytest.approx(value.item())
    one = loss.soft(student[:1], teacher[:1], target[:1])
    assert torch.isfinite(one)
    for dtype in (torch.float16, torch.bfloat16):
        half = loss.soft((student * 50).to(dtype), (teacher * 50).to(dtype), target)
        assert half.dtype == torch.float32
        assert torch.isfinite(half)


@pytest.mark.parametrize("make", OPTIONS)
def test_gradients_of_every_response(make: Any) -> None:
    student, teacher, target = logits(3, batch=4, size=1.0)
    assert torch.autograd.gradcheck(lambda s: make().soft(s, teacher, target), (student.requires_grad_(),))


@pytest.mark.parametrize("name", RESPONSES)
def test_every_response_trains_by_name(name: str) -> None:
    torch.manual_seed(0)
    model, task = toy.model(), toy.task()
    ctx = ts.Context(task=task, teacher=toy.model(), example_inputs=toy.images(2, 0)[:1])
    report = ts.Distill(response=name, epochs=1, lr=1e-3).fit(model, ctx)
    assert {"loss_response", "loss_label"} <= report.history[0].keys()


@given(SEEDS)
def test_ignored_positions_do_not_count(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 4, CLASSES, generator=generator)
    target = torch.randint(CLASSES, (3, 4), generator=generator)
    target[0, 0], target[1:, 2:] = 1, -100
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 0] = False
    rows, _, labels = positions(student, teacher, target, mask, -100)
    kept = mask & (target != -100)
    assert torch.equal(rows, student[kept])
    assert torch.equal(labels, target[kept])
    pixels = positions(student.movedim(-1, 1), teacher.movedim(-1, 1), target, None, -100)
    assert torch.equal(pixels[1], teacher[target != -100])
    with pytest.raises(DistillError, match="no position"):
        positions(student, teacher, torch.full((3, 4), -100), None, -100)


def test_bad_values_are_refused() -> None:
    for make in (
        lambda: ts.DKD(temperature=0), lambda: ts.DIST(beta=-1), lambda: ts.DIST(beta=0, gamma=0),
        lambda: MSE(weight=float("nan")), lambda: ts.KD(kind="both"), lambda: ts.DKD(beta=float("inf")),
    ):  # fmt: skip
        with pytest.raises(DistillError, match="must be|nothing to learn"):
            make()
    with pytest.raises(DistillError, match="DKD.*class index.*got none"):
        ts.DKD().soft(torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_loss_that_needs_labels_says_so_before_training() -> None:
    def inputs_only(batch: Any) -> None:
        return None

    task = ts.Task(train=toy.task().train, val=toy.task().val, test=toy.task().test, metric=lambda *_: 0.0,
                   target=inputs_only)  # fmt: skip
    ctx = ts.Context(task=task, teacher=toy.model(), example_inputs=toy.images(2, 0)[:1])
    with pytest.raises(DistillError, match="DKD.*labels.*Task.target.*None"):
        ts.Distill(response="dkd", label_weight=0).check(ctx)


def regression() -> tuple[nn.Module, Tensor]:
    return nn.Linear(3, 1), torch.randn(4, 3)


def test_regression_distils_with_mse() -> None:
    model, x = regression()
    loss = MSE().soft(model(x), torch.zeros(4, 1))
    assert loss.item() == pytest.approx(model(x).square().mean().item())
