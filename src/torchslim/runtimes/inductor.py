"""`torch.compile`: fused C++ kernels, compiled on this machine; saves no file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from torchslim.core.isolation import quiet
from torchslim.errors import RuntimeUnavailable
from torchslim.graph.export import Captured, layer_of, module_of
from torchslim.graph.io_structure import flatten
from torchslim.graph.recurrent_shapes import need_fixed_steps
from torchslim.runtimes.base import Runtime
from torchslim.runtimes.eager import session_of
from torchslim.runtimes.kernel_listing import decomposed
from torchslim.runtimes.scaled_rows import rows_scaled
from torchslim.runtimes.spec import Kernel, Session, Spec

if TYPE_CHECKING:
    from torchslim.runtimes.base import Deployed

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)
WEIGHTED = (
    *CONVOLUTIONS,
    aten.linear.default,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.lstm.input,
    aten.gru.input,
    aten.matmul.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.mm.default,
)
INTEGER = ("qconv_pointwise", "qconv2d_pointwise", "qlinear_pointwise", "quantized.max_pool2d", "_int8pack_mm")
DEQUANTIZE = "dequantize_per_channel.default"
WORK = re.compile("conv|linear|rnn|mm|lstm|gru")
COMMENT = "Topologically Sorted Source Nodes: ["
LOOP = re.compile(r"(cpp_fused\w*)\(.*\);?$")
CALL = re.compile(
    r"(?:\w+ = )?(?:torch\.ops\.((?:onednn|mkldnn|mkl|quantized|aten)\.\w+)(?:\.\w+)?|(extern_kernels\.\w+)|"
    r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_cpu_(\w+))\("
)
SETTINGS: Mapping[str, Any] = {
    # folds the weights into the kernels' layouts; without it no integer kernel is chosen
    "freezing": True,
    # sizes are checked before a call; these asserts also write addresses of this process into the code
    "size_asserts": False,
    "alignment_asserts": False,
}


def need_compiler(name: str) -> None:
    """Raise RuntimeUnavailable if there is no C++ compiler."""
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        raise RuntimeUnavailable(f"runtime {name!r} needs a C++ compiler: apt-get install g++")


@contextmanager
def compiling(**settings: Any) -> Iterator[None]:
    """Let torch compile graphs of integers to integer kernels in the block."""
    import torch._inductor.config as inductor_config

    with quiet():
        # registers the passes that lower int8 graphs; without them such a graph runs several times slower, silently
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401

        with torch.no_grad(), inductor_config.patch({**SETTINGS, **settings}):
            yield


def inputs_kept(program: ExportedProgram) -> ExportedProgram:
    """The program, changed so that its kernels do not write into its inputs.

    torch compiles a linear layer or convolution and the addition of another tensor to one kernel that adds in place:
    into the caller's tensor if that tensor is an input of the program. So additions read the input through a clamp at
    infinity, which changes no value. The compiler does not remove the clamp; it becomes part of another kernel.
    """
    input_names = set(program.graph_signature.user_inputs)

    def written(node: Node) -> list[Node]:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in input_names or not isinstance(value, Tensor):
            return []
        users = [user for user in node.users if user.op == "call_function" and user.target not in WEIGHTED]
        return [user for user in users if not decomposed(user)] if value.is_floating_point() else []

    if not any(node.target in WEIGHTED for node in program.graph.nodes) or not any(map(written, program.graph.nodes)):
        return program
    program = program.run_decompositions({})  # a copy; nothing is decomposed
    input_names = set(program.graph_signature.user_inputs)
    graph = program.graph_module.graph
    first = next(node for node in graph.nodes if node.op == "call_function")
    for node in list(graph.nodes):
        users = written(node)
        if users:
            with graph.inserting_before(first):
                clamped = graph.call_function(aten.clamp_max.default, (node, float("inf")))
            clamped.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, clamped)
    program.graph_module.recompile()
    return program


def rows_gathered(program: ExportedProgram) -> ExportedProgram:
    """The program, changed so that integer linear layers read rows that are contiguous in memory.

    Other rows are multiplied as batches of matrices, for which torchao's pass fails where a size is not fixed.
    """

    def scattered(node: Node) -> Node | None:
        """The node that quantizes a layer's input, if the input is a view that is not contiguous."""
        if node.target is not aten.linear.default or not has_integer_kernel(node):
            return None
        rounded = node.args[0].args[0]  # type: ignore[union-attr]
        value = rounded.args[0].meta.get("val") if isinstance(rounded, Node) else None  # type: ignore[union-attr]
        strided = isinstance(value, Tensor) and value.dim() > 2 and not value.is_contiguous()
        return rounded if strided and isinstance(rounded, Node) else None

    if not any(scattered(node) for node in program.graph.nodes):
        return program
    program = program.run_decompositions({})  # a copy; nothing is decomposed
    graph = program.graph_module.graph
    for node in dict.fromkeys(filter(None, map(scattered, graph.nodes))):
        source = node.args[0]
        with graph.inserting_before(node):
            gathered = graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
        gathered.meta = dict(source.meta) | {"val": source.meta["val"].contiguous()}  # type: ignore[union-attr]
        node.replace_input_with(source, gathered)  # type: ignore[arg-type]
    program.graph_module.recompile()
    return program


