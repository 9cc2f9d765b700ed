"""Quantization: which numbers (schemes), where (quantizer, profiles), how they are found (observers), the step."""

from torchslim.quantize.flow import Prepared, QuantizedModule, convert, prepare
from torchslim.quantize.helpers import Helpers
from torchslim.quantize.schemes import SCHEMES
from torchslim.quantize.step import Quantize, dynamic, sqnr, static, weights

__all__ = [
    "SCHEMES",
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
