"""Registry of the distillation losses by name, and functions that look up a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchslim.core.checks import shown
from torchslim.core.imports import foreign, resolve
from torchslim.distill.losses.crd import CRD
from torchslim.distill.losses.feature import (
    FSP,
    VID,
    AttentionTransfer,
    FeatureLoss,
    Hint,
    TokenCosine,
    TokenMSE,
)
from torchslim.distill.losses.relation import (
    PKT,
    RKD,
    CorrelationCongruence,
    ListwiseRanking,
    RelationLoss,
    SimilarityPreserving,
)
from torchslim.distill.losses.response import DIST, DKD, KD, MSE, ResponseLoss
from torchslim.distill.losses.review_kd import ReviewKD
from torchslim.errors import DistillError

Response = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A response loss: (student logits, teacher logits, labels or None) -> scalar."""

Feature = FeatureLoss | Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A feature loss: (student features, teacher features) -> scalar; one (batch, channels, *positions) per tap."""

Relation = RelationLoss | CRD | Callable[[Tensor, Tensor], Tensor]
"""A relation loss: (student, teacher) -> scalar; features (batch, ...) of one tap, whose sizes may differ."""

RESPONSES: Mapping[str, type] = {"kd": KD, "dkd": DKD, "dist": DIST, "mse": MSE}
FEATURES: Mapping[str, type] = {
    "hint": Hint,
    "attention_transfer": AttentionTransfer,
    "fsp": FSP,
    "vid": VID,
    "review_kd": ReviewKD,
    "token_mse": TokenMSE,
    "token_cosine": TokenCosine,
}
RELATIONS: Mapping[str, type] = {
    "rkd": RKD,
    "similarity_preserving": SimilarityPreserving,
    "pkt": PKT,
    "correlation_congruence": CorrelationCongruence,
    "crd": CRD,
    "listwise_ranking": ListwiseRanking,
}
LOSSES: Mapping[str, type] = {**RESPONSES, **FEATURES, **RELATIONS}
KINDS = {"response": RESPONSES, "feature": FEATURES, "relation": RELATIONS}
TAKES = {
    "response": "(student logits, teacher logits, labels) -> scalar",
    "feature": "(student features, teacher features) -> scalar",
    "relation": "(student features, teacher features) -> scalar",
}


def find_loss(loss: Any, kind: str) -> Any:
    """Loss of a kind, given as itself, by name, or by "package.module:name".

    Args:
        loss: a loss, a function, or a name.
        kind: "response", "feature" or "relation".
    """
    losses = KINDS[kind]
    resolved = loss
    if isinstance(loss, str):
        if loss in losses:
            resolved = losses[loss]()
        elif ":" in loss:
            resolved = resolve(loss, kind, DistillError)
            with foreign(f"{kind} {loss!r} cannot be made", DistillError):
                resolved = resolved() if isinstance(resolved, type) else resolved
        else:
            other = next((name for name, registered in KINDS.items() if loss in registered), None)
            hint = f"; it is a {other} loss: give {other}={loss!r}" if other else ""
            raise DistillError(
                f"{kind} {loss!r} is not known{hint}; one of {', '.join(losses)}, or 'package.module:name'"
            )
    example = next(iter(losses.values())).__name__
    if type(resolved) in losses.values():
        return resolved
    if isinstance(resolved, type) or not callable(resolved):
        raise DistillError(f"{kind} must be {example}(...) or a function {TAKES[kind]}, got {shown(resolved)}")
    other = next(
        (name for name, registered in KINDS.items() if name != kind and type(resolved) in registered.values()), None
    )
    if other is not None:
        raise DistillError(f"{type(resolved).__name__} is a {other} loss; give {other}={type(resolved).__name__}(...)")
    return resolved


def loss_name(loss: Any) -> str:
    """Name of a loss in logs: the registered one, or that of its function or class."""
    names = {loss_type: name for name, loss_type in LOSSES.items()}
    own = getattr(loss, "__name__", type(loss).__name__).lower()
    return names.get(type(loss), own if own.isidentifier() else "own")


def find_response(response: Any) -> ResponseLoss | Response:
    """Response loss, given as itself, by name, or by "package.module:name"."""
    loss: ResponseLoss | Response = find_loss(response, "response")
    return loss
