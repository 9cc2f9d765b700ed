"""Quantization: schemes (bits), quantizer and profiles (which operations), observers (ranges), and the step."""

from typing import TYPE_CHECKING

from torchslim.core.lazy_names import lazy_names

if TYPE_CHECKING:
    from torchslim.quantize.accuracy_options import Helpers
    from torchslim.quantize.checks import Checks
    from torchslim.quantize.functional import dynamic, sqnr, static, weights
    from torchslim.quantize.modules import Prepared, QuantizedModule
    from torchslim.quantize.preparation import convert, prepare
    from torchslim.quantize.schemes import SCHEMES
    from torchslim.quantize.step import Quantize

__all__ = [
    "SCHEMES",
    "Checks",
    "Helpers",
    "Prepared",
    "Quantize",
    "QuantizedModule",
    "convert",
    "dynamic",
    "prepare",
    "sqnr",
    "static",
    "weights",
]

_HOMES = {
    "SCHEMES": "schemes",
    "Checks": "checks",
    "Helpers": "accuracy_options",
    "Prepared": "modules",
    "Quantize": "step",
    "QuantizedModule": "modules",
    "convert": "preparation",
    "dynamic": "functional",
    "prepare": "preparation",
    "sqnr": "functional",
    "static": "functional",
    "weights": "functional",
}
if not TYPE_CHECKING:  # type checkers know the names from the imports above
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
