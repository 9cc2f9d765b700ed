"""The distillation losses by name, and how one is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchslim.distill.response import DIST, DKD, KD, MSE, ResponseLoss
from torchslim.errors import DistillError
from torchslim.steps import resolve

Response = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(student logits, teacher logits, labels or None) -> scalar."""

LOSSES: Mapping[str, type] = {"kd": KD, "dkd": DKD, "dist": DIST, "mse": MSE}


def find_response(response: str | ResponseLoss | Response) -> ResponseLoss | Response:
    """A response loss as it is, by name, or by "package.module:name"."""
    found: Any = response
    if isinstance(response, str):
        if response in LOSSES:
            found = LOSSES[response]()
        elif ":" in response:
            found = resolve(response, "response", DistillError)
            found = found() if isinstance(found, type) else found
        else:
            raise DistillError(
                f"response {response!r} is not known; one of {', '.join(LOSSES)}, or 'package.module:name'"
            )
    if isinstance(found, type) or not callable(found):
        raise DistillError(
            f"response must be KD(...) or a function (student logits, teacher logits, labels) -> scalar, got {found!r}"
        )
    made: ResponseLoss | Response = found
    return made
