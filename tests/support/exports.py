"""Exports without the work that torch repeats at every export: two thirds of the time of a small model's."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch._export.utils as export_utils


@functools.cache
def _translations(make: Any, opset: int) -> Any:
    """The registry of all translations to ONNX, of which every export gets a copy."""
    return make(opset)


@contextmanager
def shared_tables() -> Iterator[None]:
    """Build torch's table of translations to ONNX once a process, and list the operators of libraries once.

    torch builds the table for each export from the source of 500 functions, and lists the operators of each namespace
    by asking the dispatcher for all. Neither changes but when a module is imported.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry, _constants

    make, materialize, counts = ONNXRegistry.from_torchlib, export_utils._materialize_cpp_cia_ops, set[int]()

    def from_torchlib(opset_version: int = _constants.TORCHLIB_OPSET) -> ONNXRegistry:
        built, copy = _translations(make, opset_version), ONNXRegistry()
        copy._opset_version = opset_version
        copy.functions = {target: [*candidates] for target, candidates in built.functions.items()}
        return copy

    def materialize_once() -> None:
        if len(sys.modules) not in counts:
            materialize()
            counts.add(len(sys.modules))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", materialize_once)
        yield
