"""ONNX Runtime. The file is a `.onnx`; quantized programs become QDQ graphs that it fuses into int8 kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchslim.errors import ExportError, RuntimeUnavailable
from torchslim.export import Captured
from torchslim.runtimes.base import Runtime, Session, Spec

PIP = "pip install 'torchslim[onnxruntime]'"


def _import() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailable(f"runtime 'onnxruntime' is not installed: {PIP}") from error
    return onnxruntime


def _make(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    _import()
    payload = to_onnx(captured)
    return _read(payload, spec, threads), payload


def to_onnx(captured: Captured) -> bytes:
    """The program as an ONNX model: weights inside, no traces of the source code, the batch named "batch"."""
    try:
        exported = torch.onnx.export(
            captured.program, dynamo=True, verbose=False, optimize=True, external_data=False
        )
        assert exported is not None
        proto = exported.model_proto
    except Exception as error:
        raise ExportError(
            f"the model cannot be exported to ONNX: {type(error).__name__}: {_brief(error)}"
        ) from error
    _strip(proto, captured)
    try:
        return proto.SerializeToString()  # type: ignore[no-any-return]
    except ValueError as error:
        raise ExportError(f"the ONNX model is above protobuf's limit of 2 GiB: {error}") from error


def _strip(proto: Any, captured: Captured) -> None:
    """Drop what no runtime reads (stack traces of the exporting machine, shapes of inner values)."""
    graph = proto.graph
    del proto.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    proto.doc_string = graph.doc_string = ""
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    for function in proto.functions:
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
    if captured.batch_axis is None:
        return
    axis = captured.batch_axis
    names = {
        value.type.tensor_type.shape.dim[axis].dim_param
        for value in graph.input
        if len(value.type.tensor_type.shape.dim) > axis and value.type.tensor_type.shape.dim[axis].dim_param
    }
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = "batch"


def _read(payload: bytes, spec: Spec, threads: int | None) -> Session:
    runtime = _import()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    # idle threads that spin steal the cores from whatever else runs: on two shared cores the median call of the demo's
    # network took three times as long with spinning as without
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    wanted = len(spec.dtypes)
    if len(names) != wanted:
        raise ExportError(f"the ONNX model takes {len(names)} inputs, the model {wanted}: {', '.join(names)}")

    def run(leaves: list[Tensor]) -> list[Tensor]:
        feeds = {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feeds)]

    return run


def _brief(error: BaseException) -> str:
    cause = error.__cause__ or error
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), "")[:300]


RUNTIME = Runtime(name="onnxruntime", suffix=".onnx", make=_make, read=_read)
