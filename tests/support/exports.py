"""Exports to ONNX without the tables that torch builds anew at each: three quarters of the time of a small model's."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._export.utils as export_utils


def _operators() -> int:
    """How many operators there are: a library that is imported, such as that of quantized ones, adds its own."""
    return len(torch._C._dispatch_get_all_op_names())  # type: ignore[attr-defined]


@contextmanager
def shared_tables() -> Iterator[None]:
    """Keep torch's table of translations to ONNX, its decompositions and its list of operators from export to export.

    torch makes the first from the source of 500 functions, and the others by asking the dispatcher for all operators.
    They depend on the operators that there are: where these became more, the tables are built again.
    """
    from torch.onnx._internal.exporter import _decomp
    from torch.onnx._internal.exporter._registration import ONNXRegistry, _constants

    kept: dict[Any, Any] = {}

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in kept:
            kept[key] = make()
        return kept[key]

    make, decompositions = ONNXRegistry.from_torchlib, _decomp.create_onnx_friendly_decomposition_table
    materialize = export_utils._materialize_cpp_cia_ops

    def from_torchlib(opset_version: int = _constants.TORCHLIB_OPSET) -> ONNXRegistry:
        built = once((opset_version, _operators()), lambda: make(opset_version))
        copy = ONNXRegistry()
        copy._opset_version = opset_version
        copy.functions = {target: [*candidates] for target, candidates in built.functions.items()}
        return copy

    def table(registered: set[Any]) -> dict[Any, Any]:
        key = (frozenset(registered), _operators())
        return dict(once(key, lambda: decompositions(registered)))

    def materialize_once() -> None:
        once(("materialized", _operators()), materialize)

    class Unspecific(metaclass=ABCMeta):  # noqa: B024 - for isinstance
        """In place of `Callable[...]`, which torch writes at functions that it defines anew for each operator."""

        def __class_getitem__(cls, _: Any) -> type:
            return cls

        @classmethod
        def __subclasshook__(cls, kind: type) -> bool:
            return issubclass(kind, Callable)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._ops, "Callable", Unspecific)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        patch.setattr(_decomp, "create_onnx_friendly_decomposition_table", table)
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", materialize_once)
        yield
