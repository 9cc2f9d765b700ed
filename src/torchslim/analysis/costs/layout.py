"""Where values change their grid between the modules of a model, by the schemes of its layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch.export import ExportedProgram

from torchslim.graph.export import layer_of
from torchslim.quantize.schemes import FLOAT, find_scheme

Kind = Literal["float", "static", "dynamic"]
"""How a layer takes its inputs: as floats, on a grid from calibration, or on the grid of each call."""

INPUT = "<input>"
"""Stands for the model's inputs where a module is expected; they are floats."""

OUTPUT = "<output>"
"""Stands for the model's outputs among readers; they are floats."""

Pass = tuple[str, str]
"""The grid of a value, "input", "float" or "static", and how a reader takes it."""


def kind_of(scheme: str) -> Kind:
    """How the layers of a scheme take their inputs."""
    return "float" if scheme == FLOAT else find_scheme(scheme).activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """An operation of the float program: the module that runs it, and the places of the operations that it reads."""

    path: str
    sources: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layers with a choice of schemes, and how the other modules hang on them.

    Values get a grid of their own at *stations*: the model's inputs, layers with a choice, and operations that join
    several values, such as an addition. Other operations keep the grid of what they read. A join is on a grid if any of
    its values is, unless its module is one of `floats`.

    Args:
        operations: of the float program in the order of execution; the inputs have the path `INPUT`.
        ends: places of the operations that the program returns.
        layers: paths of the layers with a choice.
        paths: of the modules that run operations.
        outside: names of operations outside of all modules, without their numbers.
        floats: paths of modules without a choice that compute on floats whatever is around them.
    """

    operations: tuple[Operation, ...]
    ends: tuple[int, ...]
    layers: tuple[str, ...]
    paths: frozenset[str]
    outside: frozenset[str] = frozenset()
    floats: frozenset[str] = frozenset()

    def owner(self, node: str) -> str | None:
        """The path of the module that a node of a program belongs to; None for casts and changes of layout.

        Args:
            node: name of the node: its module's path, a slash and its operation; outside of modules the operation's
                name in place of the path.
        """
        path, slash, _ = node.rpartition("/")
        if not slash:
            return None
        if path in self.paths:
            return path
        return "" if "" in self.paths and _unnumbered(path) in self.outside else None

    @cached_property
    def _reads(self) -> tuple[dict[str, set[str]], dict[str, str]]:
        """For each station the stations that it reads, and for each path the station of its last operation."""
        reads: dict[str, set[str]] = {INPUT: set()}
        last: dict[str, str] = {}
        values: list[set[str]] = []
        for operation in self.operations:
            path = operation.path
            sources = set[str]().union(*(values[place] for place in operation.sources))
            if path == INPUT:
                sources = {INPUT}
            elif path in self.layers or path in self.floats or len(sources) > 1:
                reads.setdefault(path, set()).update(sources - {path})
                sources = {path}
            values.append(sources)
            if sources and path != INPUT:
                last[path] = next(iter(sources))
        reads[OUTPUT] = set[str]().union(*(values[place] for place in self.ends))
        return reads, last

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """For each station the stations that read its values, and `OUTPUT`."""
        reads, _ = self._reads
        return {
            station: tuple(reader for reader, sources in reads.items() if station in sources)
            for station in reads
            if station != OUTPUT
        }

    @cached_property
    def deciding(self) -> dict[str, tuple[str, ...]]:
        """For each station the layers that decide about its grid, in the order of execution."""
        reads, _ = self._reads
        places = {station: place for place, station in enumerate(reads)}

        def found(station: str, seen: set[str]) -> set[str]:
            if station in self.layers:
                return {station}
            if station in seen or station in self.floats or station == OUTPUT:
                return set()
            seen.add(station)
            return set[str]().union(*(found(source, seen) for source in reads[station]))

        return {station: tuple(sorted(found(station, set()), key=places.__getitem__)) for station in reads}

    def station(self, path: str) -> str:
        """The station whose grid the values of a module are on."""
        reads, last = self._reads
        return path if path in reads else last.get(path, INPUT)

    def context(self, path: str, schemes: Mapping[str, str]) -> str:
        """How a module computes: its scheme, or the grid of its values and how they are read, such as "float static".

        Readers take values as "float", "static" or "mixed".
        """
        if path in self.layers:
            return schemes.get(path, FLOAT)
        station = self.station(path)
        taken = {"static" if kind == "static" else FLOAT for kind in self._kinds(station, schemes)}
        return f"{self.grid(station, schemes)} {'mixed' if len(taken) > 1 else next(iter(taken), FLOAT)}"

    def grid(self, station: str, schemes: Mapping[str, str]) -> str:
        """The grid of a station's values: "static" or "float"."""
        kinds = {kind_of(schemes.get(layer, FLOAT)) for layer in self.deciding[station]}
        return "static" if "static" in kinds else FLOAT  # dynamic layers write floats

    def passes(self, station: str, schemes: Mapping[str, str]) -> Counter[Pass]:
        """How a station's values are passed on to their readers, with the number of readers of each kind."""
        made = "input" if station == INPUT else self.grid(station, schemes)
        return Counter((made, kind) for kind in self._kinds(station, schemes))

    def _kinds(self, station: str, schemes: Mapping[str, str]) -> list[str]:
        """How each reader of a station takes its values."""
        return [
            kind_of(schemes.get(reader, FLOAT)) if reader in self.layers else self.grid(reader, schemes)
            for reader in self.readers[station]
        ]

    def deciders(self, path: str) -> tuple[str, ...]:
        """The layers that decide how a module computes and how its values are passed on, the nearest first."""
        station = self.station(path)
        own = reversed(self.deciding[station])
        others = (layer for reader in self.readers[station] for layer in reversed(self.deciding[reader]))
        return tuple(dict.fromkeys([*own, *others]))


def layout_of(program: ExportedProgram, paths: Collection[str], layers: Iterable[str]) -> Layout:
    """The layout of a captured program.

    Args:
        program: the float program.
        paths: paths of the modules that run operations; the operations of no module have the path "".
        layers: paths of the layers with a choice of schemes.
    """
    operations: list[Operation] = []
    places: dict[object, int] = {}
    ends: tuple[int, ...] = ()
    outside: set[str] = set()
    for node in program.graph.nodes:
        sources = tuple(dict.fromkeys(places[source] for source in node.all_input_nodes if source in places))
        if node.op == "output":
            ends = sources
            continue
        if node.op != "call_function":
            if node.name not in program.graph_signature.user_inputs:
                continue
            path = INPUT
        elif (path := layer_of(node)) == node.name:
            outside.add(_unnumbered(node.name))
            path = ""
        places[node] = len(operations)
        operations.append(Operation(path=path, sources=sources))
    return Layout(
        operations=tuple(operations),
        ends=ends,
        layers=tuple(layers),
        paths=frozenset(paths),
        outside=frozenset(outside),
    )


def _unnumbered(name: str) -> str:
    return re.sub(r"(_\d+)+$", "", name)
