"""ExecuTorch: saves a `.pte`, whose layers XNNPACK computes, on phones as on this machine.

A program is lowered to XNNPACK as far as that has kernels; the other operations run on ExecuTorch's portable kernels.
Memory is planned when the program is lowered, so free sizes have bounds: those that the examples show.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from torchslim.core.isolation import quiet
from torchslim.errors import DeployError, ExportError, RuntimeUnavailable
from torchslim.graph.export import Captured, layer_of
from torchslim.graph.io_structure import flatten
from torchslim.runtimes.base import Runtime
from torchslim.runtimes.executorch_passes import for_xnnpack
from torchslim.runtimes.executorch_refusals import NO_KERNEL, refusals
from torchslim.runtimes.executorch_trial import check_pte, survive_pte
from torchslim.runtimes.spec import Kernel, Session, Spec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from torchslim.runtimes.base import Deployed

PIP = "pip install 'torchslim[executorch]'"
PTE = ".pte"
BATCH = 64  # the largest batch where the examples show no larger one
FORWARD, KERNELS = "forward", "torchslim_kernels"
"""Methods of a `.pte`: the model, and a constant text that lists its kernels."""
LAYERS = ("convolution", "linear", "addmm", "mm")
BEFORE_FUSED = (*LAYERS, "add")
FUSED = ("relu", "hardtanh", "clamp")
MOVES = ("getitem", "view_copy", "_to_dim_order_copy", "_clone_dim_order", "clone", "alias_copy", "expand_copy", "view")
PORTABLE = "portable: "
NAMED = 20  # layers that a note names


def _import() -> Any:
    try:
        with quiet():
            from executorch import runtime
    except ImportError as error:
        raise RuntimeUnavailable(f"runtime 'executorch' is not installed: {PIP}") from error
    return runtime


def _make(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    _import()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    program, in_float = for_xnnpack(captured.program)
    with bounded(captured) as bounds, _plain_convolutions(), refusals() as reasons:
        try:
            lowered = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            kernels = list(listed(lowered.exported_program(), reasons))
            text = json.dumps([[each.node, each.type, each.integer, each.fused, each.why] for each in kernels])
            lowered._config_methods = {KERNELS: text}  # only known now; the public way is an argument of the lowering
            payload = bytes(lowered.to_executorch().buffer)
        except Exception as error:
            raise ExportError(
                f"ExecuTorch cannot lower the model: {type(error).__name__}: {_brief(error)}; use runtime "
                "'onnxruntime', or 'eager'"
            ) from error
    if in_float:
        names = ", ".join(in_float[:NAMED]) + (f" and {len(in_float) - NAMED} more" if len(in_float) > NAMED else "")
        spec.notes.append(f"executorch: XNNPACK has no integer kernel for these layers, which run in float: {names}")
    if portable := [kernel for kernel in kernels if kernel.type.startswith(PORTABLE)]:
        spec.notes.append(f"executorch: not on XNNPACK, so slow: {_listed(portable)}")
    if bounds:
        spec.guards.extend(f"s{index}_{dim} <= {bound}" for (index, dim), bound in bounds.items())
        largest = ", ".join(dict.fromkeys(str(bound) for bound in bounds.values()))
        spec.notes.append(f"executorch: free sizes are at most {largest}, as memory is planned for them")
    return _read(payload, spec, threads), payload


@contextmanager
def _plain_convolutions() -> Iterator[None]:
    """Keep torch from choosing its own kernel for convolutions by the batch: a trace would bound it to below 16."""
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


@contextmanager
def bounded(captured: Captured) -> Iterator[dict[tuple[int, int], int]]:
    """Bound the free sizes of a program in the block; yield the bounds by input and dimension, filled at its end.

    A size is bounded by the largest that the examples show; the batch by `BATCH`, if that is larger.
    """
    from torch.utils._sympy.value_ranges import ValueRanges

    shown = [flatten(captured.inputs, captured.example), flatten(captured.inputs, captured.given), *captured.variants]
    bounds: dict[tuple[int, int], int] = {}
    symbols: dict[Any, tuple[Any, int]] = {}
    places: dict[Any, list[tuple[int, int]]] = {}
    for index, value in enumerate(captured.inputs_of_program()):
        for dim, size in enumerate(getattr(value, "shape", ())):
            if isinstance(size, int) or not size.node.expr.is_symbol:
                continue
            largest = max(leaves[index].shape[dim] for leaves in shown)
            environment, bound = symbols.get(size.node.expr, (size.node.shape_env, 0))
            least = BATCH if captured.batched[index] and dim == captured.batch_axis else 0
            symbols[size.node.expr] = environment, max(bound, largest, least)
            places.setdefault(size.node.expr, []).append((index, dim))
    before = {symbol: environment.var_to_range[symbol] for symbol, (environment, _) in symbols.items()}
    try:
        for symbol, (environment, bound) in symbols.items():
            own = before[symbol]
            bound = min(bound, int(own.upper)) if own.upper.is_Integer else bound
            environment.var_to_range[symbol] = ValueRanges(own.lower, bound)
        yield bounds
        for symbol, (environment, _) in symbols.items():  # the lowering may have narrowed them
            bounds |= dict.fromkeys(places[symbol], int(environment.var_to_range[symbol].upper))
    finally:
        for symbol, (environment, _) in symbols.items():
            environment.var_to_range[symbol] = before[symbol]


def _listed(portable: Sequence[Kernel]) -> str:
    """Operations on portable kernels by reason, with their counts."""
    counts = Counter((kernel.why, kernel.type.removeprefix(PORTABLE)) for kernel in portable)
    by_reason: dict[str, list[str]] = {}
    for (why, operation), count in counts.items():
        by_reason.setdefault(why, []).append(f"{count} {operation}" if count > 1 else operation)
    return "; ".join(f"{', '.join(operations[:NAMED])} ({why})" for why, operations in by_reason.items())


def listed(program: ExportedProgram, reasons: Mapping[str, str]) -> Iterator[Kernel]:
    """The kernels of a lowered program: those of XNNPACK, and portable ones, with the partitioner's reasons.

    Args:
        program: lowered.
        reasons: of the partitioner, by the nodes' names.
    """
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if "executorch_call_delegate" in str(node.target):
            module = program.graph_module.get_submodule(str(node.args[0].target))
            yield from _delegated(module.original_module.graph.nodes)
        elif (name := _operation(node)) not in MOVES and not name.startswith("sym_"):
            why = reasons.get(node.name, NO_KERNEL)
            yield Kernel(node=f"{layer_of(node)}/{name}", type=f"{PORTABLE}{name}", integer=False, why=why)


def _delegated(nodes: Sequence[Node]) -> Iterator[Kernel]:
    """The kernels of a part that XNNPACK computes; an activation behind a layer belongs to the layer's kernel."""
    for node in nodes:
        if node.op != "call_function":
            continue
        name = _operation(node)
        if "quantize_per" in name or "qparams" in name or name in MOVES or _inside_layer(node):
            continue
        fused = tuple(
            f"{layer_of(user)}/{_operation(user)}"
            for user in node.users
            if len(node.users) == 1 and _inside_layer(user)
        )
        own = f"{layer_of(node)}/{name}"
        yield Kernel(
            node=own, type=f"xnnpack: {name}", integer=_on_integers(node, name), fused=(own, *fused) if fused else ()
        )


