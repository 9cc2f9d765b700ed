"""Features inside a model, by the path of a module: watched for a while, in one layout, and nothing stays behind."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from torchslim.distill.align import Shape
from torchslim.errors import DistillError
from torchslim.export import WRAPPED
from torchslim.isolation import preserved_globals
from torchslim.task import tensors

COMPILED = "_orig_mod"  # what torch.compile calls the module inside its own
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "embed_dim", "nf")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

Keep = Callable[[str, Any], None]
"""Takes a module's path and its output."""


@dataclass(frozen=True, slots=True)
class Tap:
    """A module's output as a feature.

    Attributes:
        path: of the module.
        call: which of its calls, where it is called more than once.
        calls: how many there are.
        shape: (channels, *positions).
        batch_dim: of the output.
        channel_dim: of the output, once the batch is its first dimension.
        kind: the class of the module.
        weights: how many parameters the module has.
    """

    path: str
    call: int
    calls: int
    shape: Shape
    batch_dim: int
    channel_dim: int
    kind: str
    weights: int

    @property
    def name(self) -> str:
        """As it is written in `taps`."""
        return self.path if self.calls == 1 else f"{self.path}[{self.call}]"

    @property
    def positions(self) -> Shape:
        """What is left of the shape without the channels."""
        return self.shape[1:]

    def feature(self, output: Tensor) -> Tensor:
        """The output as (batch, channels, *positions), in at least float32."""
        feature = output.movedim(self.batch_dim, 0).movedim(self.channel_dim, 1)
        return feature.to(torch.promote_types(feature.dtype, torch.float32))


class Watch:
    """What some modules put out, call by call.

    Args:
        paths: of the modules.
        copied: those whose outputs the model writes over later.
    """

    def __init__(self, paths: Iterable[str], copied: Iterable[str] = ()) -> None:
        self.outputs: dict[str, list[tuple[Tensor, int]]] = {path: [] for path in paths}
        self.copied = frozenset(copied)

    def clear(self) -> None:
        """Forget the last forward pass."""
        for found in self.outputs.values():
            found.clear()

    def keep(self, path: str, output: Any) -> None:
        """Keep a call's first feature tensor."""
        tensor = first_feature(output)
        if tensor is not None:
            tensor = tensor.clone() if path in self.copied else tensor
            self.outputs[path].append((tensor, tensor._version))

    def features(self, taps: Sequence[Tap]) -> list[Tensor]:
        """The features of the last forward pass.

        Raises:
            DistillError: the model has written over one since.
        """
        changed = self.overwritten() & {tap.path for tap in taps}
        if changed:
            raise DistillError(f"the model writes over the output of {min(changed)!r} in place; tap another module")
        return [tap.feature(self.outputs[tap.path][tap.call][0]) for tap in taps]

    def overwritten(self) -> set[str]:
        """The paths whose outputs the model has written over."""
        return {path for path, found in self.outputs.items() if any(each._version != old for each, old in found)}

    def rehearse(self, model: nn.Module, call: Callable[[], Any]) -> None:
        """Run the model once, and from then on copy what it writes over, as activations in place do."""
        with dry(model):
            for module in model.modules():  # a dropout in place does nothing in eval mode
                module.training = bool(getattr(module, "inplace", False))
            call()
        self.copied = frozenset(self.overwritten())
        self.clear()


def first_feature(output: Any) -> Tensor | None:
    """The first tensor of a module's output that can be a feature."""
    return next((each for each in tensors(output) if each.is_floating_point() and each.dim() > 1), None)


@contextmanager
def watched(model: nn.Module, keep: Keep, paths: Iterable[str]) -> Iterator[None]:
    """Hand what modules put out to `keep`, with their path, until the end of the block.

    What torch.compile has wrapped runs uncompiled meanwhile.

    Args:
        model: a module; a graph that was captured from one is watched at the nodes of the same paths.
        keep: called with a path and an output.
        paths: of its modules.
    """
    owners, paths = modules_by_path(model), list(paths)
    with ExitStack() as stack:
        for path in paths:
            if path in owners:
                handle = owners[path].register_forward_hook(_hook(keep, path))
                stack.callback(handle.remove)
        inside = [path for path in paths if path not in owners]
        if inside:
            stack.enter_context(_watched_graph(graph_of(model), inside, keep))
        if is_compiled(model):  # compiled code does not see hooks that come and go
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by path, the model itself left out; what torch.compile wraps keeps its own paths."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = ".".join(part for part in path.split(".") if part != COMPILED)
        if name:
            found[name] = module  # the wrapped one comes after its wrapper, whose hooks its graph would not see
    return found


