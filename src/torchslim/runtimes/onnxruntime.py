"""ONNX Runtime: saves a `.onnx`; quantized programs become QDQ graphs, which it fuses into int8 kernels."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchslim.errors import DeployError, ExportError, RuntimeUnavailable
from torchslim.graph.export import Captured, scope_path
from torchslim.graph.io_structure import leaf_names
from torchslim.graph.portable_ops import portable
from torchslim.graph.recurrent_shapes import recurrent_kept_whole
from torchslim.runtimes.base import Runtime, as_array
from torchslim.runtimes.kernel_listing import UNWANTED, onnx_kernels, unique
from torchslim.runtimes.onnx_bfloat16 import widen
from torchslim.runtimes.onnx_check import check_onnx
from torchslim.runtimes.onnx_kernels import lower
from torchslim.runtimes.onnx_passes import finish, translations
from torchslim.runtimes.onnx_translation import to_onnx_program
from torchslim.runtimes.spec import Session, Spec

PIP = "pip install onnx onnxscript onnxruntime"


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailable(f"runtime 'onnxruntime' is not installed: {PIP}") from error
    return onnxruntime


def _make(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    _import()
    payload = to_onnx(captured, notes=spec.notes)
    return _read(payload, spec, threads), payload


def to_onnx(captured: Captured, *, notes: list[str], lowered: bool = True) -> bytes:
    """Bytes of the program as an ONNX model: weights inside, no traces of the source code, the batch named "batch".

    Inputs and outputs have the model's names: `x`, `logits`, `pair_0`; a single output is `output`. `lowered`
    uses operations that ONNX Runtime has beyond the standard. `notes` gets remarks on the translation.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailable(f"exporting to ONNX needs packages that are missing: {PIP}") from error
    try:
        program = portable(captured.program)
        program = lower(program) if lowered else program
        with recurrent_kept_whole():
            exported = to_onnx_program(program, translations(program.graph), notes)
        _register_constants(exported.model.graph)
        proto = exported.model_proto
    except Exception as error:
        raise ExportError(
            f"the model cannot be exported to ONNX: {type(error).__name__}: {_brief(error)}; runtimes 'eager' and "
            "'inductor' need no ONNX"
        ) from error
    widen(proto)
    _strip(proto)
    _name(proto, captured)
    finish(proto, lowered=lowered)
    try:
        return proto.SerializeToString()  # type: ignore[no-any-return]
    except ValueError as error:
        raise ExportError(f"the ONNX model is above protobuf's limit of 2 GiB: {error}; use runtime 'eager'") from error


def _register_constants(graph: Any) -> None:
    """Add the constants that the exporter's optimizer made and failed to list among the graph's initializers.

    onnxscript 0.7 names the bounds of a fused clip by the clip's input: where several clips read one value, only the
    last pair of bounds is listed.
    """
    listed = {id(value) for value in graph.initializers.values()}
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is None or id(value) in listed or value.const_value is None or value.producer() is not None:
                continue
            listed.add(id(value))
            while value.name in graph.initializers:
                value.name += "_"
            graph.register_initializer(value)


def _strip(proto: Any) -> None:
    """Name nodes by their layers, then drop metadata that no runtime reads, as stack traces of the exporting machine.

    Profiles and reports of every runtime that reads the model show these names, `layer1.0.conv1/Conv`.
    """
    graph = proto.graph
    owners = {initializer.name: initializer.name.rpartition(".")[0] for initializer in graph.initializer}
    for node, name in zip(graph.node, unique([_layer_name(node, owners) for node in graph.node]), strict=True):
        node.name = name
    del proto.metadata_props[:], graph.metadata_props[:]
    proto.doc_string = graph.doc_string = ""
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    for function in proto.functions:
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def _layer_name(node: Any, owners: dict[str, str]) -> str:
    """Path of a node's layer and its operation; without a layer, the program's node takes the place of the path."""
    texts = {prop.key: prop.value for prop in node.metadata_props}
    try:
        scopes = list(ast.literal_eval(texts["pkg.torch.onnx.name_scopes"]))
    except (KeyError, ValueError, SyntaxError):  # made by a pass over the ONNX model
        return str(node.name or node.op_type)
    path = scope_path(scopes[:-1])
    if "rule_name" in str(list(texts)) and len(node.input) > 1:
        # a fusion of several nodes, as of a batch norm and its convolution: the weight's name gives the layer; but the
        # graph of a quantized model holds the weights of all layers itself, under names that spell their paths
        spelled = path and f"_{path}_".replace(".", "_") in f"_{node.input[1]}_".replace(".", "_")
        path = path if spelled else scope_path([owners.get(node.input[1], "")]) or path
    return f"{path or scopes[-1]}/{node.op_type}"


def _name(proto: Any, captured: Captured) -> None:
    """Give inputs and outputs the model's names, and the free batch size the name "batch"."""
    graph = proto.graph
    used_names = {name for node in graph.node for name in (*node.input, *node.output)}
    used_names |= {initializer.name for initializer in (*graph.initializer, *graph.input, *graph.output)}
    new_names = [
        *zip(graph.input, leaf_names(captured.inputs), strict=True),
        *zip(graph.output, map(_output_name, leaf_names(captured.outputs)), strict=True),
    ]
    renamed: dict[str, str] = {}
    for value, name in new_names:
        if value.name in renamed:  # an input that is returned unchanged, or a value that is returned twice
            continue
        while name in used_names:
            name += "_"
        used_names.add(name)
        renamed[value.name] = name
    for value, _ in new_names:
        value.name = renamed[value.name]
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(old_name, old_name) for old_name in names]
    axis = captured.batch_axis
    if axis is None:
        return
    batch = {
        value.type.tensor_type.shape.dim[axis].dim_param
        for value in graph.input
        if len(value.type.tensor_type.shape.dim) > axis and value.type.tensor_type.shape.dim[axis].dim_param
    }
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in batch:
                dim.dim_param = "batch"


def _output_name(name: str) -> str:
    return "output" + (f"_{name}" if name else "") if not name or name[0].isdigit() else name


def _read(payload: bytes, spec: Spec, threads: int | None) -> Session:
    runtime = _import()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    # idle threads that spin take the cores from other work: on two shared cores the median call of the demo's network
    # took three times as long with spinning as without
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = runtime.InferenceSession(
            payload, options, providers=["CPUExecutionProvider"], disabled_optimizers=UNWANTED
        )
    except Exception as error:
        raise DeployError(
            f"ONNX Runtime cannot run the model: {type(error).__name__}: {_brief(error)}; "
            "use float32, or runtime 'eager'"
        ) from error
    names = [input_.name for input_ in session.get_inputs()]
    if len(names) != len(spec.dtypes):
        raise DeployError(f"the ONNX model takes {len(names)} inputs, its spec lists {len(spec.dtypes)}; save it again")

    def run(tensors: list[Tensor]) -> list[Tensor]:
        feeds = {name: as_array(tensor) for name, tensor in zip(names, tensors, strict=True)}
        return spec.narrowed([torch.from_numpy(value) for value in session.run(None, feeds)])

    return run


def _brief(error: BaseException) -> str:
    cause = error.__cause__ or error
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), "")[:300]


def _check(files: Mapping[str, bytes]) -> None:
    check_onnx(files[".onnx"])


RUNTIME = Runtime(
    name="onnxruntime", suffix=".onnx", make=_make, read=_read, check=_check, kernels=onnx_kernels, converts=True
)
