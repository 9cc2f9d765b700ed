"""Contrastive distillation: against NumPy from the paper's formula, and the laws of its banks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.support.distributed import two_processes
from torchslim.distill.losses.crd import CRD, contrast
from torchslim.errors import DistillError

SEEDS = st.integers(0, 2**31 - 1)


def units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def built(samples: int = 6, **settings: Any) -> Any:
    torch.manual_seed(1)
    return CRD(**{"size": 4, **settings}).build((3, 2, 2), (5,), samples).double()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator),
        torch.randn(2, 5, dtype=torch.float64, generator=generator),
    )


def np_contrast(a: Any, p: Any, n: Any, tau: float, samples: int, counts: Any, constant: float = 1.0) -> float:
    total = 0.0
    for row in range(len(a)):
        others = n[row][counts[row]]
        ratio = max(len(others), 1) / samples

        def h(other: Any, row: int = row, ratio: float = ratio) -> float:
            score = math.exp(a[row] @ other / tau) / constant
            return score / (score + ratio)

        total -= math.log(h(p[row])) + sum(math.log(1 - h(other)) for other in others)
    return total / len(a)


@given(SEEDS)
def test_the_term_is_the_papers_formula(seed: int) -> None:
    anchor, positive, negatives = units(3, 4, seed=seed), units(3, 4, seed=seed + 1), units(3, 5, 4, seed=seed + 2)
    counts = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.7
    arrays = [each.numpy() for each in (anchor, positive, negatives)]
    for chosen in (None, counts):
        which = np.ones((3, 5), bool) if chosen is None else chosen.numpy()
        expected = np_contrast(*arrays, 0.3, 100, which)
        assert contrast(anchor, positive, negatives, 0.3, 100, chosen).item() == pytest.approx(expected, rel=1e-9)
        expected = np_contrast(*arrays, 0.3, 100, which, 7.0)
        value = contrast(anchor, positive, negatives, 0.3, 100, chosen, partition=7.0)
        assert value.item() == pytest.approx(expected, rel=1e-9)


def test_by_hand() -> None:
    # one negative of two samples, at a right angle: h = 1 / (1 + 1/2); the positive is the anchor: h = e / (e + 1/2)
    anchor, negative = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]]])
    expected = -math.log(math.e / (math.e + 0.5)) - math.log(1 - 1 / 1.5)
    assert contrast(anchor, anchor, negative, 1.0, 2).item() == pytest.approx(expected)


@given(SEEDS)
def test_laws_of_the_term(seed: int) -> None:
    anchor, positive, negatives = units(3, 4, seed=seed), units(3, 4, seed=seed + 1), units(3, 5, 4, seed=seed + 2)
    value = contrast(anchor, positive, negatives, 0.1, 50).item()
    assert value >= contrast(anchor, anchor, negatives, 0.1, 50).item()  # nothing is nearer than itself
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    turned = contrast(anchor[order], positive[order], negatives[order][:, [4, 2, 0, 1, 3]], 0.1, 50)
    assert turned.item() == pytest.approx(value, rel=1e-9)


def test_the_term_is_stable() -> None:
    anchor = units(2, 4).float().requires_grad_()
    for sign in (1, -1):
        value = contrast(anchor, sign * anchor.detach(), -sign * anchor.detach()[:, None], 0.001, 10**9)
        value.backward()
        assert torch.isfinite(value)
        assert anchor.grad is not None
        assert torch.isfinite(anchor.grad).all()
    nothing = contrast(anchor, anchor, anchor[:, None], 0.07, 10, torch.zeros(2, 1, dtype=torch.bool))
    assert torch.isfinite(nothing)
    for dtype in (torch.float16, torch.bfloat16):
        half = anchor.detach().to(dtype)
        assert contrast(half, half, half[:, None], 0.07, 10).dtype == torch.float32


def np_embedded(layer: Any, x: Any) -> Any:
    x = x.reshape(*x.shape[:2], -1).mean(2) @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@given(seed=SEEDS)
def test_the_loss_is_of_both_directions_and_of_other_classes(training: bool, seed: int) -> None:
    module = built(temperature=0.5, weight=2.0).train(training)
    module.labels.copy_(torch.tensor([-1, 0, 1, 2, 1, 0]))
    before = {name: each.clone().numpy() for name, each in module.named_buffers()}
    student, teacher = batch(seed)
    index, target = torch.tensor([4, 0]), torch.tensor([1, -1])
    value = module(student, teacher, index, target).item()
    pair = [np_embedded(module.embed_student, student.numpy()), np_embedded(module.embed_teacher, teacher.numpy())]
    others = [[0, 1, 2, 3, 5], [1, 2, 3, 4, 5]]
    counts = np.array([[True, True, False, True, True], [True] * 5])  # sample 2 is of sample 4's class
    expected = 0.0
    for anchor, positive, bank in ((0, 1, "bank_teacher"), (1, 0, "bank_student")):
        negatives = before[bank][others]
        constant = 6 * np.exp(np.einsum("bd,bnd->bn", pair[anchor], negatives) / 0.5).mean()
        expected += 2 * np_contrast(pair[anchor], pair[positive], negatives, 0.5, 6, counts, constant)
    assert value == pytest.approx(expected, rel=1e-9)
    for name, new in zip(("bank_student", "bank_teacher"), pair, strict=True):
        bank = before[name].copy()
        if training:
            moved = 0.5 * bank[[4, 0]] + 0.5 * new
            bank[[4, 0]] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        np.testing.assert_allclose(getattr(module, name).numpy(), bank, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-6)


def test_labels_and_the_constant_are_remembered() -> None:
    module = built()
    student, teacher = batch()
    module(student, teacher, torch.tensor([4, 0]), torch.tensor([7, 8]))
    level = module.level.clone()
    assert torch.isfinite(level).all()
    module(student * 2, -teacher, torch.tensor([4, 1]))
    assert module.labels.tolist() == [8, -1, -1, -1, 7, -1]
    assert torch.equal(module.level, level)
    other = built()
    other.load_state_dict(module.state_dict())
    one, two = (each.eval()(student, teacher, torch.tensor([4, 0])).item() for each in (module, other))
    assert one == two
    # known labels tell without a target, too: with all of one class there is nothing to contrast with
    module.labels.fill_(3)
    left, right = (np_embedded(layer, each.numpy()) for layer, each in
                   ((module.embed_student, student), (module.embed_teacher, teacher)))  # fmt: skip
    alone = [np.mean(np.log1p(np.exp(float(each) - (left * right).sum(1) / 0.07))) for each in level]
    assert module(student, teacher, torch.tensor([4, 0])).item() == pytest.approx(0.8 * sum(alone), rel=1e-6)


def test_banks_begin_alike_and_draws_are_of_other_samples() -> None:
    one, two = CRD(size=8).build((3,), (5,), 50), CRD(size=8).build((3,), (5,), 50)
    assert torch.equal(one.bank_student, two.bank_student)
    assert not torch.equal(one.bank_student, one.bank_teacher)
    assert not [name for name, _ in one.named_parameters() if "embed" not in name]
    module = CRD(size=8, negatives=2).build((3,), (5,), 4)
    drawn = torch.cat([module.draw_others(torch.device("cpu")) for _ in range(300)])
    assert all(100 < each < 200 for each in drawn.bincount(minlength=4).tolist())
    assert CRD(size=8).build((3,), (5,), 2).draw_others(torch.device("cpu")).tolist() == [0, 1]


def test_a_sample_is_no_negative_of_itself() -> None:
    module = built().eval()
    student, teacher = batch()
    index = torch.tensor([4, 4])
    value = module(student, teacher, index).item()
    for bank in (module.bank_student, module.bank_teacher):
        bank[4] = -bank[4]
    assert module(student, teacher, index).item() == value
    module.bank_teacher[3] = -module.bank_teacher[3]
    assert module(student, teacher, index).item() != value


def test_a_sample_that_comes_twice_is_learned_once() -> None:
    module = built(momentum=0.0)
    student, teacher = batch()
    module(student, teacher, torch.tensor([3, 3]))
    new = np_embedded(module.embed_teacher, teacher.numpy()).mean(0)
    np.testing.assert_allclose(module.bank_teacher[3].numpy(), new / np.linalg.norm(new), atol=1e-9)


def test_gradients() -> None:
    module = built().eval()
    module.level.fill_(0.3)  # the constant is one, also for the gradient
    student, teacher = batch()
    index = torch.tensor([1, 5])
    assert torch.autograd.gradcheck(lambda each: module(each, teacher, index), (student.requires_grad_(),))
    module.train()
    teacher.requires_grad_()
    module(student, teacher, index).backward()
    assert teacher.grad is None
    learned = [student, *module.parameters()]
    assert all(each.grad is not None and each.grad.any() and torch.isfinite(each.grad).all() for each in learned)
    assert len(learned) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    module = CRD(negatives=8).build((3, 4), (5, 2, 2), 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student, teacher = torch.randn(1, 3, 4).to(dtype) * 1000, torch.randn(1, 5, 2, 2).to(dtype) * 1000
        value = module(student, teacher, torch.tensor([19]))
    assert value.dtype == torch.float32
    assert torch.isfinite(value)


def test_the_student_comes_to_tell_samples_apart() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(32, 6), nn.Linear(6, 8)
    module: Any = CRD(size=16, negatives=31).build((8,), (6,), 32)
    optimizer = torch.optim.Adam([*student.parameters(), *module.parameters()], lr=0.01)
    values = []
    for _ in range(60):
        index = torch.randperm(32)[:16]
        loss = module(student(teacher[index]), teacher[index], index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])
    with torch.no_grad():
        left, right = module.embed_student(student(teacher)), module.embed_teacher(teacher)
        nearest = (functional.normalize(left, dim=1) @ functional.normalize(right, dim=1).T).argmax(1)
    assert (nearest == torch.arange(32)).float().mean() > 0.5


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    module = built()
    student, teacher = batch(rank)
    module(student, teacher, torch.tensor([2 * rank, 2 * rank + 1]), torch.tensor([rank, 5]))
    torch.save(dict(module.named_buffers()), f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # the store is the first one's: it must not leave before the others
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_banks_of_all_processes_stay_equal(tmp_path: Any) -> None:
    two_processes(_worker, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, each in one.items():
        assert torch.equal(each, two[name]), name
    assert one["labels"].tolist() == [0, 5, 1, 5, -1, -1]
    alone = built()
    for rank in (0, 1):
        alone(*batch(rank), torch.tensor([2 * rank, 2 * rank + 1]))
    torch.testing.assert_close(one["bank_student"], alone.bank_student)


def test_what_cannot_work_is_refused() -> None:
    for settings in ({"weight": 0.0}, {"temperature": -1.0}, {"size": 0}, {"negatives": 1.5}, {"momentum": 1.0}):
        with pytest.raises(DistillError, match=f"{next(iter(settings))} must be"):
            CRD(**settings)
    with pytest.raises(DistillError, match="two samples.*got 1"):
        CRD().build((3,), (5,), 1)
    with pytest.raises(DistillError, match=r"\(3, 0\).*\(5,\)"):
        CRD().build((3, 0), (5,), 10)
    module = built()
    student, teacher = batch()
    for index in ([0, 6], [-1, 0]):
        with pytest.raises(DistillError, match=rf"in \[0, 6\).*got {min(index)} to {max(index)}"):
            module(student, teacher, torch.tensor(index))
    with pytest.raises(DistillError, match="index.*whole number"):
        module(student, teacher, torch.tensor([0.0, 1.0]))
    with pytest.raises(DistillError, match="target.*whole number"):
        module(student, teacher, torch.tensor([0, 1]), torch.tensor([0]))
    with pytest.raises(DistillError, match=r"\(2, 3\) and \(2, 5\), got \(2, 5\) and \(2, 3\)"):
        module(teacher, student, torch.tensor([0, 1]))
    with pytest.raises(DistillError, match=r"\(2, 4\), \(2, 4\) and \(2, 4\)"):
        contrast(units(2, 4), units(2, 4), units(2, 4), 0.07, 10)
