"""What is changed in a model that OpenVINO has read, so that its kernels compute what the model says."""

from __future__ import annotations

from typing import Any

import numpy as np

EXTREMES = ("ReduceMax", "ReduceMin")
ROUNDING = "FakeQuantize"
FLOATS: dict[str, Any] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def guard_extremes(model: Any) -> None:
    """Keep a rounding to 8 bits out of the kernel that computes a maximum or minimum over dimensions.

    The kernel keeps its intermediate results in the memory of its output. Where a rounding is fused into it, that
    memory has 8 bits, and the values are cut to whole numbers before they are scaled: 0.7 becomes 0. It fuses what
    follows by scale and shift, activations and roundings, but no maximum with a constant; one with the lowest float
    changes no value. Sums, means, norms and products have an intermediate memory of their own. Seen in 2026.4.1.
    """
    operations = model.get_ordered_ops()
    if all(each.get_type_name() != ROUNDING for each in operations):
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
