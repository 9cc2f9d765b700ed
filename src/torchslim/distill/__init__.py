"""Distillation: a student learns from a teacher's outputs, its features, and its relations between samples."""

from typing import TYPE_CHECKING

from torchslim.core.lazy_names import lazy_names

if TYPE_CHECKING:
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

_HOMES = {
    "CRD": "losses.crd",
    "DIST": "losses.response",
    "DKD": "losses.response",
    "FSP": "losses.feature",
    "KD": "losses.response",
    "LOSSES": "losses.registry",
    "MSE": "losses.response",
    "PKT": "losses.relation",
    "RKD": "losses.relation",
    "VID": "losses.feature",
    "AttentionTransfer": "losses.feature",
    "CorrelationCongruence": "losses.relation",
    "Distill": "step",
    "Hint": "losses.feature",
    "ListwiseRanking": "losses.relation",
    "ReviewKD": "losses.review_kd",
    "SimilarityPreserving": "losses.relation",
    "TokenCosine": "losses.feature",
    "TokenMSE": "losses.feature",
    "kl_divergence": "losses.response",
}
if not TYPE_CHECKING:  # type checkers know the names from the imports above
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
