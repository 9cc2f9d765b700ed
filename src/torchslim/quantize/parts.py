"""Quantize parts of a model, as the whole model calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from torchslim.core.isolation import copy_model
from torchslim.core.part_calls import recorded_calls
from torchslim.core.parts import Mounted, mounted, part_view, patterns_inside, select_parts
from torchslim.core.program_names import first_programs, numbered, split_name
from torchslim.core.step import Inputs
from torchslim.core.tensor_objects import of_structure
from torchslim.errors import QuantizeError
from torchslim.graph.calling import examples_of
from torchslim.graph.capturable import examples_of_programs
from torchslim.graph.export import WRAPPED

Layers = Mapping[str, str]
T = TypeVar("T", bound=nn.Module)


def by_part(
    model: nn.Module,
    part: str | Sequence[str],
    inputs: Inputs | list[Inputs],
    layers: Layers | None,
    make: Callable[[nn.Module, list[Inputs], Layers], nn.Module],
) -> nn.Module:
    """A copy of the model in which each part is replaced by what `make` returns for its programs.

    Args:
        model: never modified.
        part: names or globs of submodules.
        inputs: of the whole model; all calls of the parts on them are recorded.
        layers: schemes by pattern over the names of the whole model.
        make: called with a part, the inputs of its calls of one structure, and the schemes by the names inside of it.

    Raises:
        SelectError: a pattern of `part` names no submodule.
        TaskError: a part is never called on the inputs.
        QuantizeError: a pattern of `layers` names nothing inside of the parts.
    """
    paths = select_parts(model, part)
    check_layers(model, paths, layers or {})
    calls = recorded_calls(model, paths, examples_of(inputs))
    made = {}
    for name, examples in examples_of_programs(model, calls).items():
        path, _ = split_name(name)
        own = of_structure(calls[path], examples[0])
        made[name] = make(part_view(model, name, examples[0]), own, layers_inside(model, path, layers or {}))
    return mounted(copy_model(model)[0], made)


def check_layers(model: nn.Module, paths: Sequence[str], layers: Layers) -> None:
    """Raise QuantizeError for a pattern that names nothing inside of the parts."""
    found = dict.fromkeys(layers, 0)
    for path in paths:
        for pattern, names in patterns_inside(model, path, layers).items():
            found[pattern] += len(names)
    if missing := next((pattern for pattern, count in found.items() if not count), None):
        parts = ", ".join(map(repr, paths))
        raise QuantizeError(f"layers: pattern {missing!r} names no layer of the parts {parts}; name one in them")


def layers_inside(model: nn.Module, path: str, layers: Layers) -> dict[str, str]:
    """`layers` over the names inside of a part; the last entry for a name counts, as in `layers`."""
    named: dict[str, str] = {}
    for pattern, names in patterns_inside(model, path, layers).items():
        for name in names:
            named.pop(name, None)
            named[name] = layers[pattern]
    return named


def share_weights(whole: nn.Module, prepared: Mapping[str, nn.Module]) -> None:
    """Make prepared graphs train the weights of the parts that they are mounted on, in place of copies.

    So calls that fall back to a part use the trained weights, and weights that a part shares with the rest of the model
    stay shared. Weights that the graph holds in another form keep their own copies.
    """
    for path, graph in prepared.items():
        part = _float_part(whole, path)
        if part is None:
            continue
        for name, parameter in part.named_parameters(remove_duplicate=False):
            owner, own = _in_graph(graph, name)
            if owner is None or own is None or own.shape != parameter.shape or own.dtype != parameter.dtype:
                continue
            with torch.no_grad():
                parameter.copy_(own)  # equalization may have scaled it
            parameter.requires_grad_(own.requires_grad)
            owner._parameters[name.rpartition(".")[2]] = parameter


def take_back(whole: nn.Module, prepared: Mapping[str, nn.Module]) -> None:
    """Copy the trained weights and statistics of the parts' first graphs to the parts that they are mounted on."""
    for path in first_programs(prepared):
        graph = prepared[path]
        part = _float_part(whole, path)
        if part is None:
            continue
        values = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        for name, value in values.items():
            _, own = _in_graph(graph, name)
            if own is not None and own.shape == value.shape:
                with torch.no_grad():
                    value.copy_(own)


def _float_part(whole: nn.Module, path: str) -> nn.Module | None:
    """The module behind a mounted graph; None for a graph of the whole model."""
    path, _ = split_name(path)
    module = whole.get_submodule(path) if path else None
    return module.part if isinstance(module, Mounted) else None


def _in_graph(graph: nn.Module, name: str) -> tuple[nn.Module | None, Tensor | None]:
    """The module of a graph that holds a tensor of the model that it was captured from, and the tensor."""
    path, _, last = f"program.{WRAPPED}{name}".rpartition(".")
    try:
        owner = graph.get_submodule(path)
    except AttributeError:
        return None, None  # the graph does not read it
    value = owner._parameters.get(last, owner._buffers.get(last))
    return owner, value


def mounted_of(model: nn.Module, kind: type[T]) -> dict[str, T]:
    """The mounted graphs of a kind, by name."""
    return {
        numbered(path, number): graph
        for path, module in model.named_modules()
        if isinstance(module, Mounted)
        for number, graph in module.programs.items()
        if isinstance(graph, kind)
    }
