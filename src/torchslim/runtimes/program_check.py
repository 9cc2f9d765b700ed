"""Checks the graph of a saved program before torch reads it: known fields, known operators, bounded numbers.

The format is torch's own schema of exported programs, checked strictly: torch itself ignores unknown fields and takes
any value for any type. Parts of the schema that unpickle, load, call or execute something are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from torch._export.serde import schema
from torch._export.serde.union import _Union

from torchslim.core.schema import parse_json, shorten
from torchslim.errors import ArtifactError
from torchslim.runtimes.program_operators import HIGHER_ORDER, MESSAGES, SYMBOLIC, resolve, text_allowed
from torchslim.runtimes.program_sizes import BITS, Unfit, check_expression

PARTS = 1_000_000
"""The most fields, elements and arguments of a program; each object of torch takes up to two kilobytes."""
ARGUMENTS = 300_000
ELEMENTS = 2**33
"""The most elements of a tensor whose sizes the program states."""
SYMBOLS = 10_000
NAME = re.compile(r"\w{0,200}")
# paths of weights may hold what a key of a ModuleDict may, except what ends a quoted text in generated code
PATH = re.compile(r"[^\"'\\\x00-\x1f\x7f\u2028\u2029]{0,1000}")
RANGE = re.compile(r"[A-Za-z_]{1,20}\d{0,4}")
DIALECTS = frozenset({"ATEN", "TRAINING", "EDGE", ""})
PICKLED = frozenset({"as_custom_obj", "custom_obj"})
TREES = {"builtins.tuple": 0, "builtins.list": 0, "builtins.dict": 1}
ASSERTED = "an assertion of the program does not hold"


class _Checker:
    """Checks a program in one walk, replaces the texts of assertions, and counts parts and arguments."""

    def __init__(self) -> None:
        self.parts = self.arguments = 0
        self.expressions: set[str] = set()
        self.bits: dict[str, int] = {}  # bits of the numbers that a program computes, by name

    def check(self, value: Any, kind: Any, where: str) -> None:
        """Check that `value` has the type `kind` of torch's schema."""
        self.parts += 1
        if self.parts > PARTS:
            raise Unfit(f"it has more than {PARTS:,} parts")
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if type(None) in inner:
            if value is not None:
                self.check(value, next(option for option in inner if option is not type(None)), where)
        elif origin is list:
            if not isinstance(value, list):
                raise Unfit(f"{where} is no list")
            for element in value:
                self.check(element, inner[0], where)
        elif origin is dict:
            if not isinstance(value, dict):
                raise Unfit(f"{where} is no object")
            for key, element in value.items():
                if not PATH.fullmatch(key):
                    raise Unfit(f"{where} has the unsafe key {shorten(key)}")
                self.check(element, inner[1], where)
        elif dataclasses.is_dataclass(kind):
            self._record(value, typing.cast(type, kind), where)
        else:
            _plain(value, kind, where)

    def _record(self, value: Any, kind: type, where: str) -> None:
        fields = _fields(kind)
        if not isinstance(value, dict):
            raise Unfit(f"{where} is no object")
        union = issubclass(kind, _Union)
        if union:
            self.arguments += 1
            if self.arguments > ARGUMENTS:
                raise Unfit(f"it has more than {ARGUMENTS:,} arguments")
        if union and len(value) != 1:
            raise Unfit(f"{where} must have one of {', '.join(list(fields)[:5])}")
        missing = [] if union else [name for name, (_, needed) in fields.items() if needed and name not in value]
        if missing:
            raise Unfit(f"{where} lacks {missing[0]!r}")
        rule = RULES.get(kind.__name__)
        for name, content in value.items():
            if name not in fields or name in PICKLED:
                raise Unfit(f"{where} has {shorten(name)}, which no program has that can be loaded")
            self.check(content, fields[name][0], name)
        if rule is not None:
            rule(self, value)

    # --- rules of single kinds, applied after the types of their fields are checked ---

    def graph(self, value: dict[str, Any]) -> None:
        if value.get("custom_obj_values"):
            raise Unfit("it holds objects that are no tensors")

    def node(self, value: dict[str, Any]) -> None:
        target = value["target"]
        operator = resolve(target)
        if operator is None:
            raise Unfit(f"it calls {shorten(target)}, which no exported program may call")
        value["metadata"] = {}
        operator_schema = getattr(operator, "_schema", None)
        argument_types = (
            None
            if operator_schema is None
            else {argument.name: str(argument.type) for argument in operator_schema.arguments}
        )
        for input_ in value["inputs"]:
            if argument_types is not None and input_["name"] not in argument_types:
                raise Unfit(f"{shorten(target)} has no argument {shorten(input_['name'])}")
            self._argument(target, input_, higher=target.split(".")[-1] in HIGHER_ORDER)
        if target in SYMBOLIC:
            self._magnitude(target, value)

    def _argument(self, target: str, input_: dict[str, Any], *, higher: bool) -> None:
        (kind, content), name = next(iter(input_["arg"].items())), input_["name"]
        if kind in ("as_graph", "as_operator", "as_string_to_argument") and (not higher or kind != "as_graph"):
            raise Unfit(f"{shorten(target)} takes no {kind}")
        if kind in ("as_string", "as_strings"):
            if name in MESSAGES and kind == "as_string":
                input_["arg"] = {kind: ASSERTED}
            elif not higher and all(
                text_allowed(name, text) for text in ([content] if kind == "as_string" else content)
            ):
                return
            elif not (higher and content == "cpu"):  # the device type of autocast
                raise Unfit(f"{shorten(target)} has {shorten(content)} as {shorten(name)}")
        numbers = (
            content
            if kind == "as_ints"
            else [size.get("as_int", 1) for size in content]
            if kind == "as_sym_ints"
            else []
        )
        if math.prod(abs(number) for number in numbers if number) > ELEMENTS:
            raise Unfit(f"{shorten(target)} has sizes of more than {ELEMENTS:,} elements")

    def _magnitude(self, target: str, value: dict[str, Any]) -> None:
        """Bound the bits of a number that the program computes from sizes; Python's integers have no limit."""
        input_bits = [self._bits(input_["arg"]) for input_ in value["inputs"]]
        operation, total = target.rpartition(".")[2], max(input_bits, default=1) + 1
        if operation == "mul":
            total = sum(input_bits)
        elif operation in ("pow", "lshift"):
            last = value["inputs"][-1]["arg"]
            exponent = next((last[key] for key in ("as_int", "as_float") if key in last), None)
            if exponent is None and isinstance(last.get("as_sym_int"), dict):
                exponent = last["as_sym_int"].get("as_int")
            if exponent is None or not abs(float(exponent)) <= 64:
                raise Unfit("a power of sizes has an exponent above 64")
            total = (
                input_bits[0] * max(1, math.ceil(abs(float(exponent))))
                if operation == "pow"
                else input_bits[0] + int(exponent)
            )
        if total > BITS:
            raise Unfit(f"a size can have more than {BITS} bits")
        for output in value["outputs"]:
            content = next(iter(output.values()))
            if isinstance(content, dict) and "as_name" in content:
                self.bits[content["as_name"]] = total

    def _bits(self, argument: dict[str, Any]) -> int:
        content = next(iter(argument.values()))
        if isinstance(content, list):
            return max((self._bits({"": element}) for element in content), default=1) + len(content)
        if isinstance(content, dict):
            content = content.get("as_name", content.get("as_int", 1))
        return self.bits.get(content, 63) if isinstance(content, str) else 63

    def expression(self, value: dict[str, Any]) -> None:
        text = value["expr_str"]
        if text not in self.expressions:
            try:
                check_expression(text)
            except Unfit as error:
                raise Unfit(f"it has the size {shorten(text)}, which could run code: {error}") from error
            self.expressions.add(text)

    def tensor(self, value: dict[str, Any]) -> None:
        sizes = [size["as_int"] for size in value["sizes"] if "as_int" in size]
        if any(size < 0 for size in sizes) or math.prod(size for size in sizes if size) > ELEMENTS:
            raise Unfit(f"a tensor has the sizes {sizes[:8]}")
        if len(value["sizes"]) != len(value["strides"]) or len(value["sizes"]) > 64:
            raise Unfit("a tensor has other strides than sizes")
        if value["layout"] != int(schema.Layout.Strided):
            raise Unfit("a tensor is not dense")

    def device(self, value: dict[str, Any]) -> None:
        if value["type"] != "cpu":
            raise Unfit(f"a tensor is on {shorten(value['type'])}; programs are saved for the CPU")

    def call(self, value: dict[str, Any]) -> None:
        for key in ("in_spec", "out_spec"):
            parsed = parse_json(value[key], key, ArtifactError)
            if not isinstance(parsed, list) or len(parsed) != 2 or parsed[0] != 1:
                raise Unfit(f"{key} is no tree of tuples, lists and dicts")
            _tree(parsed[1], key)
        for name in value.get("forward_arg_names") or []:
            if not NAME.fullmatch(name):
                raise Unfit(f"an argument is named {shorten(name)}")

    def module(self, value: dict[str, Any]) -> None:
        value["metadata"] = {}
        if value.get("treespec_namedtuple_fields"):
            raise Unfit("it has named tuples")

    def program(self, value: dict[str, Any]) -> None:
        value["guards_code"] = []  # Python that torch would execute; `Spec` checks sizes
        unknown = [dialect for dialect in value.get("verifiers", []) if dialect not in DIALECTS]
        if unknown:
            raise Unfit(f"it has the dialect {shorten(unknown[0])}")
        ranges = value["range_constraints"]
        if len(ranges) > SYMBOLS:
            raise Unfit(f"it has more than {SYMBOLS:,} ranges")
        for name, bounds in ranges.items():
            if not RANGE.fullmatch(name):  # torch counts up to the number in the name
                raise Unfit(f"it has a range for {shorten(name)}")
            low, high = bounds["min_val"], bounds["max_val"]
            if low is not None and high is not None and low > high:
                raise Unfit(f"the range of {shorten(name)} is empty")

    def named(self, value: dict[str, Any]) -> None:
        for key in ("name", "as_name"):
            if isinstance(value.get(key), str) and not NAME.fullmatch(value[key]):
                raise Unfit(f"it has the name {shorten(value[key])}, which could run code")


