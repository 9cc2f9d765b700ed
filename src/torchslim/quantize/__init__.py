"""Quantization: schemes (bits), quantizer and profiles (which operations), observers (ranges), and the step."""

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
