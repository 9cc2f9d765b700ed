"""Relations between free sizes that a captured program needs, as data that is checked before every call.

The code of a model may branch on sizes, or fit only to multiples of one. A capture follows one path, and records the
relations of sizes that lead to it. They are kept as texts of a small language: whole numbers, sizes such as `s0_2`
(dimension 2 of the input tensor 0), `+ - * // %`, `max`, `min`, comparisons, `and`, `or`, `not`. `InputSizes` holds
them together with the fixed sizes.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch.export import ExportedProgram

SIZE = re.compile(r"L\['leaves'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
NAME = re.compile(r"s(\d{1,4})_(\d{1,2})")
LENGTH, MOST = 1_000, 1_000  # characters of a relation, and number of relations
OPERATIONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {"max": max, "min": min}
LARGEST = 2**63


@dataclass(frozen=True, kw_only=True)
class InputSizes:
    """The sizes of flat inputs that a captured program takes.

    Attributes:
        sizes: those of every input tensor; None for a free size.
        guards: relations of the free sizes.
    """

    sizes: Sequence[Sequence[int | None]]
    guards: Sequence[str] = ()

    def misfit(self, shapes: Sequence[Sequence[int]]) -> int | str | None:
        """The index of the first input of another shape, else the first guard that is broken; None if all fit."""
        for index, (sizes, shape) in enumerate(zip(self.sizes, shapes, strict=True)):
            if not shape_fits(sizes, shape):
                return index
        return broken(self.guards, shapes)


def shape_fits(sizes: Sequence[int | None], shape: Sequence[int]) -> bool:
    """Whether a tensor's shape has these sizes, where None stands for any."""
    return len(sizes) == len(shape) and all(
        size is None or size == actual for size, actual in zip(sizes, shape, strict=True)
    )


def readable_sizes(sizes: Sequence[int | None]) -> str:
    """Sizes as in a message, such as `(any, 3, 8)`."""
    return f"({', '.join('any' if size is None else str(size) for size in sizes)})"


def guards_of(program: ExportedProgram, batch_axis: int | None) -> tuple[str, ...]:
    """The relations of a captured program that concern a free size other than the batch.

    Relations of the form `... != 0` and `... != 1` are left out: PyTorch treats these two sizes apart in every capture,
    whatever the model's code does.
    """
    relations = []
    for code in getattr(program, "_guards_code", ()):
        text = SIZE.sub(r"s\1_\2", str(code)).replace("torch.sym_max", "max").replace("torch.sym_min", "min")
        for relation in text.split(" and "):
            relation = relation.strip()
            dims = {int(dim) for _, dim in NAME.findall(relation)}
            if re.search(r"!= [01]\)*$", relation) or not dims - {batch_axis}:
                continue
            try:
                parse(relation)
            except ValueError:  # a function that this language lacks, such as a root
                continue
            relations.append(relation)
    return tuple(dict.fromkeys(relations))[:MOST]


def parse(relation: str) -> ast.expr:
    """The syntax tree of a relation.

    Raises:
        ValueError: it is no text of the language.
    """
    if len(relation) > LENGTH:
        raise ValueError("a relation of sizes is too long")
    try:
        tree = _tree(relation)
        values = dict.fromkeys(_names(tree), 2)
        _value(tree, values)
    except (SyntaxError, RecursionError, MemoryError, ZeroDivisionError, TypeError) as error:
        raise ValueError(f"{relation[:60]!r} is no relation of sizes") from error
    return tree


def broken(relations: Sequence[str], shapes: Sequence[Sequence[int]]) -> str | None:
    """The first relation that the shapes of the flat inputs do not fulfil."""
    return _first_broken(relations, _sizes(shapes))


def _sizes(shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    return {f"s{index}_{dim}": size for index, shape in enumerate(shapes) for dim, size in enumerate(shape)}


def _first_broken(relations: Sequence[str], sizes: Mapping[str, int]) -> str | None:
    for relation in relations:
        try:
            holds = bool(_value(_tree(relation), sizes))
        except (KeyError, ZeroDivisionError):
            holds = False
        if not holds:
            return relation
    return None


def holding(
    relations: Sequence[str], shapes: Sequence[Sequence[int]], place: tuple[int, int], values: Iterable[int]
) -> list[int]:
    """The values of one size, by input and dimension, with which the shapes fulfil all relations."""
    sizes = _sizes(shapes)
    name = f"s{place[0]}_{place[1]}"
    return [value for value in values if _first_broken(relations, {**sizes, name: value}) is None]


def readable(relation: str, names: Sequence[str]) -> str:
    """A relation with the names of the inputs, such as `x.shape[2] % 4 == 0`."""
    return NAME.sub(lambda match: f"{names[int(match[1])]}.shape[{match[2]}]", relation)


@lru_cache(maxsize=10_000)
def _tree(relation: str) -> ast.expr:
    """The syntax tree of a relation, which every call of a deployed model needs."""
    return ast.parse(relation, mode="eval").body


def _names(tree: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and NAME.fullmatch(node.id)}


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    """The value of a node; ValueError for everything that the language lacks."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) < LARGEST:
        return node.value
    if isinstance(node, ast.Name) and NAME.fullmatch(node.id):
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        value = OPERATIONS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
        return min(max(value, -LARGEST), LARGEST)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        value = _value(node.operand, sizes)
        return not value if isinstance(node.op, ast.Not) else -value
    if isinstance(node, ast.BoolOp):
        values = [_value(part, sizes) for part in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Compare) and all(type(kind) in OPERATIONS for kind in node.ops):
        values = [_value(part, sizes) for part in (node.left, *node.comparators)]
        steps = zip(node.ops, values, values[1:], strict=False)
        return all(OPERATIONS[type(kind)](left, right) for kind, left, right in steps)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and not node.keywords:
        function = FUNCTIONS.get(node.func.id)
        if function is not None:
            return function([_value(part, sizes) for part in node.args])
    raise ValueError(f"{ast.dump(node)[:60]} is no part of a relation of sizes")
