"""Passes over the ONNX model: biases inside of quantized products, with the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from torchslim.runtimes.onnx_passes import finish


def product(
    seed: int = 0, *, by_column: bool = True, turned: bool = False, after: str = "Identity", tied: bool = False
) -> Any:
    """A model of one quantized product (1, steps, 8) x (8, 6) and its bias."""
    rng = np.random.default_rng(seed)
    shape = (6, 8) if turned else (8, 6)
    weight = rng.integers(-64, 65, shape).astype(np.int8)  # sums of larger ones saturate on processors without VNNI
    columns = weight.shape[0 if turned else 1]
    scale = rng.uniform(0.001, 0.01, columns if by_column else ()).astype(np.float32)
    constants = {
        "x_scale": np.float32(rng.uniform(0.01, 0.1)),
        "x_zero": np.uint8(rng.integers(0, 256)),
        "weight": weight,
        "scale": scale,
        "zero": np.zeros(scale.shape, np.int8),
        "bias": rng.standard_normal(columns).astype(np.float32),
    }
    axis = {"axis": 0 if turned else 1} if by_column else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["left"], name="left"),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["right"], name="right", **axis),
        *([helper.make_node("Transpose", ["right"], ["moved"], name="moved")] if turned else []),
        helper.make_node("MatMul", ["left", "moved" if turned else "right"], ["product"], name="layer/MatMul"),
        helper.make_node("Add", ["bias", "product"] if seed % 2 else ["product", "bias"], ["sum"], name="layer/Add"),
        helper.make_node(after, ["sum"], ["y"], name="after"),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "steps", columns])]
    if tied:
        outputs.append(helper.make_tensor_value_info("right", TensorProto.FLOAT, list(weight.shape)))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "steps", 8])],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        value_info=[helper.make_tensor_value_info("product", TensorProto.FLOAT, [1, "steps", columns])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def outputs(model: Any, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def operations(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.booleans(), st.booleans(), st.booleans())
def test_a_bias_inside_of_a_product_changes_nothing(seed: int, by_column: bool, turned: bool, tied: bool) -> None:
    model = product(seed, by_column=by_column, turned=turned, tied=tied)
    x = np.random.default_rng(seed).standard_normal((1, 5, 8)).astype(np.float32) * 4
    expected = outputs(model, x)
    finish(model)
    onnx.checker.check_model(model)
    assert "MatMulIntegerToFloat" in operations(model)
    assert not {"MatMul", "Add"} & set(operations(model))
    for one, other in zip(expected, outputs(model, x), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("options", "lowered"), [({"after": "Gelu"}, True), ({}, False)])
def test_a_bias_stays_where_the_runtime_adds_it_elsewhere(options: dict[str, Any], lowered: bool) -> None:
    """ONNX Runtime adds it inside of a Gelu; other runtimes know the standard's operations alone."""
    model = product(**options)
    finish(model, lowered=lowered)
    assert "MatMul" in operations(model)
    assert {opset.domain for opset in model.opset_import} == {""}
