"""Distillation: a student learns from a teacher's outputs, its features, and from how samples lie to one another."""

from torchslim.distill.contrast import CRD
from torchslim.distill.feature import FSP, VID, AttentionTransfer, Hint, TokenCosine, TokenMSE
from torchslim.distill.losses import LOSSES
from torchslim.distill.relation import PKT, RKD, CorrelationCongruence, ListwiseRanking, SimilarityPreserving
from torchslim.distill.response import DIST, DKD, KD, MSE, kl_divergence
from torchslim.distill.review import ReviewKD
from torchslim.distill.step import Distill

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "FSP",
    "KD",
    "LOSSES",
    "MSE",
    "PKT",
    "RKD",
    "VID",
    "AttentionTransfer",
    "CorrelationCongruence",
    "Distill",
    "Hint",
    "ListwiseRanking",
    "ReviewKD",
    "SimilarityPreserving",
    "TokenCosine",
    "TokenMSE",
    "kl_divergence",
]
