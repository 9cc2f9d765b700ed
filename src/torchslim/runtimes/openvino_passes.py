"""Passes over a model that OpenVINO has read, so that its kernels compute the model correctly."""

from __future__ import annotations

from typing import Any

import numpy as np

EXTREMES = ("ReduceMax", "ReduceMin")
ROUNDING = "FakeQuantize"
FLOATS: dict[str, Any] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def guard_extremes(model: Any) -> None:
    """Keep OpenVINO from fusing a rounding to 8 bits into a maximum or minimum over dimensions.

    The kernel stores intermediate results in the memory of its output. With a fused rounding that memory has 8 bits,
    and values are truncated to integers before they are scaled: 0.7 becomes 0. The kernel fuses scales and shifts,
    activations and roundings that follow it, but no maximum with a constant; a maximum with the lowest float changes no
    value. Sums, means, norms and products have their own intermediate memory. Seen in OpenVINO 2026.4.1.
    """
    operations = model.get_ordered_ops()
    if all(candidate.get_type_name() != ROUNDING for candidate in operations):
        return
    from openvino import opset13

    for operation in operations:
        if operation.get_type_name() not in EXTREMES:
            continue
        dtype = FLOATS.get(operation.get_output_element_type(0).get_type_name())
        if dtype is None:
            continue
        readers = [input_ for input_ in operation.output(0).get_target_inputs() if not _is_output(input_)]
        guard = opset13.maximum(operation, opset13.constant(np.finfo(dtype).min, dtype=dtype))
        guard.set_friendly_name(f"{operation.get_friendly_name()}_guard")
        for reader in readers:
            reader.replace_source_output(guard.output(0))


def _is_output(reader: Any) -> bool:
    return bool(reader.get_node().get_type_name() == "Result")
