"""Quantization: which numbers (schemes), which operations (quantizer), and how they are found (ptq)."""

from torchslim.quantize.ptq import Quantize, QuantizedModule, sqnr, static
from torchslim.quantize.schemes import SCHEMES

__all__ = ["SCHEMES", "Quantize", "QuantizedModule", "sqnr", "static"]
