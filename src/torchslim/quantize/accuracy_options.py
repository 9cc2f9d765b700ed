"""Options for accuracy, in a light module: checking a recipe need not load the code that applies them."""

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
"""Options of `accuracy="best"`; they brought the outputs of the models of `benchmarks/accuracy.md` nearer to float."""
AFTERWARDS = ("rounding", "correct_biases")  # useless where the weights are trained on the grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Helpers:
    """Options that make a quantized model more accurate.

    Args:
        equalize: even out the ranges of channels between layers (Nagel 2019); runs before observing.
        smooth: strength, 0 to 1, with which outliers behind norms move into weights (SmoothQuant); None: off.
        rounding: how weights are rounded: to "nearest", by "gptq" or "adaround"; runs after observing.
        correct_biases: correct biases by the mean error of the outputs (Nagel 2019); runs last.
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
        """Whether an option needs calibration batches, whatever the scheme."""
        return self.smooth is not None or self.afterwards

    @property
    def afterwards(self) -> bool:
        """Whether an option runs after the ranges are observed."""
        return self.rounding != "nearest" or self.correct_biases


def chosen_helpers(accuracy: Accuracy, given: Mapping[str, Any], *, trained: bool) -> Helpers:
    """The options that `accuracy` stands for, updated by those in `given`.

    Args:
        accuracy: "plain", no helper, or "best".
        given: fields of `Helpers`; None: the value of `accuracy`. `smooth` may be "off".
        trained: whether the weights are then trained on the grid, which replaces `rounding` and `correct_biases`.
    """
    if accuracy not in ACCURACIES:
        raise QuantizeError(f"accuracy must be one of {', '.join(ACCURACIES)}, got {accuracy!r}")
    best = {name: value for name, value in BEST.items() if not (trained and name in AFTERWARDS)}
    fields = (best if accuracy == "best" else {}) | {name: value for name, value in given.items() if value is not None}
    if fields.get("smooth") == "off":
        del fields["smooth"]
    return Helpers(**fields)