def _operation(node: Node) -> str:
    """Name of an operation without its namespace and overload."""
    name = str(getattr(node.target, "__name__", node.target))
    return name.removeprefix("aten.").removeprefix("quantized_decomposed.").partition(".")[0]


def _inside_layer(node: Node) -> bool:
    """Whether an activation has a convolution, linear layer or addition before it, which has no other reader."""
    source = node.args[0] if node.args else None
    return (
        _operation(node) in FUSED
        and isinstance(source, Node)
        and source.op == "call_function"
        and _operation(source) in BEFORE_FUSED
        and len(source.users) == 1
    )


def _on_integers(node: Node, name: str) -> bool:
    sources = node.all_input_nodes
    if name in LAYERS:
        return any("dequantize" in _operation(source) for source in sources)
    return bool(sources) and all("dequantize" in _operation(source) for source in sources)


class _Pool:
    """The threads of ExecuTorch, which belong to the whole process.

    A loaded program keeps the threads that it was loaded with, and calling it after they were replaced crashes the
    process. So a change of their number makes a new generation, for which programs are loaded again.
    """

    def __init__(self) -> None:
        self.lock, self.generation, self.own_choice = threading.RLock(), 0, 0

    def set(self, threads: int | None) -> int:
        """Make ExecuTorch compute with `threads`, None for its own choice; return the generation of the threads."""
        from executorch.extension.pybindings import portable_lib

        count = portable_lib._threadpool_get_thread_count()
        self.own_choice = self.own_choice or count
        wanted = threads or self.own_choice
        if count != wanted:
            portable_lib._unsafe_reset_threadpool(wanted)
            self.generation += 1
        return self.generation


POOL = _Pool()


class _Loaded:
    """A loaded program; calls from several threads take turns, as its memory is planned for one."""

    def __init__(self, payload: bytes, threads: int | None) -> None:
        self.runtime, self.payload, self.threads = _import().Runtime.get(), payload, threads
        self.generation = -1
        with POOL.lock:
            self._load()

    def __call__(self, leaves: list[Tensor], /) -> Sequence[Tensor]:
        with POOL.lock:
            self._load()
            outputs = self.forward.execute([leaf.contiguous() for leaf in leaves])
        return [output if isinstance(output, Tensor) else torch.tensor(output) for output in outputs]

    def _load(self) -> None:
        generation = POOL.set(self.threads)
        if generation != self.generation:
            self.program = self.runtime.load_program(self.payload)
            self.forward = self.program.load_method(FORWARD)
            self.generation = generation

    def kernels(self) -> list[Kernel]:
        """The kernels that the file lists."""
        with POOL.lock:
            self._load()
            (text,) = self.program.load_method(KERNELS).execute([])
        return [
            Kernel(node=node, type=type_, integer=integer, fused=tuple(fused), why=why)
            for node, type_, integer, fused, why in json.loads(text)
        ]


def _read(payload: bytes, spec: Spec, threads: int | None) -> Session:
    try:
        return _Loaded(payload, threads)
    except RuntimeUnavailable:
        raise
    except Exception as error:
        raise _unfit(f"{type(error).__name__}: {_brief(error)}") from error


def _kernels(deployed: Deployed) -> list[Kernel]:
    session = deployed.session
    assert isinstance(session, _Loaded)
    return session.kernels()


def _unfit(message: str) -> DeployError:
    return DeployError(f"ExecuTorch cannot run the model: {message[:300]}; use runtime 'onnxruntime', or 'eager'")


def _brief(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def _check(files: Mapping[str, bytes]) -> None:
    check_pte(files[PTE])


def _try(files: Mapping[str, bytes], example: Sequence[Tensor]) -> None:
    _import()
    if message := survive_pte({PTE: files[PTE]}, example):
        raise _unfit(message)


RUNTIME = Runtime(
    name="executorch",
    suffix=PTE,
    make=_make,
    read=_read,
    check=_check,
    trial=_try,
    kernels=_kernels,
    converts=True,
)