def fold_weights(module: GraphModule) -> None:
    """Dequantize weights that no integer kernel reads, once; compiled code would dequantize them in every call."""
    for node in list(module.graph.nodes):
        if decomposed(node) != DEQUANTIZE or all(map(has_integer_kernel, node.users)):
            continue
        arguments = [
            attrgetter(str(argument.target))(module).detach() if isinstance(argument, Node) else argument
            for argument in node.args
        ]
        with module.graph.inserting_before(node):
            name = f"_folded_{node.name}"
            module.register_buffer(name, node.target(*arguments))
            folded = module.graph.get_attr(name)
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def has_integer_kernel(node: Node) -> bool:
    """Whether `node` is a layer with an integer weight that an integer kernel computes."""
    if node.target not in (*CONVOLUTIONS, aten.linear.default):
        return False
    source, weight = map(decomposed, node.args[:2])
    return weight == DEQUANTIZE and source == "dequantize_per_tensor.default"


class _Compiled:
    """A compiled module and the code that was generated for it."""

    def __init__(self, captured: Captured, threads: int | None) -> None:
        need_fixed_steps(captured.program, "inductor")
        module = module_of(rows_gathered(rows_scaled(inputs_kept(captured.program))))
        fold_weights(module)
        self.program = captured.program
        self.run: Callable[[list[Tensor]], Sequence[Tensor]] = session_of(torch.compile(module), threads)
        self.seen: set[tuple[torch.Size, ...]] = set()
        self.codes: list[str] = []

    def __call__(self, leaves: list[Tensor], /) -> list[Tensor]:
        sizes = tuple(leaf.shape for leaf in leaves)
        if sizes in self.seen:
            return list(self.run(leaves))
        # torch.compile reads the settings while it compiles: at the first call, and again when a size changes
        with compiling(), codes_kept(self.codes):
            outputs = list(self.run(leaves))
        self.seen.add(sizes)
        return outputs


@contextmanager
def codes_kept(codes: list[str]) -> Iterator[None]:
    """Append the generated code of every graph that is compiled in the block to `codes`."""
    from torch._inductor.graph import GraphLowering

    with mock.patch.object(GraphLowering, "save_output_code", codes.append):
        yield


def called(code: str, program: ExportedProgram) -> list[Kernel]:
    """Library kernels and fused loops that generated code calls, named by the layers of the program."""
    nodes = {node.name: node for node in program.graph.nodes}
    kernels, assigned = [], set[Node]()
    sources: list[Node] = []
    for line in code.splitlines():
        text = line.strip()
        if COMMENT in text:
            names = text.partition(COMMENT)[2].partition("]")[0].split(", ")
            sources = [nodes[name] for name in names if name in nodes]
        elif loop := LOOP.match(text):
            kernels.append(Kernel(node=loop[1], type="C++ loop", integer=False))
        elif call := CALL.match(text):
            kind = next(filter(None, call.groups())).strip("_")
            kind = re.sub("_(binary_)?tensor$", "", kind)
            origin = _origin(program, kind, sources, assigned)
            path = layer_of(origin) if origin else ""
            kernels.append(Kernel(node=f"{path}/{kind}" if path else kind, type=kind, integer=kind.endswith(INTEGER)))
            sources = []
    return kernels


def _origin(program: ExportedProgram, kind: str, sources: Sequence[Node], assigned: set[Node]) -> Node | None:
    """Node whose layer a kernel computes; a node with weights is added to `assigned`.

    The search goes back from the last node that was fused into the kernel to the first one with weights. If the code
    names none, it is the program's next node with weights that is not in `assigned`.
    """
    queue, seen = list(reversed(sources)), set[Node]()
    weighted: list[Node] = [node for node in program.graph.nodes if node.target in WEIGHTED and node not in assigned]
    while queue and WORK.search(kind):
        node = queue.pop(0)
        if node in weighted:
            assigned.add(node)
            return node
        if node not in seen and node.target not in WEIGHTED:
            queue += [input_ for input_ in node.all_input_nodes if input_.op == "call_function"]
        seen.add(node)
    if WORK.search(kind) and weighted and "rnn" not in kind:
        assigned.add(weighted[0])
        return weighted[0]
    return sources[-1] if sources else None


def _make(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    need_compiler("inductor")
    session = _Compiled(captured, threads)
    session(flatten(captured.inputs, captured.example))
    return session, None


def _kernels(deployed: Deployed) -> list[Kernel]:
    """Kernels of the code that was generated last."""
    session = deployed.session
    assert isinstance(session, _Compiled)
    return called(session.codes[-1], session.program) if session.codes else []


RUNTIME = Runtime(
    name="inductor",
    suffix=None,
    make=_make,
    kernels=_kernels,
    no_file="it compiles on the machine where it runs; save another runtime's file, or the model with ts.save",
)