def is_compiled(model: nn.Module) -> bool:
    """Has torch.compile wrapped the model, or a module in it?"""
    return any(
        hasattr(module, COMPILED) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _hook(keep: Keep, path: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        keep(path, output)

    return hook


# graphs ---------------------------------------------------------------------------------------------------------------


class _Reader(nn.Module):
    """In a graph: hands its input on. What drops unused nodes leaves it in."""

    _is_impure = True

    def __init__(self, keep: Keep, path: str) -> None:
        super().__init__()
        self.keep, self.path = keep, path

    def forward(self, value: Any) -> None:
        self.keep(self.path, value)


def graph_of(model: nn.Module) -> GraphModule | None:
    """The captured graph inside a model whose modules are gone; None for ordinary models."""
    graphs = [each for each in model.modules() if isinstance(each, GraphModule)]
    return next((each for each in graphs if any(_scopes(node) for node in each.graph.nodes)), None)


def nodes_by_path(program: GraphModule) -> dict[str, Node]:
    """The last node of each module that the graph was captured from."""
    found: dict[str, Node] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(_value(node), Tensor):
            for path in _scopes(node):
                found[path] = node
    return found


@contextmanager
def _watched_graph(program: GraphModule | None, paths: Sequence[str], keep: Keep) -> Iterator[None]:
    known = nodes_by_path(program) if program is not None else {}
    assert program is not None
    assert all(path in known for path in paths)
    added = []
    try:
        for number, path in enumerate(paths):
            name = f"_reader_{number}"
            program.add_submodule(name, _Reader(keep, path))
            with program.graph.inserting_after(known[path]):
                added.append(program.graph.call_module(name, (known[path],)))
        program.recompile()
        yield
    finally:
        for node in added:
            program.graph.erase_node(node)
            program.delete_submodule(str(node.target))
        program.recompile()


def _scopes(node: Node) -> list[str]:
    """The paths of the modules that a node was captured in, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    names = [f"{path}.".removeprefix("L['self'].").removeprefix(WRAPPED).rstrip(".") for path in paths]
    return [name for name in dict.fromkeys(names) if name and name != "L['self']"]


def _value(node: Node) -> Any:
    return node.meta.get("val")


# what there is --------------------------------------------------------------------------------------------------------


def observe(model: nn.Module, call: Callable[[], Any], samples: int) -> list[Tap]:
    """What can be tapped, in the order in which the modules end; the model's own answer is left out.

    Args:
        model: a module, or a graph that was captured from one.
        call: runs it.
        samples: in the batch that `call` runs it on.
    """
    program = graph_of(model)
    owners: Mapping[str, Any] = modules_by_path(model) if program is None else nodes_by_path(program)
    order: list[tuple[str, Any, Shape, tuple[int, int] | None]] = []
    width: tuple[type, int] | None = None

    def keep(path: str, output: Any) -> None:
        nonlocal width
        width = _width(owners[path]) or width
        tensor = first_feature(output)
        if tensor is not None:  # only referred to: all activations of a batch together would be large
            dims = _dims(owners[path], tensor, samples, width)
            shape = () if dims is None else tensor.movedim(dims[0], 0).movedim(dims[1], 1).shape[1:]
            order.append((path, weakref.ref(tensor), tuple(shape), dims))

    with watched(model, keep, owners), dry(model):
        answer = first_feature(call())
        kept = [row for row in order if row[3] is not None and (answer is None or row[1]() is not answer)]
    calls = Counter(path for path, *_ in order)
    number: Counter[str] = Counter()
    place = {}
    for row in order:
        place[id(row)] = number[row[0]]
        number[row[0]] += 1
    return [
        Tap(path, place[id(row)], calls[path], shape, *dims, _kind(owners[path], path), _weights(owners[path]))
        for row in kept
        for path, _, shape, dims in [row]
        if dims is not None
    ]


@contextmanager
def dry(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and the random state given back."""
    modes = [(module, module.training) for module in model.modules()]
    with preserved_globals(), torch.no_grad():
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _width(owner: Any) -> tuple[type, int] | None:
    """The kind of what multiplies or normalises, and how many channels it puts out."""
    if isinstance(owner, Node):
        name, value = str(owner.target), _value(owner)
        if any(f".{each}." in f"{name}." for each in CONVOLUTIONS):
            return nn.Conv2d, value.shape[1]
        return (nn.Linear, value.shape[-1]) if ".linear." in f"{name}." else None
    if not owner._parameters or any(True for _ in owner.children()):
        return None
    width = next((getattr(owner, name) for name in WIDTHS if isinstance(getattr(owner, name, None), int)), None)
    if isinstance(owner, nn.RNNBase):
        width = (owner.proj_size or owner.hidden_size) * (2 if owner.bidirectional else 1)
    elif width is None and isinstance(shape := getattr(owner, "normalized_shape", None), (tuple, list)) and shape:
        width = shape[-1]
    return (type(owner), width) if width is not None else None


def _dims(owner: Any, output: Tensor, samples: int, width: tuple[type, int] | None) -> tuple[int, int] | None:
    """Where the batch and the channels lie; None where the output has no batch."""
    late = isinstance(owner, (nn.RNNBase, nn.MultiheadAttention)) and not owner.batch_first
    sizes = list(output.shape)
    if output.dim() == 2:
        return (0, 1) if sizes[0] == samples else None
    if sizes[0] == samples and not late:
        batch = 0
    elif sizes[1] == samples:
        batch = 1
    else:
        return None
    rest = sizes[:batch] + sizes[batch + 1 :]
    if width is not None and (rest[0] == width[1]) != (rest[-1] == width[1]):
        return batch, 1 if rest[0] == width[1] else -1
    if width is not None:
        return batch, -1 if issubclass(width[0], CHANNELS_LAST) else 1
    return batch, -1 if output.dim() == 3 else 1


def _kind(owner: Any, path: str) -> str:
    if isinstance(owner, nn.Module):
        return type(owner).__name__
    scopes = (owner.meta.get("nn_module_stack") or {}).values()
    return next((str(kind).rpartition(".")[2] for where, kind in scopes if f".{where}".endswith(f".{path}")), "")


def _weights(owner: Any) -> int:
    return sum(each.numel() for each in owner.parameters()) if isinstance(owner, nn.Module) else 1
