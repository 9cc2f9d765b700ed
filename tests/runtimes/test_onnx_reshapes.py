"""Reshapes with constant targets: the same results for all sizes, without the operations that read the sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from torchslim.runtimes.onnx_passes import finish

FIXED = numpy_helper.from_array(np.array([2, 3]), "fixed")
REST = numpy_helper.from_array(np.array([-1]), "rest")


def reshaped(parts: list[str], result: list[Any], *, of: str = "x") -> Any:
    """A reshape of x (b, s, 6): sizes 0 to 2 of `of` are read as "0" to "2", other parts are constants."""
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="relu"),
        *(
            helper.make_node("Shape", [of], [part], name=part, start=int(part), end=int(part) + 1)
            for part in dict.fromkeys(parts)
            if part.isdigit()
        ),
        helper.make_node("Concat", parts, ["target"], name="concat", axis=0),
        helper.make_node("Reshape", ["y", "target"], ["z"], name="reshape", allowzero=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 6])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, result)],
        [FIXED, REST],
        value_info=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", 6])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def outputs(model: Any, x: Any) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("of", ["x", "y"])
@given(batch=st.integers(0, 4), steps=st.integers(0, 4))
def test_a_target_of_the_inputs_own_sizes_becomes_a_constant(of: str, batch: int, steps: int) -> None:
    model = reshaped(["0", "1", "fixed"], ["b", "s", 2, 3], of=of)
    x = np.random.default_rng(0).standard_normal((batch, steps, 6)).astype(np.float32)
    expected = outputs(model, x)
    finish(model)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Relu", "Reshape"]
    np.testing.assert_array_equal(outputs(model, x), expected)
    assert expected.shape == (batch, steps, 2, 3)


@pytest.mark.parametrize(
    ("parts", "result"),
    [
        (["1", "0", "2"], ["s", "b", 6]),  # places change
        (["fixed", "0", "1"], [2, 3, "b", "s"]),
        (["0", "rest"], ["b", None]),
    ],
)
def test_other_targets_stay(parts: list[str], result: list[Any]) -> None:
    model = reshaped(parts, result)
    before = [node.op_type for node in model.graph.node]
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    expected = outputs(model, x)
    finish(model)
    assert [node.op_type for node in model.graph.node] == before
    np.testing.assert_array_equal(outputs(model, x), expected)


def test_sizes_that_something_else_reads_are_still_read() -> None:
    model = reshaped(["0", "1", "fixed"], ["b", "s", 2, 3])
    model.graph.output.append(helper.make_tensor_value_info("target", TensorProto.INT64, [4]))
    finish(model)
    assert [node.op_type for node in model.graph.node] == ["Relu", "Shape", "Shape", "Concat", "Reshape"]
