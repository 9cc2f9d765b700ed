"""The shape of what goes in and comes out, apart from the tensors: JSON-able, so that an artifact can keep it.

{"tensor": 3}                      the fourth tensor
{"const": None}                    a number, text, or None
{"tuple": [...]} {"list": [...]}   {"dict": {"key": ...}}
{"record": "module.Class", "fields": {...}}   a dataclass, a named tuple, or a Hugging Face output
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchslim.errors import DeployError, ExportError

Structure = dict[str, Any]


class Record(dict[str, Any]):
    """Stands for a dataclass that this process does not have: fields by name, by key, or by position."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no field {name!r}; there are {', '.join(self)}")

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


def describe(value: Any, leaves: list[Tensor], classes: dict[str, type], what: str = "output") -> Structure:
    """The structure of `value`; its tensors are appended to `leaves`, the classes it uses noted in `classes`."""

    def inner(each: Any) -> Structure:
        return describe(each, leaves, classes, what)

    if isinstance(value, Tensor):
        leaves.append(value)
        return {"tensor": len(leaves) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"const": value}
    fields = _fields(value)
    if fields is not None:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        classes[name] = type(value)
        return {"record": name, "fields": {key: inner(each) for key, each in fields.items()}}
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise ExportError(f"an {what} is a dict with keys that are not text: {list(value)[:3]}")
        return {"dict": {key: inner(each) for key, each in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [inner(each) for each in value]}
    raise ExportError(
        f"an {what} has the type {type(value).__name__}, which no runtime can take or give; use tensors in tuples, "
        "lists, dicts or dataclasses"
    )


def build(structure: Structure, leaves: Sequence[Any], classes: Mapping[str, type] | None = None) -> Any:
    """The value of a structure with these tensors; records of unknown classes become `Record`."""
    ((kind, content), *_) = structure.items()
    if kind == "tensor":
        return leaves[content]
    if kind == "const":
        return content
    if kind == "record":
        fields = {key: build(each, leaves, classes) for key, each in structure["fields"].items()}
        known = (classes or {}).get(content)
        return known(**fields) if known else Record(fields)
    if kind == "dict":
        return {key: build(each, leaves, classes) for key, each in content.items()}
    items = [build(each, leaves, classes) for each in content]
    return tuple(items) if kind == "tuple" else items


def flatten(structure: Structure, value: Any, path: str = "input") -> list[Tensor]:
    """The tensors of `value`, in the structure's order.

    Raises:
        DeployError: when `value` has another structure.
    """
    ((kind, content), *_) = structure.items()
    if kind == "tensor":
        if not isinstance(value, Tensor):
            raise DeployError(f"{path} must be a tensor, got {type(value).__name__}")
        return [value]
    if kind == "const":
        if isinstance(value, Tensor) or value != content:
            raise DeployError(f"{path} was fixed at {content!r} when the model was captured, got {value!r}")
        return []
    if kind in ("dict", "record"):
        wanted = content if kind == "dict" else structure["fields"]
        given = value if isinstance(value, Mapping) else _fields(value)
        if given is None or set(given) != set(wanted):
            got = type(value).__name__ if given is None else ", ".join(given)
            raise DeployError(f"{path} must have the keys {', '.join(wanted)}, got {got}")
        return [
            leaf for key, each in wanted.items() for leaf in flatten(each, given[key], f"{path}[{key!r}]")
        ]
    if not isinstance(value, (tuple, list)) or len(value) != len(content):
        raise DeployError(f"{path} must be a {kind} of {len(content)}, got {_brief(value)}")
    return [
        leaf for index, each in enumerate(content) for leaf in flatten(each, value[index], f"{path}[{index}]")
    ]


def _fields(value: Any) -> dict[str, Any] | None:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Mapping):  # Hugging Face outputs: only the fields that are set
            return dict(value.items())
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _brief(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
