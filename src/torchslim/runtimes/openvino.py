"""OpenVINO: saves its IR, a `.xml` and a `.bin`; quantized programs run on its int8 kernels.

OpenVINO reads a program as an ONNX model: its own reader of exported programs does not support per-channel int8
weights. Dynamic quantization of activations is left to OpenVINO, which quantizes the inputs of linear layers with
integer weights itself, in groups, while it runs.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchslim.core.files import bundle, unbundle
from torchslim.core.isolation import quiet
from torchslim.errors import DeployError, RuntimeUnavailable
from torchslim.graph.decompose import ATTENTION, open_products
from torchslim.graph.export import Captured
from torchslim.graph.integer_patterns import find_dynamic
from torchslim.graph.io_structure import flatten
from torchslim.runtimes.base import Runtime, as_array
from torchslim.runtimes.onnxruntime import to_onnx
from torchslim.runtimes.openvino_check import check_ir
from torchslim.runtimes.openvino_passes import guard_extremes
from torchslim.runtimes.openvino_trial import survive, survive_files
from torchslim.runtimes.spec import Kernel, Session, Spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchslim.runtimes.base import Deployed

PIP = "pip install 'torchslim[openvino]'"
XML, BIN = ".xml", ".bin"
GROUPS = (128, 64, 32)  # 128 is a tenth faster than OpenVINO's default of 32, and 1.5 dB off that
COMPUTES = (
    "Convolution",
    "Deconvolution",
    "FullyConnected",
    "MatMul",
    "Pooling",
    "Reduce",
    "Eltwise",
    "Interpolate",
    "MVN",
)
NARROW = ("i8", "u8", "i4", "u4")
BOOLEAN = ("Where", "And", "Or", "Not", "Xor", "Equal", "Less", "Great", "IsNaN")  # booleans are 8 bits wide as well


def _import() -> Any:
    try:
        with quiet(), no_telemetry():
            import openvino
    except ImportError as error:
        raise RuntimeUnavailable(f"runtime 'openvino' is not installed: {PIP}") from error
    return openvino


@contextmanager
def no_telemetry() -> Iterator[None]:
    """Hide `openvino_telemetry` in the block, or openvino writes an ID to the user's home and reports to its makers."""
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _make(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    openvino = _import()
    program = _open_attention(_without_dynamic(captured.program))
    # lower to ONNX Runtime's operations for 4-bit weights only: with 8 bits they would store more scales
    packed = any(node.target is torch.ops.aten.bitwise_right_shift.Tensor_Scalar for node in program.graph.nodes)
    onnx = to_onnx(replace(captured, program=program), notes=spec.notes, lowered=packed)
    survive(onnx, flatten(captured.inputs, captured.example))
    try:
        model = openvino.Core().read_model(onnx)
    except RuntimeError as error:
        raise DeployError(
            f"OpenVINO cannot read the model: {_brief(str(error))}; use runtime 'onnxruntime', or 'eager'"
        ) from error
    model = _restore(model, onnx, openvino)
    guard_extremes(model)
    # by default OpenVINO rounds the activations of all layers with 8- or 4-bit weights, asked for or not
    model.set_rt_info(str(_group(captured.program)), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    with tempfile.TemporaryDirectory() as folder:
        files = {suffix: Path(folder) / f"model{suffix}" for suffix in (XML, BIN)}
        openvino.serialize(model, *map(str, files.values()))
        payload = bundle({suffix: path.read_bytes() for suffix, path in files.items()})
    return _read(payload, spec, threads), payload


def _group(program: Any) -> int:
    """Number of activations that share a scale; 0 if the program has no dynamic layers.

    It is the largest of `GROUPS` that divides the input width of every dynamic layer; 32 if none does.
    """
    widths = [
        node.meta["val"].shape[-1]
        for node in program.graph.nodes
        if find_dynamic(node) is not None and node.meta["val"].dim()
    ]
    if not widths:
        return 0
    return next((size for size in GROUPS if all(isinstance(width, int) and width % size == 0 for width in widths)), 32)


def _without_dynamic(program: Any) -> Any:
    """The program without the dynamic quantization of activations: OpenVINO does it inside its kernels."""
    if not any(find_dynamic(node) for node in program.graph.nodes):
        return program
    program = program.run_decompositions({})  # a copy; nothing is decomposed
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if (source := find_dynamic(node)) is not None:
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _open_attention(program: Any) -> Any:
    """The program with attention written as two products and a softmax.

    torch's export handles queries without any key between the two products, which keeps OpenVINO from computing both
    in one kernel; ours handles these queries after the products.
    """
    if all(node.target is not ATTENTION for node in program.graph_module.graph.nodes):
        return program
    program = program.run_decompositions({})  # a copy; nothing is decomposed
    open_products(program.graph_module, lambda node: node.target is ATTENTION, guard=True)
    return program


def _restore(model: Any, payload: bytes, openvino: Any) -> Any:
    """Restore what OpenVINO loses when it reads an ONNX model: unused inputs and the names of operations.

    Operations that are named after an ONNX output get the name of its node. OpenVINO numbers parts of an operation over
    the whole process; they get the layer of their readers and their index in the model.
    """
    import onnx

    graph = onnx.load_from_string(payload).graph
    inputs = {name: parameter for parameter in model.get_parameters() for name in parameter.output(0).get_names()}
    for value in graph.input:
        if value.name in inputs:
            continue
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        unused = openvino.op.Parameter(openvino.Type(dtype), openvino.PartialShape(dims))
        unused.set_friendly_name(value.name)
        unused.output(0).set_names({value.name})
        inputs[value.name] = unused
    model = openvino.Model(
        model.get_results(), model.get_sinks(), [inputs[input_.name] for input_ in graph.input], "model"
    )
    named = {output: node.name or output for node in graph.node for output in node.output}
    operations = list(model.get_ordered_ops())
    for index, operation in reversed(list(enumerate(operations))):
        name, kind = operation.get_friendly_name(), operation.get_type_name()
        if name in named and kind not in ("Parameter", "Result"):
            name = named[name]
        elif re.fullmatch(rf"{kind}_\d+", name):
            readers = [input_.get_node() for output in operation.outputs() for input_ in output.get_target_inputs()]
            layers = {reader.get_friendly_name().rpartition("/")[0] for reader in readers} - {""}
            name = f"{layers.pop()}/{kind}_{index}" if len(layers) == 1 else f"{kind}_{index}"
        operation.set_friendly_name(name)
    return model


class _Compiled:
    """A compiled model and its only inference request; calls from several threads take turns."""

    def __init__(self, model: Any, spec: Spec) -> None:
        self.model, self.spec = model, spec
        self.request = model.create_infer_request()
        self.lock = threading.Lock()

    def __call__(self, leaves: list[Tensor], /) -> Sequence[Tensor]:
        with self.lock:
            results = self.request.infer([as_array(leaf) for leaf in leaves], share_inputs=True)
            return self.spec.narrowed([torch.from_numpy(results[index]) for index in range(len(self.model.outputs))])


def _read(payload: bytes, spec: Spec, threads: int | None) -> Session:
    compiled = _compiled(payload, threads)
    if len(compiled.inputs) != len(spec.dtypes):
        raise DeployError(
            f"the OpenVINO model takes {len(compiled.inputs)} inputs, its spec lists {len(spec.dtypes)}; save it again"
        )
    return _Compiled(compiled, spec)


def _compiled(payload: bytes, threads: int | None, **more: Any) -> Any:
    """Compile a model for the CPU, with `more` settings."""
    openvino = _import()
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # otherwise floats are computed in bfloat16 on processors that have it
        "INFERENCE_PRECISION_HINT": "f32",
        # pinned threads of two models share a core while another core is idle
        "ENABLE_CPU_PINNING": False,
        **more,
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    files = unbundle(payload)
    try:
        core = openvino.Core()
        model = core.read_model(files[XML], files[BIN])
        return core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise _unfit(str(error)) from error


def profile(
    deployed: Deployed, leaves: Sequence[Tensor], runs: int
) -> list[tuple[Kernel, tuple[int, ...], list[float]]]:
    """Microseconds of every kernel of a program in each of several calls, in the order of execution.

    Args:
        deployed: the program.
        leaves: its flat inputs.
        runs: number of calls.

    Returns:
        For each kernel the places of the kernels that it reads (-1 stands for the inputs) and its time in each call.
        The node of a kernel that OpenVINO inserted, as for a change of layout, is the kernel's type.
    """
    assert deployed.payload is not None
    model = _compiled(deployed.payload, deployed.threads, PERF_COUNT=True)
    request = model.create_infer_request()
    arrays = [as_array(leaf) for leaf in leaves]
    times: dict[str, list[float]] = {}
    for _ in range(runs):
        request.infer(arrays, share_inputs=True)
        for entry in request.profiling_info:
            times.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1e6)
    places: dict[str, tuple[int, ...]] = {}
    found: list[tuple[Kernel, tuple[int, ...], list[float]]] = []
    for operation, kernel, original in _operations(model):
        sources = [input_.get_source_output().get_node().get_friendly_name() for input_ in operation.inputs()]
        before = tuple(dict.fromkeys(place for source in sources for place in places.get(source, ())))
        name = operation.get_friendly_name()
        if kernel is None:  # an input, a constant or an output
            places[name] = (-1,) if operation.get_rt_info()["layerType"].value == "Input" else before
            continue
        places[name] = (len(found),)
        found.append((kernel if original else replace(kernel, node=kernel.type), before, times.get(name, [0.0])))
    return found


def _kernels(deployed: Deployed) -> list[Kernel]:
    """Nodes of the compiled graph, without constants, inputs and outputs."""
    session = deployed.session
    assert isinstance(session, _Compiled)
    return [kernel for _, kernel, _ in _operations(session.model) if kernel is not None]


def _operations(model: Any) -> Iterator[tuple[Any, Kernel | None, bool]]:
    """Nodes of a compiled graph with their kernels, and whether these come from the model; inputs have no kernel."""
    for operation in model.get_runtime_model().get_ordered_ops():
        properties = {
            key: str(value.value) for key, value in operation.get_rt_info().items() if hasattr(value, "value")
        }
        kind, primitive = properties.get("layerType", ""), properties.get("primitiveType", "")
        constant = operation.get_friendly_name().endswith("_flatten_reshape")  # scales, folded when the model is read
        if not kind or kind in ("Const", "Input", "Output") or constant:
            yield operation, None, False
            continue
        names = tuple(dict.fromkeys(map(_plain, properties.get("originalLayersNames", "").split(","))))
        parts = tuple(name for name in names if "/" in name and "QuantizeLinear" not in name) or names
        precision = properties.get("runtimePrecision", "")
        weights = f", {precision} weights" if kind == "FullyConnected" and primitive.endswith("f32") else ""
        kernel = Kernel(
            node=parts[0] or operation.get_friendly_name(),
            type=f"{kind}: {primitive}{weights}",
            integer=kind in COMPUTES and precision in NARROW and not parts[0].rpartition("/")[2].startswith(BOOLEAN),
            fused=names if len(names) > 1 else (),
        )
        yield operation, kernel, bool(parts[0])


def _plain(name: str) -> str:
    """A node's name without the suffixes of OpenVINO's passes."""
    return re.sub(r"/(WithoutBiases|Dequantization|transpose_[ab]).*", "", name)


def _unfit(message: str) -> DeployError:
    return DeployError(f"OpenVINO cannot run the model: {_brief(message)}; use runtime 'onnxruntime', or 'eager'")


def _brief(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    specific = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (specific or lines or [""])[0][:300]


def _check(files: Mapping[str, bytes]) -> None:
    check_ir(files[XML], files[BIN])


def _try(files: Mapping[str, bytes], example: Sequence[Tensor]) -> None:
    _import()
    inputs = [tensor.float() if tensor.dtype is torch.bfloat16 else tensor for tensor in example]  # as `as_array` does
    if message := survive_files({suffix: files[suffix] for suffix in (XML, BIN)}, inputs):
        raise _unfit(message)


RUNTIME = Runtime(
    name="openvino",
    suffix=XML,
    beside=(BIN,),
    make=_make,
    read=_read,
    check=_check,
    trial=_try,
    kernels=_kernels,
    converts=True,
)
