"""Compiles and runs a model in a child process first, where OpenVINO may crash instead of raising an error.

OpenVINO 2026.4.1 ends with a segmentation fault when it reads an ONNX `STFT`, which cannot be caught as an error. A
child process reads, compiles and runs such a model once, and its exit status shows whether that worked. Models made
here from ordinary operations, those in `ORDINARY`, are not tried, which saves time.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchslim.errors import DeployError
from torchslim.runtimes.file_trial import (
    LIMIT_S,
    NO_MEMORY,
    RAISED,
    RAN,
    UNREADY,
    child_program,
    ending,
    run_child,
    try_files,
)

# ONNX operations of ordinary networks; none of them was seen to crash the process
_NAMES = """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization BitShift BitwiseAnd Cast Ceil Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div DynamicQuantizeLinear Elu Equal Erf
    Exp Expand Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater
    GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LRN
    LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mish Mod Mul Neg Not
    Or PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin
    Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
ORDINARY = frozenset(_NAMES.split())
# it does not import torch, which would take seconds
CHILD = child_program(
    imports="""
sys.modules["openvino_telemetry"] = None
import numpy, openvino
""",
    run="""
model = openvino.Core().read_model(f"{folder}/{file}")
known = {name for each in model.inputs for name in each.names} | set(range(len(model.inputs)))
taken = {name: value for name, value in zip(names, values) if name in known}
openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(taken)
""",
)


def unusual(operations: Iterable[Any]) -> list[str]:
    """Types of operations in an ONNX graph that are not known to be safe, sorted."""
    return sorted(
        {operation.op_type for operation in operations if operation.op_type not in ORDINARY or operation.domain}
    )


def survive(model: bytes, inputs: Sequence[Tensor], *, child: str = CHILD, limit_s: float = LIMIT_S) -> None:
    """Read, compile and run an ONNX model once in a child process, if it has unusual operations.

    An error that OpenVINO raises in the child is ignored; OpenVINO raises it again in this process.

    Args:
        model: the bytes of a `.onnx`.
        inputs: tensors in the order of the model's inputs.
        child: the program that the child runs.
        limit_s: the time that the child may take, in seconds.

    Raises:
        DeployError: the child crashed, or did not end in time.
    """
    import onnx

    graph = onnx.load_from_string(model).graph
    suspects = unusual(graph.node)
    if not suspects:
        return
    try:
        result = run_child(
            {"model.onnx": model}, inputs, [input_.name for input_ in graph.input], child, limit_s, growth=0
        )
    except subprocess.TimeoutExpired as error:
        raise DeployError(
            f"OpenVINO did not compile and run the model within {limit_s:g} s in a child process "
            f"(operations: {', '.join(suspects)}); use runtime 'onnxruntime', or 'eager'"
        ) from error
    if result.returncode not in (RAN, UNREADY, RAISED, NO_MEMORY):
        raise DeployError(
            f"OpenVINO crashes on the model: a child process that ran it ended {ending(result.returncode)}. "
            f"The cause is probably one of the operations {', '.join(suspects)}; use runtime 'onnxruntime', or 'eager'"
        )


def survive_files(
    files: Mapping[str, bytes], inputs: Sequence[Tensor], *, child: str = CHILD, limit_s: float = LIMIT_S
) -> str:
    """Read, compile and run the OpenVINO model of an artifact once, the `.xml` first; see `try_files`."""
    return try_files(files, inputs, child=child, engine="OpenVINO", package="openvino", limit_s=limit_s)
