"""Logits of -inf, with which masks rule out classes: losses take the limit of ever lower logits, or raise an error.

The limit is taken of student and teacher together. Where only one of them is -inf, the limit may be infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from torchslim.errors import DistillError


def log_probabilities(logits: Tensor) -> Tensor:
    """`log_softmax` over dimension 1; a row whose classes are all ruled out is -inf and has no gradient.

    Shapes: (batch, classes, ...) -> the same.
    """
    empty = torch.isneginf(logits).all(1, keepdim=True)
    return functional.log_softmax(logits.masked_fill(empty, 0.0), dim=1).masked_fill(empty, -torch.inf)


def divergence_terms(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """Terms p * (log p - log q) of the divergence, p the teacher's and q the student's probability; 0 where p is 0.

    Shapes: any, the same -> the same.

    Raises:
        DistillError: the student rules out a class that the teacher does not, so the divergence is infinite.
    """
    ruled_out = torch.isneginf(log_teacher)
    wrong = torch.isneginf(log_student) & ~ruled_out
    if bool(wrong.any()):
        raise DistillError(
            f"the student gives -inf to {int(wrong.sum())} classes that the teacher does not rule out, so their "
            "divergence is infinite; give both the same mask, or a large negative number such as -1e4 in place of -inf"
        )
    # both sides are replaced first: masking only the product would give NaN gradients
    log_student, log_teacher = (logs.masked_fill(ruled_out, 0.0) for logs in (log_student, log_teacher))
    return (log_teacher.exp() * (log_teacher - log_student)).masked_fill(ruled_out, 0.0)


def log_sum(logs: Tensor) -> Tensor:
    """`logsumexp` over dimension 1; a row of only -inf gives -inf and has no gradient: (batch, n) -> (batch,)."""
    empty = torch.isneginf(logs).all(1)
    return logs.masked_fill(empty[:, None], 0.0).logsumexp(1).masked_fill(empty, -torch.inf)


def comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher with 0 in place of the infinities that they share.

    Where the shapes differ, every infinity of each side becomes 0.

    Raises:
        DistillError: a value is infinite on one side only, so the difference is infinite.
    """
    shared = torch.isinf(student)
    if student.shape != teacher.shape:
        return student.masked_fill(shared, 0.0), teacher.masked_fill(torch.isinf(teacher), 0.0)
    wrong = (shared | torch.isinf(teacher)) & (student != teacher)
    if bool(wrong.any()):
        raise DistillError(
            f"{int(wrong.sum())} values are infinite in the student or the teacher and not in the other, so their "
            "difference is infinite; give both the same mask, or compare with KD(), which accepts a teacher's -inf"
        )
    return student.masked_fill(shared, 0.0), teacher.masked_fill(shared, 0.0)
