"""Logits of -inf, by which masks rule classes out: losses take the limit of ever lower logits, or say that it has none.

The limit is that of student and teacher together; where only one of them is infinite, it may be infinite, too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from torchslim.errors import DistillError


def log_probabilities(logits: Tensor) -> Tensor:
    """`log_softmax` over dimension 1; a row whose classes are all ruled out is -inf, without a gradient.

    Shapes: (batch, classes, ...) -> the same.
    """
    empty = torch.isneginf(logits).all(1, keepdim=True)
    return functional.log_softmax(logits.masked_fill(empty, 0.0), dim=1).masked_fill(empty, -torch.inf)


def divergence_terms(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """p * (log p - log q) of log probabilities, p the teacher's; 0 where p is 0.

    Shapes: any, the same -> the same.

    Raises:
        DistillError: the student rules out what the teacher does not, so that the divergence is infinite.
    """
    ruled_out = torch.isneginf(log_teacher)
    wrong = torch.isneginf(log_student) & ~ruled_out
    if bool(wrong.any()):
        raise DistillError(
            f"the student gives -inf to {int(wrong.sum())} classes that the teacher does not rule out, so their "
            "divergence is infinite; give both the same mask, or a large negative number such as -1e4 in place of -inf"
        )
    # both sides are replaced first: the gradient of what is not taken would be NaN
    log_student, log_teacher = (each.masked_fill(ruled_out, 0.0) for each in (log_student, log_teacher))
    return (log_teacher.exp() * (log_teacher - log_student)).masked_fill(ruled_out, 0.0)


def log_sum(logs: Tensor) -> Tensor:
    """`logsumexp` over dimension 1; of nothing but -inf it is -inf, without a gradient: (batch, n) -> (batch,)."""
    empty = torch.isneginf(logs).all(1)
    return logs.masked_fill(empty[:, None], 0.0).logsumexp(1).masked_fill(empty, -torch.inf)


def comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both with 0 in place of infinities that they share; of different shapes, of those that each has.

    Raises:
        DistillError: an infinity of one side is finite on the other, so that the difference is infinite.
    """
    shared = torch.isinf(student)
    if student.shape != teacher.shape:
        return student.masked_fill(shared, 0.0), teacher.masked_fill(torch.isinf(teacher), 0.0)
    wrong = (shared | torch.isinf(teacher)) & (student != teacher)
    if bool(wrong.any()):
        raise DistillError(
            f"{int(wrong.sum())} values are infinite in the student or the teacher and not in the other, so their "
            "difference is infinite; give both the same mask, or compare with KD(), which a teacher's -inf is fine for"
        )
    return student.masked_fill(shared, 0.0), teacher.masked_fill(shared, 0.0)
