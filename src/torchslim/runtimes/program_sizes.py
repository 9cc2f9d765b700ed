"""Checks size expressions of a saved program: they follow a strict grammar, and their values are bounded.

torch gives the text of an expression to sympy, which evaluates it as Python. Exporting writes the `srepr` of an
expression: calls of functions from a list, symbols and numbers, nothing else. Numbers and their powers are bounded:
computing `9**9**9**9` as a size would never end.
"""

from __future__ import annotations

import ast
import re

LENGTH = 4000
NODES = 400
DEPTH = 60
BITS = 1024
"""The most bits of an expression's value, where symbols are below 2**63."""

SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")
NUMBER = re.compile(r"-?\d{1,20}(\.\d{1,20})?(e[+-]?\d{1,3})?")
ASSUMPTIONS = frozenset(re.findall(r"\S+", """positive integer nonnegative real negative zero finite nonzero"""))
FUNCTIONS = frozenset(
    re.findall(
        r"\S+",
        """Add Mul Pow Max Min Abs floor ceiling sqrt Eq Ne Lt Le Gt Ge And Or Not Equality Unequality LessThan
    StrictLessThan GreaterThan StrictGreaterThan FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt
    FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator
    TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity""",
    )
)
POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RoundDecimal"})
EXPONENT = 16


class Unfit(ValueError):
    """A part of a saved program that no program of ours has."""


def check_expression(text: str) -> None:
    """Check that `text` is the `srepr` of an expression with a bounded value.

    Raises:
        Unfit: it is not; the message says why.
    """
    if len(text) > LENGTH:
        raise Unfit(f"it is longer than {LENGTH} characters")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unfit("it is no expression") from error
    bits(tree.body, [NODES])


def bits(node: ast.expr, budget: list[int], depth: int = 0) -> int:
    """Check an expression; return the number of bits that its value can have."""
    budget[0] -= 1
    if budget[0] < 0 or depth > DEPTH:
        raise Unfit(f"it has more than {NODES} parts or {DEPTH} levels")
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return 1
    number = _number(node)
    if number is not None:
        return max(1, number.bit_length())
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise Unfit("it holds something else than calls of known functions")
    name, arguments = node.func.id, node.args
    if name == "Symbol":
        return _symbol(node)
    if name == "Float":
        return _float(node)
    if node.keywords:
        raise Unfit(f"{name} takes no named arguments")
    if name in ("Integer", "Rational"):
        numbers = [_number(argument) for argument in arguments]
        if len(numbers) != (1 if name == "Integer" else 2) or None in numbers or numbers[-1] == 0 != len(numbers) - 1:
            raise Unfit(f"{name} takes whole numbers")
        return max(1, *(abs(number or 0).bit_length() for number in numbers))
    if name not in FUNCTIONS or not arguments:
        raise Unfit(f"{name[:40]!r} is no function of sizes")
    argument_bits = [bits(argument, budget, depth + 1) for argument in arguments]
    total = sum(argument_bits) if name == "Mul" else max(argument_bits) + len(argument_bits)
    if name in POWERS:
        total = _power(arguments, argument_bits)
    if total > BITS:
        raise Unfit(f"its value can have more than {BITS} bits")
    return total


def _power(arguments: list[ast.expr], argument_bits: list[int]) -> int:
    """Number of bits that a power can have; its exponent must be a number."""
    if len(arguments) != 2:
        raise Unfit("a power takes two arguments")
    exponent = arguments[1]
    if isinstance(exponent, ast.Call) and isinstance(exponent.func, ast.Name) and not exponent.keywords:
        numbers = [_number(part) for part in exponent.args]
        if exponent.func.id in ("Integer", "Rational") and None not in numbers:
            largest = max(abs(number or 0) for number in numbers)
            if largest <= EXPONENT:
                return argument_bits[0] * max(1, largest) + largest
    raise Unfit(f"an exponent is no number up to {EXPONENT}")


def _number(node: ast.expr) -> int | None:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node, sign = node.operand, -1
    if not isinstance(node, ast.Constant) or type(node.value) is not int:
        return None
    if node.value.bit_length() > 63:
        raise Unfit("a number has more than 63 bits")
    return sign * node.value


def _symbol(node: ast.Call) -> int:
    first = node.args[0] if len(node.args) == 1 else None
    if not isinstance(first, ast.Constant) or not isinstance(first.value, str) or not SYMBOL.fullmatch(first.value):
        raise Unfit("a symbol has no name of letters and digits")
    for keyword in node.keywords:
        if (
            keyword.arg not in ASSUMPTIONS
            or not isinstance(keyword.value, ast.Constant)
            or type(keyword.value.value) is not bool
        ):
            raise Unfit("a symbol has an unknown property")
    return 63


def _float(node: ast.Call) -> int:
    first = node.args[0] if len(node.args) == 1 else None
    if not isinstance(first, ast.Constant) or not isinstance(first.value, str) or not NUMBER.fullmatch(first.value):
        raise Unfit("a float is no number")
    for keyword in node.keywords:
        if (
            keyword.arg != "precision"
            or not isinstance(keyword.value, ast.Constant)
            or keyword.value.value not in (15, 53)
        ):
            raise Unfit("a float has an unknown precision")
    return 64
