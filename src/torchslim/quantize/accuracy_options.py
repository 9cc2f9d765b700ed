"""Options for accuracy: light, so that a recipe can be checked without loading what carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchslim.core.checks import check_fields
from torchslim.errors import QuantizeError

Rounding = Literal["nearest", "gptq", "adaround"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "gptq", "adaround")
Accuracy = Literal["plain", "best"]
ACCURACIES: tuple[Accuracy, ...] = ("plain", "best")
BEST: Mapping[str, Any] = {"rounding": "gptq", "correct_biases": True}
"""What `accuracy="best"` turns on: it brought the outputs of the models of `benchmarks/accuracy.md` nearer to float."""
AFTERWARDS = ("rounding", "correct_biases")  # of no use where the weights are trained on the grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Helpers:
    """Options for accuracy.

    Args:
        equalize: even out channels between layers (Nagel 2019); before observing.
        smooth: move outliers behind norms into weights (SmoothQuant): how much of them, 0 to 1; None: not.
        rounding: of weights: to "nearest", by "gptq" or "adaround"; after observing.
        correct_biases: take back the mean error of the outputs (Nagel 2019); last.
    """

    equalize: bool = False
    smooth: float | None = None
    rounding: Rounding = "nearest"
    correct_biases: bool = False

    def __post_init__(self) -> None:
        check_fields(self, QuantizeError)
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise QuantizeError(f"smooth must be between 0 and 1, got {self.smooth}")
        if self.rounding not in ROUNDINGS:
            raise QuantizeError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")

    @property
    def needs_data(self) -> bool:
        """Are calibration batches looked at, whatever the scheme?"""
        return self.smooth is not None or self.afterwards

    @property
    def afterwards(self) -> bool:
        """Is anything done once the ranges are observed?"""
        return self.rounding != "nearest" or self.correct_biases


def chosen_helpers(accuracy: Accuracy, given: Mapping[str, Any], *, trained: bool) -> Helpers:
    """What `accuracy` stands for, with what is given in its place.

    Args:
        accuracy: "plain", no helper, or "best".
        given: fields of `Helpers`; None: as `accuracy` says. `smooth` may be "off".
        trained: are the weights trained on the grid afterwards? Then their rounding is left to the training.
    """
    if accuracy not in ACCURACIES:
        raise QuantizeError(f"accuracy must be one of {', '.join(ACCURACIES)}, got {accuracy!r}")
    best = {name: value for name, value in BEST.items() if not (trained and name in AFTERWARDS)}
    fields = (best if accuracy == "best" else {}) | {name: value for name, value in given.items() if value is not None}
    if fields.get("smooth") == "off":
        del fields["smooth"]
    return Helpers(**fields)
