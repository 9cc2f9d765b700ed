"""The distillation losses by name, and how one is found."""

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
"""(student logits, teacher logits, labels or None) -> scalar."""

Feature = FeatureLoss | Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(student features, teacher features) -> scalar; a (batch, channels, *positions) for each tap."""

Relation = RelationLoss | CRD | Callable[[Tensor, Tensor], Tensor]
"""(student, teacher) -> scalar; the features (batch, ...) of one tap, whose sizes may differ."""

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
    """A loss of a kind as it is, by name, or by "package.module:name".

    Args:
        loss: a loss, a function, or a name.
        kind: "response", "feature" or "relation".
    """
    known = KINDS[kind]
    found = loss
    if isinstance(loss, str):
        if loss in known:
            found = known[loss]()
        elif ":" in loss:
            found = resolve(loss, kind, DistillError)
            with foreign(f"{kind} {loss!r} cannot be made", DistillError):
                found = found() if isinstance(found, type) else found
        else:
            other = next((name for name, each in KINDS.items() if loss in each), None)
            hint = f"; it is a {other} loss: give {other}={loss!r}" if other else ""
            raise DistillError(
                f"{kind} {loss!r} is not known{hint}; one of {', '.join(known)}, or 'package.module:name'"
            )
    example = next(iter(known.values())).__name__
    if type(found) in known.values():
        return found
    if isinstance(found, type) or not callable(found):
        raise DistillError(f"{kind} must be {example}(...) or a function {TAKES[kind]}, got {shown(found)}")
    other = next((name for name, each in KINDS.items() if name != kind and type(found) in each.values()), None)
    if other is not None:
        raise DistillError(f"{type(found).__name__} is a {other} loss; give {other}={type(found).__name__}(...)")
    return found


def loss_name(loss: Any) -> str:
    """As it is logged: its registered name, or a function's or class's own."""
    names = {kind: name for name, kind in LOSSES.items()}
    own = getattr(loss, "__name__", type(loss).__name__).lower()
    return names.get(type(loss), own if own.isidentifier() else "own")


def find_response(response: Any) -> ResponseLoss | Response:
    """A response loss as it is, by name, or by "package.module:name"."""
    found: ResponseLoss | Response = find_loss(response, "response")
    return found
