"""Contrastive distillation: a student's sample lies nearer to the teacher's of the same sample than to any other's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from torchslim.distill.align import Shape, wide
from torchslim.distill.response import check_positive
from torchslim.errors import DistillError


def contrast(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    samples: int,
    counts: Tensor | None = None,
    *,
    partition: float | Tensor = 1.0,
) -> Tensor:
    """Mean over the batch of -log h(positive) - the sum over negatives of log(1 - h(negative)).

    h = e^(anchor . other / temperature) / (e^(anchor . other / temperature) + partition * N / M), how likely the other
    is the anchor's own and not one of N negatives drawn of M samples.

    Args:
        anchor: unit vectors (batch, size).
        positive: of the other network, of the same samples, (batch, size).
        negatives: of the other network, of other samples, (batch, n, size).
        temperature: of the scores.
        samples: M, in the whole data set.
        counts: True where a negative counts, (batch, n); N is how many do. All, if None.
        partition: the constant that the scores are divided by; 1 in the paper.

    Returns: ().
    Source: Tian, Krishnan & Isola 2020, arXiv:1910.10699, section 3.1, eq. 17-19 of the memory-bank form.
    """
    if anchor.shape != positive.shape or negatives.dim() != 3 or negatives.shape[::2] != anchor.shape:
        raise DistillError(
            "contrast takes an anchor and a positive of (batch, size) and negatives of (batch, n, size), got "
            f"{tuple(anchor.shape)}, {tuple(positive.shape)} and {tuple(negatives.shape)}"
        )
    check_positive("temperature", temperature)
    anchor, positive, negatives = wide(anchor), wide(positive), wide(negatives)
    near = (anchor * positive).sum(1) / temperature
    far = _scores(anchor, negatives, temperature)
    level = torch.as_tensor(partition, dtype=near.dtype, device=near.device).log()
    return _estimation(near, far, level - math.log(samples), counts)
