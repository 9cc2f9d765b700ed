"""Relation losses: against NumPy from the papers' formulas, and their laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchslim.distill import PKT, RKD, CorrelationCongruence, ListwiseRanking, SimilarityPreserving
from torchslim.distill.losses.relation import rkd_angle, rkd_distance
from torchslim.errors import DistillError

SEEDS = st.integers(0, 2**31 - 1)
MAKES = [RKD, SimilarityPreserving, PKT, CorrelationCongruence, ListwiseRanking]


def features(seed: int, batch: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 3, 2, dtype=torch.float64, generator=generator),
        torch.randn(batch, 10, dtype=torch.float64, generator=generator),
    )


def huber(x: Any) -> Any:
    return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)


def distances(x: Any) -> Any:
    return np.array([[math.dist(a, b) for b in x] for a in x])


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def np_rkd_distance(s: Any, t: Any) -> float:
    pair = [each / each[each > 0].mean() for each in map(distances, (s, t))]
    return float(huber(pair[0] - pair[1]).mean())


def np_rkd_angle(s: Any, t: Any) -> float:
    n, total = len(s), 0.0
    for i in range(n):
        for j in range(n):
            for k in range(n):
                cosines = []
                for x in (s, t):
                    one, two = x[i] - x[j], x[k] - x[j]
                    size = np.linalg.norm(one) * np.linalg.norm(two)
                    cosines.append(one @ two / size if size else 0.0)
                total += float(huber(cosines[0] - cosines[1]))
    return total / n**3


def np_similarity(s: Any, t: Any) -> float:
    pair = [unit(each @ each.T) for each in (s, t)]
    return float(np.square(pair[0] - pair[1]).sum() / len(s) ** 2)


def np_pkt(s: Any, t: Any) -> float:
    total = 0.0
    for i in range(len(s)):
        others = [j for j in range(len(s)) if j != i]
        p, q = (np.array([(unit(x)[i] @ unit(x)[j] + 1) / 2 for j in others]) for x in (t, s))
        p, q = p / p.sum(), q / q.sum()
        total += float((p * np.log(p / q)).sum())
    return total / len(s)


def np_congruence(s: Any, t: Any) -> float:
    def kernel(x: Any) -> Any:
        cosine = unit(x) @ unit(x).T
        return math.exp(-0.8) * (1 + 0.8 * cosine + 0.32 * cosine**2)

    return float(np.square(kernel(s) - kernel(t)).mean())


def np_ranking(s: Any, t: Any) -> float:
    scores, order, total = -3 * distances(unit(s)) ** 3, distances(unit(t)), 0.0
    for i in range(len(s)):
        places = sorted((j for j in range(len(s)) if j != i), key=lambda j: order[i, j])
        for place, j in enumerate(places):
            total -= scores[i, j] - math.log(sum(math.exp(scores[i, k]) for k in places[place:]))
    return total / len(s) / (len(s) - 1)


REFERENCES = [
    (rkd_distance, np_rkd_distance), (rkd_angle, np_rkd_angle),
    (SimilarityPreserving(weight=1.0), np_similarity), (PKT(weight=1.0), np_pkt),
    (CorrelationCongruence(weight=1.0), np_congruence), (ListwiseRanking(), np_ranking),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "reference"), REFERENCES)
@given(seed=SEEDS)
def test_losses_are_the_papers_formulas(loss: Any, reference: Any, seed: int) -> None:
    student, teacher = features(seed)
    expected = reference(student.flatten(1).numpy(), teacher.numpy())
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_by_hand() -> None:
    # a right angle at the first point against a straight line through it
    corner, line = torch.tensor([[0.0, 0], [1, 0], [0, 1]]), torch.tensor([[0.0], [1], [-1]])
    # cosines: at the first 0 against -1; at the others 1/sqrt(2) against 1; two of nine triples of each corner
    expected = 2 * (0.5 + 2 * 0.5 * (1 - math.sqrt(0.5)) ** 2) / 27
    assert rkd_angle(corner, line).item() == pytest.approx(expected, rel=1e-6)
    same = torch.tensor([[0.0], [1.0], [3.0]])
    assert rkd_distance(same * 7, same).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKES)
@given(seed=SEEDS)
def test_laws_of_every_relation(make: Any, seed: int) -> None:
    loss = make()
    student, teacher = features(seed)
    pupil, tutor = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    value = loss(pupil, tutor)
    value.backward()
    assert tutor.grad is None
    assert pupil.grad is not None
    assert torch.isfinite(pupil.grad).all()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert loss(student[order], teacher[order]).item() == pytest.approx(value.item(), rel=1e-6)
    turned = student.flatten(1) @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert loss(turned, teacher).item() == pytest.approx(value.item(), rel=1e-6)
    assert loss(student * 3, teacher).item() == pytest.approx(value.item(), rel=1e-6)
    if make is not ListwiseRanking:  # a likelihood is zero nowhere
        assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-9)
        assert value.item() > 0
    for dtype in (torch.float16, torch.bfloat16):
        half = loss((student * 20).to(dtype), (teacher * 20).to(dtype))
        assert half.dtype == torch.float32
        assert torch.isfinite(half)


@given(SEEDS)
def test_no_order_is_likelier_than_that_of_the_similarities_themselves(seed: int) -> None:
    student, teacher = features(seed)
    assert ListwiseRanking()(student, student) <= ListwiseRanking()(student, teacher) + 1e-9


@pytest.mark.parametrize("make", MAKES)
def test_gradients_of_every_relation(make: Any) -> None:
    student, teacher = features(1, batch=4)
    assert torch.autograd.gradcheck(lambda s: make()(s, teacher), (student.requires_grad_(),))


@pytest.mark.parametrize("make", MAKES)
def test_equal_samples_have_finite_gradients_and_one_alone_is_refused(make: Any) -> None:
    student = torch.zeros(4, 3, requires_grad=True)
    make()(student, torch.randn(4, 3)).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    with pytest.raises(DistillError, match="relation.*at least"):
        make()(torch.randn(1, 3), torch.randn(1, 3))
    with pytest.raises(DistillError, match="of 4 and 3 samples"):
        make()(torch.randn(4, 3), torch.randn(3, 3))
    with pytest.raises(DistillError, match="must be"):
        make(**{next(iter(make.__dataclass_fields__)): float("nan")})


def test_angles_hold_no_cube_of_the_batch() -> None:
    batch = 96
    student = torch.randn(batch, 8, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = rkd_angle(student, torch.randn(batch, 16))
    loss.backward()
    assert 0 < sum(saved.values()) < 4 * batch**2