def _node(checker: _Checker, value: dict[str, Any]) -> None:
    checker.named(value)
    checker.node(value)


NAMED = (
    "GraphArgument",
    "TensorArgument",
    "TokenArgument",
    "SymIntArgument",
    "SymFloatArgument",
    "SymBoolArgument",
    "NamedArgument",
    "InputToConstantInputSpec",
)
"""Kinds of entries whose names become names in generated code."""
RULES: dict[str, Callable[[_Checker, dict[str, Any]], None]] = {
    "Graph": _Checker.graph,
    "Node": _node,
    "SymExpr": _Checker.expression,
    "TensorMeta": _Checker.tensor,
    "Device": _Checker.device,
    "ModuleCallSignature": _Checker.call,
    "GraphModule": _Checker.module,
    "ExportedProgram": _Checker.program,
    **dict.fromkeys(NAMED, _Checker.named),
}


def check_program(program: Any) -> None:
    """Check the parsed JSON of a program, replace its texts for people, and drop its guards.

    Raises:
        Unfit: the program has something that exporting never writes; the message says what.
    """
    _Checker().check(program, schema.ExportedProgram, "the program")


def check_payloads(config: Any, files: set[str]) -> dict[str, dict[str, Any]]:
    """Check the parsed JSON of a list of tensors, which lie in `files`; return the list's entries by tensor name."""
    _Checker().check(config, schema.PayloadConfig, "the list of tensors")
    payloads: dict[str, dict[str, Any]] = config["config"]
    for name, payload in payloads.items():
        if payload["use_pickle"] or payload["tensor_meta"] is None:
            raise Unfit(f"{shorten(name)} asks for unpickling")
        if payload["path_name"] not in files:
            raise Unfit(f"{shorten(name)} lies in {shorten(payload['path_name'])}, which is missing")
        meta = payload["tensor_meta"]
        if any("as_int" not in size for size in (*meta["sizes"], *meta["strides"], meta["storage_offset"])):
            raise Unfit(f"{shorten(name)} has a size that is no number")
    return payloads


