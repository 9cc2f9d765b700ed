"""The lines of a model's code that fix or bound a free size, recorded while the model is captured."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch._guards import SLoc
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torchslim.graph import calling
from torchslim.graph.size_guards import SIZE

TORCH = str(Path(torch.__file__).parent)
OURS = str(Path(__file__).parents[1])


@contextmanager
def places_recorded() -> Iterator[None]:
    """Inside, PyTorch notes the line of the model's code with every relation of sizes; by itself it notes its own."""
    original = ShapeEnv._get_sloc

    def located(self: ShapeEnv, framework_loc: str | None = None) -> SLoc:
        sloc = original(self, framework_loc)
        line = _line_of_model(sys._getframe(1))
        return sloc if line is None else SLoc(sloc.framework_loc, line)

    with mock.patch.object(ShapeEnv, "_get_sloc", located):
        yield


def _line_of_model(frame: FrameType | None) -> str | None:
    """The innermost line of the captured model that runs, as 'file:line in function: code'; None outside of a model."""
    line = None
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file == calling.__file__ and function == "natural":
            return line
        if line is None and not file.startswith((TORCH, OURS, "<")):
            line = f"{file}:{frame.f_lineno} in {function}: {linecache.getline(file, frame.f_lineno).strip()}"
        frame = frame.f_back
    return None  # a capture that does not run the model, as a strict one: PyTorch knows the line


def place_of_size(program: ExportedProgram, index: int, dim: int) -> str:
    """Where the model's code fixes a size of an input, as text; empty if PyTorch has not recorded it."""
    source = f"L['leaves'][{index}].size()[{dim}]"
    shapes = _shapes(program)
    for symbol, sources in getattr(shapes, "var_to_sources", {}).items():
        place = getattr(shapes, "replacements_slocs", {}).get(symbol)
        if place is not None and any(str(getattr(known, "name", "")) == source for known in sources):
            return _written(place)
    return ""


def places_of_guards(program: ExportedProgram, guards: Sequence[str]) -> dict[str, str]:
    """The lines of the model's code that need relations of sizes, as far as PyTorch has recorded them."""
    shapes = _shapes(program)
    names = {}
    for symbol, sources in getattr(shapes, "var_to_sources", {}).items():
        matches = (SIZE.search(str(getattr(source, "name", ""))) for source in sources)
        names[str(symbol)] = next((f"s{match[1]}_{match[2]}" for match in matches if match), str(symbol))
    known: dict[str, str] = {}
    for guard in getattr(shapes, "guards", ()):
        for text in _texts(guard.expr, names):
            known.setdefault(text, _written(guard.sloc))
    return {guard: place for guard in guards if (place := known.get(_bare(guard)))}


def _texts(relation: Any, names: dict[str, str]) -> Iterator[str]:
    """A relation of symbols as in a guard, from both sides."""
    signs = {"Equality": "==", "Unequality": "!="}
    mirrored = {">": "<", "<": ">", ">=": "<=", "<=": ">=", "==": "==", "!=": "!="}
    sign = signs.get(type(relation).__name__, getattr(relation, "rel_op", None))
    if sign in mirrored:
        left, right = (_bare(_renamed(str(side), names)) for side in (relation.lhs, relation.rhs))
        yield f"{left}{sign}{right}"
        yield f"{right}{mirrored[sign]}{left}"


def _renamed(text: str, names: dict[str, str]) -> str:
    for symbol in sorted(names, key=len, reverse=True):
        text = text.replace(symbol, names[symbol])
    return text


def _bare(text: str) -> str:
    """A relation without spaces and parentheses, which PyTorch sets in several ways."""
    return text.translate(str.maketrans("", "", " ()"))


def _written(place: SLoc) -> str:
    return f" ({place.maybe_user_loc})" if place.maybe_user_loc else f" {place}"


def _shapes(program: ExportedProgram) -> ShapeEnv | None:
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    modes = (getattr(value, "fake_mode", None) for value in values)
    return next((mode.shape_env for mode in modes if mode is not None), None)
