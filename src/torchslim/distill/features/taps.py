"""Features inside a model, by the path of a module: watched for a while, in one layout, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from torchslim.core.isolation import preserved_globals
from torchslim.core.trees import tensors
from torchslim.distill.features.align import Shape
from torchslim.distill.features.padding import Padding
from torchslim.errors import DistillError
from torchslim.graph.export import WRAPPED

COMPILED = "_orig_mod"  # what torch.compile calls the module inside its own
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
        padding: which mask of a batch lies over the positions; None where none does.
        kind: the class of the module.
        weights: how many parameters the module has.
        patches: of tokens of an image: how many come first, such as a class token, and the grid of the others.
        first: positions before this one are left out.
        grid: tokens are laid out on it.
    """

    path: str
    call: int
    calls: int
    shape: Shape
    batch_dim: int
    channel_dim: int
    padding: Padding | None
    kind: str
    weights: int
    patches: tuple[int, Shape] | None = None
    first: int = 0
    grid: Shape = ()

    @property
    def name(self) -> str:
        """As it is written in `taps`."""
        return self.path if self.calls == 1 else f"{self.path}[{self.call}]"

    @property
    def positions(self) -> Shape:
        """What is left of the shape without the channels."""
        return self.shape[1:]

    def on_grid(self) -> Tap:
        """The tokens of an image as a map, without those that are no part of it."""
        assert self.patches is not None
        first, grid = self.patches
        return replace(self, shape=(self.shape[0], *grid), padding=None, first=first, grid=grid)

    def without_first(self) -> Tap:
        """Without the positions before those that the mask is of."""
        assert self.padding is not None
        assert self.padding.extra is not None
        first = self.padding.extra
        return replace(
            self, shape=(self.shape[0], self.shape[1] - first), padding=Padding(self.padding.mask, 0), first=first
        )

    def feature(self, output: Tensor) -> Tensor:
        """The output as (batch, channels, *positions), in at least float32."""
        feature = output.movedim(self.batch_dim, 0).movedim(self.channel_dim, 1)
        if self.first or self.grid:
            feature = feature[:, :, self.first :]
            feature = feature.unflatten(2, self.grid) if self.grid else feature
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

    def features(self, taps: Sequence[Tap]) -> list[Tensor | None]:
        """The features of the last forward pass; None of what was not run in it, such as a layer that was dropped.

        Raises:
            DistillError: the model has written over one since.
        """
        changed = self.overwritten() & {tap.path for tap in taps}
        if changed:
            raise DistillError(f"the model writes over the output of {min(changed)!r} in place; tap another module")
        found = [self.outputs[tap.path][tap.call : tap.call + 1] for tap in taps]
        return [tap.feature(each[0][0]) if each else None for tap, each in zip(taps, found, strict=True)]

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
    """The first tensor of a module's output that can be a feature; a packed sequence is padded, batch first."""
    first = output[0] if type(output) in (tuple, list) and output else output
    if isinstance(first, PackedSequence):
        return pad_packed_sequence(first, batch_first=True)[0]
    return next((tensor for tensor in tensors(output) if tensor.is_floating_point() and tensor.dim() > 1), None)


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
    graphs = [module for module in model.modules() if isinstance(module, GraphModule)]
    return next((graph for graph in graphs if any(_scopes(node) for node in graph.graph.nodes)), None)


def nodes_by_path(program: GraphModule) -> dict[str, Node]:
    """The last node of each module that the graph was captured from."""
    found: dict[str, Node] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
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
