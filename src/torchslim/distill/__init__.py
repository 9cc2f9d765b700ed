"""Distillation: a student learns from a teacher's outputs, its features, and its relations between samples."""

from torchslim.distill.losses.crd import CRD
from torchslim.distill.losses.feature import FSP, VID, AttentionTransfer, Hint, TokenCosine, TokenMSE
from torchslim.distill.losses.registry import LOSSES
from torchslim.distill.losses.relation import PKT, RKD, CorrelationCongruence, ListwiseRanking, SimilarityPreserving
from torchslim.distill.losses.response import DIST, DKD, KD, MSE, kl_divergence
from torchslim.distill.losses.review_kd import ReviewKD
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