@functools.cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Fields of a class of torch's schema, by name: type, and whether the field is required."""
    hints = typing.get_type_hints(kind, globalns=vars(schema))
    missing = dataclasses.MISSING
    return {
        field_.name: (hints[field_.name], field_.default is missing and field_.default_factory is missing)
        for field_ in dataclasses.fields(kind)
    }


def _plain(value: Any, kind: Any, where: str) -> None:
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        fits = type(value) is int and value in {int(member) for member in kind}
    elif kind is float:
        fits = type(value) in (float, int) or value in ("NaN", "Infinity", "-Infinity")
    elif kind is str:
        # texts may stand between quotes in generated code, except those of `TEXTS`
        fits = isinstance(value, str) and (where in TEXTS or bool(PATH.fullmatch(value)))
    elif kind in (bool, int):
        fits = type(value) is kind
    else:
        fits = False
    if not fits:
        raise Unfit(f"{where} is {shorten(value)}")


TEXTS = frozenset({"metadata", "guards_code", "in_spec", "out_spec", "as_string", "as_strings", "expr_str"})
"""Fields whose texts have checks of their own, or are dropped."""


def _tree(value: Any, where: str) -> None:
    """Check that `value` is the structure of a call: tuples, lists and dicts of tensors."""
    if not isinstance(value, dict) or set(value) != {"type", "context", "children_spec"}:
        raise Unfit(f"{where} is no tree of tuples, lists and dicts")
    kind, context, children = value["type"], value["context"], value["children_spec"]
    if not isinstance(children, list) or (kind is None and (children or context is not None)):
        raise Unfit(f"{where} is no tree of tuples, lists and dicts")
    if kind is None:
        return
    if kind not in TREES or not isinstance(context, str):
        raise Unfit(f"{where} holds a {shorten(kind)}")
    keys = parse_json(context, where, ArtifactError)
    if TREES[kind]:
        if not isinstance(keys, list) or len(keys) != len(children) or not all(isinstance(key, str) for key in keys):
            raise Unfit(f"{where} has other keys than values")
    elif keys is not None:
        raise Unfit(f"{where} has keys where there are none")
    for child in children:
        _tree(child, where)
