"""Classes that a mask rules out with -inf: losses and measures are those of the other classes, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from torchslim.analysis.measures import LARGEST_NATS, OutputGauge
from torchslim.core.infinities import difference, spoiled
from torchslim.distill.ruled_out import comparable, divergence_terms
from torchslim.errors import DistillError

CLASSES = 6
LOSSES: dict[str, Any] = {
    "KD": ts.KD(),
    "KD standardized": ts.KD(standardize=True),
    "KD of labels": ts.KD(kind="labels"),
    "DKD": ts.DKD(),
    "DKD standardized": ts.DKD(standardize=True),
    "MSE": ts.distill.MSE(),
}
RELATIONS = (
    ts.distill.RKD(), ts.distill.SimilarityPreserving(), ts.distill.PKT(), ts.distill.CorrelationCongruence(),
    ts.distill.ListwiseRanking(),
)  # fmt: skip


def logits(seed: int) -> Tensor:
    return torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), legal=st.integers(2, CLASSES - 1), name=st.sampled_from(sorted(LOSSES)))
def test_classes_that_both_rule_out_do_not_count(seed: int, legal: int, name: str) -> None:
    loss, student, teacher = LOSSES[name], logits(seed).requires_grad_(), logits(seed + 1)
    target = torch.arange(5) % legal
    mask = torch.zeros(CLASSES, dtype=torch.float64)
    mask[legal:] = -math.inf
    value = loss.soft(student + mask, teacher + mask, target)
    (gradient,) = torch.autograd.grad(value, student)
    share = legal / CLASSES if name == "MSE" else 1.0  # a mean over all classes, of which the masked ones differ by 0
    wanted = share * loss.soft(student[:, :legal], teacher[:, :legal], target)
    (slope,) = torch.autograd.grad(wanted, student)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("name", [*LOSSES, "DIST"])
def test_rows_without_any_class_have_finite_gradients(name: str) -> None:
    loss = LOSSES.get(name, ts.DIST())
    student = logits(0).requires_grad_()
    mask = torch.zeros(5, CLASSES, dtype=torch.float64)
    mask[1] = mask[2, 1:] = -math.inf
    value = loss.soft(student + mask, logits(1) + mask, torch.zeros(5, dtype=torch.long))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_an_equal_student_has_no_distance() -> None:
    masked = logits(0)
    masked[:, 4:] = -math.inf
    for loss in (*LOSSES.values(), ts.DIST()):
        assert float(loss.soft(masked, masked, torch.zeros(5, dtype=torch.long))) == pytest.approx(0, abs=1e-9)


def test_what_the_teacher_alone_rules_out_is_learned() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    teacher[:, 5] = -math.inf
    value = ts.KD(alpha=1.0, temperature=1.0).soft(student, teacher)
    wanted = (teacher[:, :5].softmax(1) * (teacher[:, :5].log_softmax(1) - student.log_softmax(1)[:, :5])).sum(1).mean()
    torch.testing.assert_close(value, wanted)
    value.backward()
    assert student.grad is not None
    assert (student.grad[:, 5] > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_student_alone_rules_out_is_said(name: str) -> None:
    student = logits(0)
    student[:, 5] = -math.inf
    with pytest.raises(DistillError, match="infinite"):
        LOSSES[name].soft(student, logits(1), torch.zeros(5, dtype=torch.long))


def test_numbers_that_are_none_are_not_hidden() -> None:
    broken = torch.full((1, 3), math.nan)
    assert divergence_terms(broken, broken).isnan().all()
    assert comparable(broken, broken)[0].isnan().all()


@pytest.mark.parametrize("loss", RELATIONS, ids=lambda each: type(each).__name__)
def test_relations_leave_out_masked_coordinates(loss: Callable[..., Tensor]) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    mask = torch.tensor([0.0, 0, 0, 0, -math.inf, -math.inf], dtype=torch.float64)
    value = loss(student + mask, teacher + mask)
    torch.testing.assert_close(value, loss(student[:, :4], teacher[:, :4]))
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_infinities_in_the_same_places_are_no_difference() -> None:
    one = torch.tensor([1.0, -math.inf, math.inf, math.nan, 2.0])
    two = torch.tensor([1.5, -math.inf, math.inf, math.nan, 2.0])
    assert difference(one, two).tolist() == [-0.5, 0, 0, 0, 0]
    assert spoiled([one], [two]) == 0
    assert spoiled([one], [torch.tensor([math.nan, -math.inf, -math.inf, math.nan, 2.0])]) == 2
    assert spoiled([one[:2]], [one]) == 3  # nothing to compare with
    assert ts.quantize.sqnr(one[:3], two[:3]) == pytest.approx(10 * math.log10(1 / 0.25))
    assert ts.quantize.sqnr(one[:2], torch.tensor([1.0, 0.0])) == -math.inf


class Policy(nn.Module):
    """Illegal actions are -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.broken = False

    def forward(self, x: Tensor, legal: Tensor) -> Tensor:
        answer = self.body(x).masked_fill(~legal, -math.inf)
        return answer * math.nan if self.broken else answer


def policy_data() -> list[dict[str, Tensor]]:
    legal = torch.tensor([True, True, True, False]).expand(8, 4)
    return [{"x": torch.randn(8, 8), "legal": legal, "labels": torch.randint(3, (8,))} for _ in range(2)]


@pytest.mark.parametrize("measure", ["kl", "sqnr"])
def test_measures_see_a_change_of_the_legal_actions_alone(measure: Any) -> None:
    torch.manual_seed(0)
    data, model = policy_data(), Policy().eval()

    class Runs:
        def outputs(self, change: Any = None) -> Any:
            shift = 0.0 if change is None else change
            with torch.no_grad():
                return iter([model(each["x"], each["legal"]) * (1 + shift) for each in data])

        def answer(self, change: Any, inputs: Any) -> Any:
            raise AssertionError("not asked")

    gauge = OutputGauge(measure, ts.Task(val=data, metric="accuracy"), data)
    gauge.start(Runs())
    some, none = gauge.value(Runs(), 0.1), gauge.value(Runs(), 0.0)
    assert math.isfinite(some)
    assert none < some if measure == "kl" else none > some
    if measure == "kl":
        assert none == pytest.approx(0)
        assert gauge.value(Runs(), math.nan) == LARGEST_NATS


@pytest.mark.slow
def test_a_run_keeps_the_originals_infinities_and_refuses_others() -> None:
    torch.manual_seed(0)
    data = policy_data()
    task = ts.Task(train=data, val=data, metric="accuracy")
    result = ts.compress(Policy(), task, [ts.Distill(epochs=1)], runtime="eager")
    assert len(result.run["rows"]) == 3

    @ts_step
    def breaking(model: nn.Module) -> nn.Module:
        model.broken = True  # type: ignore[assignment]
        return model

    with pytest.raises(ts.TorchslimError, match="'breaking'.*32 values"):
        ts.compress(Policy(), task, [breaking], runtime="eager")


def ts_step(change: Callable[[nn.Module], nn.Module]) -> Any:
    """A step that changes a model."""

    class Breaking:
        accepts = produces = ts.Form.MODULE

        def check(self, ctx: ts.Context) -> None:
            """Nothing can be known."""

        def __call__(self, model: nn.Module, ctx: ts.Context) -> ts.Outcome:
            return ts.Outcome(model=change(model))

    return Breaking()
