"""Distillation: a student learns from a teacher's outputs, and from how samples lie to one another."""

from torchslim.distill.losses import LOSSES
from torchslim.distill.relation import PKT, RKD, CorrelationCongruence, ListwiseRanking, SimilarityPreserving
from torchslim.distill.response import DIST, DKD, KD, MSE, kl_divergence
from torchslim.distill.step import Distill

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "LOSSES",
    "MSE",
    "PKT",
    "RKD",
    "CorrelationCongruence",
    "Distill",
    "ListwiseRanking",
    "SimilarityPreserving",
    "kl_divergence",
]
