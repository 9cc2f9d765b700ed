"""Compile and run a model in a child process first, where OpenVINO may end the process instead of raising an error.

OpenVINO 2026.4.1 ends with a segmentation fault when it reads an ONNX `STFT`. No error can be caught then: a child
process reads, compiles and runs such a model once, and its exit status tells. Models of ordinary operations, those in
`ORDINARY`, are not tried: they cost nothing more.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from torchslim.errors import DeployError

LIMIT_S = 900.0  # to read, compile and run a model once
RAISED = (0, 1)  # the exit status of a child that ends by itself; an error raised there is raised here again
# operations of ONNX that ordinary networks consist of; none of them was seen to end the process
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
# what the child runs: it imports no torch, which would take seconds, and leaves no core file
CHILD = """
import json, sys
folder, path = sys.argv[1], json.loads(sys.argv[2])
sys.path[:] = path
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:
    pass
sys.modules["openvino_telemetry"] = None
import numpy, openvino
names = json.loads(sys.argv[3])
named = {name: numpy.load(f"{folder}/{index}.npy", allow_pickle=False) for index, name in enumerate(names)}
model = openvino.Core().read_model(folder + "/model.onnx")
taken = {name: value for name, value in named.items() if any(name in each.names for each in model.inputs)}
openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(taken)
"""


def unusual(operations: Iterable[Any]) -> list[str]:
    """The operations of an ONNX graph that are not known to be safe, sorted."""
    return sorted({each.op_type for each in operations if each.op_type not in ORDINARY or each.domain})


def survive(model: bytes, inputs: Sequence[Tensor], *, child: str = CHILD, limit_s: float = LIMIT_S) -> None:
    """Read, compile and run an ONNX model once in a child process, where it has unusual operations.

    Args:
        model: the bytes of a `.onnx`.
        inputs: tensors in the order of the model's inputs.
        child: the program that the child runs.
        limit_s: the time that it may take, in seconds.

    Raises:
        DeployError: the child was ended by a signal, or did not end in time.
    """
    import onnx

    graph = onnx.load_from_string(model).graph
    suspects = unusual(graph.node)
    if not suspects:
        return
    names = [each.name for each in graph.input]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.onnx").write_bytes(model)
        for index, each in enumerate(inputs):
            np.save(Path(folder) / f"{index}.npy", each.detach().cpu().numpy())
        command = [sys.executable, "-W", "ignore", "-c", child, folder, json.dumps(sys.path), json.dumps(names)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise DeployError(
                f"OpenVINO did not compile and run the model within {limit_s:g} s in a child process "
                f"(operations: {', '.join(suspects)}); use runtime 'onnxruntime', or 'eager'"
            ) from error
    if done.returncode not in RAISED:
        raise DeployError(
            f"OpenVINO crashes on the model: a child process that ran it ended {_ending(done.returncode)}. "
            f"The cause is probably one of the operations {', '.join(suspects)}; use runtime 'onnxruntime', or 'eager'"
        )


def _ending(status: int) -> str:
    if status < 0 and -status in {int(each) for each in signal.Signals}:
        return f"by {signal.Signals(-status).name}"
    return f"with status {status}"
