"""Taps: features inside a model by module path, read in one layout by hooks that are removed after use."""

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
from torchslim.core.train_modes import eval_mode
from torchslim.core.trees import tensors
from torchslim.distill.features.align import Shape
from torchslim.distill.features.padding import Padding
from torchslim.errors import DistillError
from torchslim.graph.export import WRAPPED

COMPILED = "_orig_mod"  # name of the wrapped module inside that of torch.compile
Keep = Callable[[str, Any], None]
"""A callback that receives a module's path and its output."""


@dataclass(frozen=True, slots=True)
class Tap:
    """A module's output as a feature.

    Attributes:
        path: of the module.
        call: index of the call, if the module is called more than once.
        calls: number of calls of the module.
        shape: (channels, *positions).
        batch_dim: batch dimension of the output.
        channel_dim: channel dimension of the output, once the batch is its first dimension.
        padding: which mask of a batch applies to the positions; None if none does.
        kind: the class of the module.
        weights: number of parameters of the module.
        patches: for tokens of an image: the number of tokens that come first, such as a class token, and the grid of
            the others.
        first: positions before this one are left out.
        grid: grid that the tokens are laid out on.
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
        """Name of the tap, as written in `taps`."""
        return self.path if self.calls == 1 else f"{self.path}[{self.call}]"

    @property
    def positions(self) -> Shape:
        """Shape without the channels."""
        return self.shape[1:]

    def on_grid(self) -> Tap:
        """The tap with the tokens of an image as a map, without tokens that are not part of the image."""
        assert self.patches is not None
        first, grid = self.patches
        return replace(self, shape=(self.shape[0], *grid), padding=None, first=first, grid=grid)

    def without_first(self) -> Tap:
        """The tap without the positions before the first one of the mask."""
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
    """Outputs of some modules, call by call.

    Args:
        paths: of the modules.
        copied: paths whose outputs are copied, because the model overwrites them later.
    """

    def __init__(self, paths: Iterable[str], copied: Iterable[str] = ()) -> None:
        self.outputs: dict[str, list[tuple[Tensor, int]]] = {path: [] for path in paths}
        self.copied = frozenset(copied)

    def clear(self) -> None:
        """Drop the outputs of the last forward pass."""
        for calls in self.outputs.values():
            calls.clear()

    def keep(self, path: str, output: Any) -> None:
        """Keep the first feature tensor of a call's output."""
        tensor = first_feature(output)
        if tensor is not None:
            tensor = tensor.clone() if path in self.copied else tensor
            self.outputs[path].append((tensor, tensor._version))

    def features(self, taps: Sequence[Tap]) -> list[Tensor | None]:
        """Features of the last forward pass; None for a tap that was not run in it, such as a dropped layer.

        Raises:
            DistillError: the model has overwritten an output since.
        """
        changed = self.overwritten() & {tap.path for tap in taps}
        if changed:
            raise DistillError(f"the model writes over the output of {min(changed)!r} in place; tap another module")
        calls = [self.outputs[tap.path][tap.call : tap.call + 1] for tap in taps]
        return [tap.feature(call[0][0]) if call else None for tap, call in zip(taps, calls, strict=True)]

    def overwritten(self) -> set[str]:
        """Paths whose outputs the model has overwritten."""
        return {path for path, calls in self.outputs.items() if any(tensor._version != old for tensor, old in calls)}

    def rehearse(self, model: nn.Module, call: Callable[[], Any]) -> None:
        """Run the model once, and from then on copy outputs that it overwrites, as in-place activations do."""
        with dry(model):
            for module in model.modules():  # an in-place dropout does nothing in eval mode
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
    """Call `keep` with the path and output of every module that runs, until the end of the block.

    Modules wrapped by torch.compile run uncompiled meanwhile.

    Args:
        model: a module, or a graph captured from one, which is watched at the nodes of the same paths.
        keep: called with a path and an output.
        paths: of the modules.
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
        if is_compiled(model):  # compiled code ignores hooks that are added or removed later
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by path, without the model itself; modules wrapped by torch.compile keep their own paths."""
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = ".".join(part for part in path.split(".") if part != COMPILED)
        if name:
            modules[name] = module  # the wrapped module comes after its wrapper, whose hooks its graph would not see
    return modules


def is_compiled(model: nn.Module) -> bool:
    """Is the model, or a module in it, wrapped by torch.compile?"""
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
    """Module added to a graph, passes its input to `keep`; impure, so that removal of unused nodes leaves it in."""

    _is_impure = True

    def __init__(self, keep: Keep, path: str) -> None:
        super().__init__()
        self.keep, self.path = keep, path

    def forward(self, value: Any) -> None:
        self.keep(self.path, value)


def graph_of(model: nn.Module) -> GraphModule | None:
    """Captured graph inside a model that has lost its modules; None for ordinary models."""
    graphs = [module for module in model.modules() if isinstance(module, GraphModule)]
    return next((graph for graph in graphs if any(_scopes(node) for node in graph.graph.nodes)), None)


def nodes_by_path(program: GraphModule) -> dict[str, Node]:
    """Last node of each module that the graph was captured from, by path."""
    nodes: dict[str, Node] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            for path in _scopes(node):
                nodes[path] = node
    return nodes


@contextmanager
def _watched_graph(program: GraphModule | None, paths: Sequence[str], keep: Keep) -> Iterator[None]:
    nodes = nodes_by_path(program) if program is not None else {}
    assert program is not None
    assert all(path in nodes for path in paths)
    added = []
    try:
        for number, path in enumerate(paths):
            name = f"_reader_{number}"
            program.add_submodule(name, _Reader(keep, path))
            with program.graph.inserting_after(nodes[path]):
                added.append(program.graph.call_module(name, (nodes[path],)))
        program.recompile()
        yield
    finally:
        for node in added:
            program.graph.erase_node(node)
            program.delete_submodule(str(node.target))
        program.recompile()


def _scopes(node: Node) -> list[str]:
    """Paths of the modules that a node was captured in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    names = [f"{path}.".removeprefix("L['self'].").removeprefix(WRAPPED).rstrip(".") for path in paths]
    return [name for name in dict.fromkeys(names) if name and name != "L['self']"]


@contextmanager
def dry(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; restore the modes and the random state after it."""
    with preserved_globals(), torch.no_grad(), eval_mode(model):
        yield
