"""Which layer's precision decides how another module computes, and where values change their grid between layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch.export import ExportedProgram

from torchslim.graph.export import layer_of
from torchslim.quantize.schemes import FLOAT, find_scheme

Kind = Literal["float", "static", "dynamic"]
"""How a layer takes its inputs: as floats, on a grid from calibration, or on the grid of each call."""

INPUT = ""
"""Stands for the model's inputs where a module is expected; they are floats."""


def kind_of(scheme: str) -> Kind:
    """How the layers of a scheme take their inputs."""
    return "float" if scheme == FLOAT else find_scheme(scheme).activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Layers with a choice of schemes, and how the other modules hang on them.

    Attributes:
        layers: paths of the layers with a choice.
        before: for each other module, the nearest layers with a choice before it.
        after: for each other module, the nearest layers with a choice after it.
        readers: for each layer with a choice, and for `INPUT`, the nearest layers with a choice that read its output.
    """

    layers: tuple[str, ...]
    before: Mapping[str, tuple[str, ...]]
    after: Mapping[str, tuple[str, ...]]
    readers: Mapping[str, tuple[str, ...]]

    def context(self, path: str, schemes: Mapping[str, str]) -> str:
        """How a module computes: its scheme, or as the layers before and after it do, such as "float static".

        A side is "float", "static" or "mixed"; a side without layers is as the other.
        """
        if path in self.layers:
            return schemes.get(path, FLOAT)
        sides = [self._side(layers.get(path, ()), schemes) for layers in (self.before, self.after)]
        before, after = sides[0] or sides[1] or FLOAT, sides[1] or sides[0] or FLOAT
        return f"{before} {after}"

    def deciders(self, path: str) -> tuple[str, ...]:
        """The layers that decide how a module computes, the nearest on each side first."""
        if path in self.layers:
            return (path,)
        before, after = self.before.get(path, ()), self.after.get(path, ())
        return tuple(dict.fromkeys([*before[-1:], *after[:1], *before, *after]))

    @staticmethod
    def _side(layers: Iterable[str], schemes: Mapping[str, str]) -> str:
        kinds = {"static" if kind_of(schemes.get(layer, FLOAT)) == "static" else FLOAT for layer in layers}
        return "mixed" if len(kinds) > 1 else next(iter(kinds), "")

    def borders(self, path: str, schemes: Mapping[str, str]) -> frozenset[tuple[Kind, Kind]]:
        """The changes of grid between a layer, or the inputs, and the layers that read its output."""
        own: Kind = "float" if path == INPUT else kind_of(schemes.get(path, FLOAT))
        made: Kind = "static" if own == "static" else "float"  # dynamic layers write floats
        kinds = {kind_of(schemes.get(reader, FLOAT)) for reader in self.readers.get(path, ())}
        return frozenset((made, kind) for kind in kinds if kind != made)


def layout_of(program: ExportedProgram, paths: Collection[str], layers: Iterable[str]) -> Layout:
    """The layout of a captured program.

    Args:
        program: the float program.
        paths: paths of the modules that run operations; operations of no such module belong to those before them.
        layers: paths of the layers with a choice of schemes.
    """
    chosen = tuple(layers)
    before: dict[str, set[str]] = {}
    owners: dict[object, set[str]] = {}
    for node in program.graph.nodes:
        sources = {path for source in node.all_input_nodes for path in owners.get(source, ())}
        if node.op != "call_function":
            owners[node] = {INPUT} if node.name in program.graph_signature.user_inputs else set()
        elif (path := layer_of(node)) in paths:
            before.setdefault(path, set()).update(sources - {path})
            owners[node] = {path}
        else:
            owners[node] = sources
    after: dict[str, set[str]] = {}
    for path, sources in before.items():
        for source in sources:
            after.setdefault(source, set()).add(path)
    places = {path: place for place, path in enumerate(before)}

    def nearest(path: str, steps: Mapping[str, set[str]]) -> tuple[str, ...]:
        seen, queue, ends = {path}, sorted(steps.get(path, ())), set[str]()
        while queue:
            step = queue.pop()
            if step in seen:
                continue
            seen.add(step)
            if step in chosen:
                ends.add(step)
            else:
                queue += sorted(steps.get(step, ()))
        return tuple(sorted(ends, key=lambda end: places.get(end, -1)))

    return Layout(
        layers=chosen,
        before={path: nearest(path, before) for path in before if path not in chosen},
        after={path: nearest(path, after) for path in before if path not in chosen},
        readers={path: nearest(path, after) for path in (INPUT, *chosen)},
    )
