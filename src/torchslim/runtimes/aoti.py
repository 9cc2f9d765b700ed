"""AOTInductor: the fused kernels of `torch.compile` as machine code in a file, which runs without a compiler.

The file is a `.pt2` package that `torch._inductor.aoti_load_package` loads. Loading it runs the code inside.
"""

from __future__ import annotations

import io
import json
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from torchslim.core.isolation import quiet, torch_threads
from torchslim.errors import DeployError, ExportError
from torchslim.graph.export import Captured
from torchslim.graph.recurrent_shapes import need_fixed_steps
from torchslim.runtimes.base import Runtime
from torchslim.runtimes.inductor import (
    DEQUANTIZE,
    called,
    compiling,
    has_integer_kernel,
    inputs_kept,
    need_compiler,
    rows_gathered,
)
from torchslim.runtimes.kernel_listing import decomposed
from torchslim.runtimes.scaled_rows import rows_scaled
from torchslim.runtimes.spec import Kernel, Session, Spec

if TYPE_CHECKING:
    from torchslim.runtimes.base import Deployed

aten = torch.ops.aten
SUFFIX = ".aoti.pt2"  # model.pt2 is the exported program
KERNELS = "extra/kernels.json"
SOURCES = (".cpp", "kernel_metadata.json")


def _make(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    need_compiler("aoti")
    need_fixed_steps(captured.program, "aoti")
    program = rows_gathered(rows_scaled(inputs_kept(captured.program)))
    settings: dict[str, Any] = {
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.enable_frame_pointer": False,
        # the machine that loads the file sets the number of threads, not this one
        "cpp.dynamic_threads": True,
    }
    weights = [node for node in program.graph.nodes if decomposed(node) == DEQUANTIZE]
    fallbacks = [node for node in weights if not all(map(has_integer_kernel, node.users))]
    dtypes = [value.dtype for value in (*program.state_dict.values(), *program.constants.values())]
    if not any(has_integer_kernel(node) for node in program.graph.nodes) and {torch.int8, torch.uint8} & set(dtypes):
        # store weights as integers, dequantized once when the file is loaded; freezing would store them as floats
        settings |= {"freezing": False, "aot_inductor.use_runtime_constant_folding": True}
        program = _foldable(program)
    elif fallbacks:
        spec.notes.append(
            f"aoti: {len(fallbacks)} integer weights have no integer kernel and are dequantized in every call; runtime "
            "'inductor' does so once"
        )
    shifts = (node.target is aten.bitwise_right_shift.Tensor_Scalar for node in program.graph.nodes)
    if settings.get("freezing", True) and any(shifts):
        spec.notes.append("aoti: 4-bit weights beside layers with integer kernels are stored as floats")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        try:
            with compiling(**settings):
                torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except Exception as error:
            raise ExportError(
                f"AOTInductor cannot compile the model: {type(error).__name__}: {_brief(error)}; use runtime "
                "'inductor', or 'onnxruntime'"
            ) from error
        payload = _packed(path.read_bytes(), captured)
    return _read(payload, spec, threads), payload


def _foldable(program: ExportedProgram) -> ExportedProgram:
    """Copy of the program that dequantizes weights by plain arithmetic, which the compiler moves out of the calls."""
    program = program.run_decompositions({})  # a copy; nothing is decomposed
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if decomposed(node) == DEQUANTIZE:
            weight, scale, _, axis = node.args[:4]
            shape = [1] * weight.meta["val"].dim()
            shape[axis] = -1
            with graph.inserting_before(node):
                floats = graph.call_function(aten._to_copy.default, (weight,), {"dtype": node.meta["val"].dtype})
                scales = graph.call_function(aten.view.default, (scale, shape))
                value = graph.call_function(aten.mul.Tensor, (floats, scales))
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _packed(data: bytes, captured: Captured) -> bytes:
    """Bytes of the package without source code or traces of this machine, with a list of its kernels."""
    buffer, code = io.BytesIO(), ""
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        for info in source.infolist():
            name, content = f"model/{info.filename.partition('/')[2]}", source.read(info)
            if name.endswith("wrapper.cpp"):
                code = content.decode()
            if name.endswith(".so"):
                content = _without_paths(content)
            if not name.endswith(SOURCES):
                target.writestr(zipfile.ZipInfo(name), content)
        kernels = [
            {"node": kernel.node, "type": kernel.type, "integer": kernel.integer}
            for kernel in called(code, captured.program)
        ]
        target.writestr(zipfile.ZipInfo(f"model/{KERNELS}"), json.dumps(kernels))
    return buffer.getvalue()


def _without_paths(library: bytes) -> bytes:
    """Machine code with the folders of this machine overwritten by slashes."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for folder in (cache_dir(), sysconfig.get_paths()["purelib"], str(Path(torch.__file__).parents[1])):
        library = library.replace(folder.encode(), b"/" * len(folder.encode()))
    return library


class _Loaded:
    """A loaded package."""

    def __init__(self, payload: bytes, threads: int | None) -> None:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            self.kernels = [Kernel(**fields) for fields in json.loads(archive.read(f"model/{KERNELS}"))]
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder) / "model.pt2"
            path.write_bytes(payload)
            self.model = torch._inductor.aoti_load_package(str(path))
        self.threads = threads

    def __call__(self, leaves: list[Tensor], /) -> Sequence[Tensor]:
        with torch.no_grad(), torch_threads(self.threads):
            outputs = self.model(*leaves)
        return list(outputs)


def _read(payload: bytes, spec: Spec, threads: int | None) -> Session:
    try:
        return _Loaded(payload, threads)
    except Exception as error:
        raise DeployError(
            f"the AOTInductor package cannot be loaded: {type(error).__name__}: {_brief(error)}; it was made by "
            "another version of torch or for another processor: deploy the model again here"
        ) from error


def _kernels(deployed: Deployed) -> list[Kernel]:
    session = deployed.session
    assert isinstance(session, _Loaded)
    return list(session.kernels)


def _brief(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


RUNTIME = Runtime(name="aoti", suffix=SUFFIX, make=_make, read=_read, native=True, kernels=_kernels)
