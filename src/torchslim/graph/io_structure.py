"""The structure of inputs and outputs around their tensors, as JSON, so that an artifact can store it.

{"tensor": 3}                      the fourth tensor
{"const": None}                    a number, text, or None; {"float": "-inf"} a float that JSON cannot hold
{"tuple": [...]} {"list": [...]}   {"dict": {"key": ...}}
{"named": "module.Class", "fields": {...}}    a named tuple, or a return type of torch.topk and similar functions
{"record": "module.Class", "fields": {...}}   a dataclass, or a Hugging Face output
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any

from torch import Tensor

from torchslim.errors import DeployError, ExportError

Structure = dict[str, Any]
KINDS = frozenset({"tensor", "const", "float", "tuple", "list", "dict", "named", "record"})
LEAVES, DEPTH = 10_000, 20


class Record(dict[str, Any]):
    """Replaces a dataclass that this process does not have: fields by name, by key, or by position."""

    def __getattribute__(self, name: str) -> Any:
        # a field named like a method of dict (`values`, `items`) takes precedence over the method
        if not name.startswith("__") and dict.__contains__(self, name):
            return dict.__getitem__(self, name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no field {name!r}; there are {', '.join(self)}")

    def __getitem__(self, key: Any) -> Any:
        return list(dict.values(self))[key] if isinstance(key, int) else dict.__getitem__(self, key)


def describe(value: Any, leaves: list[Tensor], classes: dict[str, type], what: str = "output") -> Structure:
    """Return the structure of `value`; its tensors are appended to `leaves`, its classes added to `classes`.

    Raises:
        ExportError: for a type that no runtime can take or return.
    """

    def inner(part: Any) -> Structure:
        return describe(part, leaves, classes, what)

    if isinstance(value, Tensor):
        leaves.append(value)
        return {"tensor": len(leaves) - 1}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"const": value}
    fields = _fields(value)
    if fields is not None:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        classes[name] = type(value)
        kind = "named" if isinstance(value, tuple) else "record"
        return {kind: name, "fields": {key: inner(part) for key, part in fields.items()}}
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise ExportError(f"an {what} is a dict with keys that are not text: {list(value)[:3]}; use names")
        return {"dict": {key: inner(part) for key, part in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [inner(part) for part in value]}
    cache = type(value).__name__.endswith("Cache")
    hint = "; a model of transformers answers without its cache where model.config.use_cache is False" if cache else ""
    raise ExportError(
        f"an {what} has the type {type(value).__name__}, which no runtime can take or return; use tensors in tuples, "
        f"lists, dicts or dataclasses{hint}"
    )


def build(structure: Structure, leaves: Sequence[Any], classes: Mapping[str, type] | None = None) -> Any:
    """Build the value of a structure with these tensors; unknown classes become named tuples and `Record`s."""
    kind = next(iter(structure))
    content = structure[kind]
    if kind == "tensor":
        return leaves[content]
    if kind == "const":
        return content
    if kind == "float":
        return float(content)
    if kind in ("named", "record"):
        fields = {key: build(part, leaves, classes) for key, part in structure["fields"].items()}
        cls = (classes or {}).get(content)
        return _named(cls, content, fields) if kind == "named" else _record(cls, fields)
    if kind == "dict":
        return {key: build(part, leaves, classes) for key, part in content.items()}
    items = [build(part, leaves, classes) for part in content]
    return tuple(items) if kind == "tuple" else items


def flatten(structure: Structure, value: Any, path: str = "input") -> list[Tensor]:
    """Return the tensors of `value`, in the structure's order.

    Raises:
        DeployError: when `value` has another structure.
    """
    kind = next(iter(structure))
    content = structure[kind]
    if kind == "tensor":
        if not isinstance(value, Tensor):
            raise DeployError(f"{path} must be a tensor, got {type(value).__name__}; the model was captured with one")
        return [value]
    if kind in ("const", "float"):
        fixed = float(content) if kind == "float" else content
        if not _same(fixed, value):
            raise DeployError(
                f"{path} was fixed at {fixed!r} when the model was captured, got {_brief(value)}; capture it again "
                "with example inputs that have this value"
            )
        return []
    if kind in ("dict", "record", "named"):
        parts = content if kind == "dict" else structure["fields"]
        values = dict(value.items()) if isinstance(value, Mapping) else _fields(value)
        if kind == "named" and values is None and isinstance(value, tuple) and len(value) == len(parts):
            values = dict(zip(parts, value, strict=True))
        if values is None or set(values) != set(parts):
            got = _brief(value) if values is None else f"the keys {', '.join(values) or 'none'}"
            raise DeployError(f"{path} must have the keys {', '.join(parts)}, as when it was captured; got {got}")
        return [leaf for key, part in parts.items() for leaf in flatten(part, values[key], f"{path}[{key!r}]")]
    if not isinstance(value, (tuple, list)) or len(value) != len(content):
        raise DeployError(f"{path} must be a {kind} of {len(content)}, as when it was captured; got {_brief(value)}")
    return [leaf for index, part in enumerate(content) for leaf in flatten(part, value[index], f"{path}[{index}]")]


def leaf_names(structure: Structure, path: str = "") -> list[str]:
    """Return a name for each tensor, in order: the keys and positions on its path, joined by underscores."""
    kind = next(iter(structure))
    content = structure[kind]
    if kind == "tensor":
        return [path]
    if kind in ("const", "float"):
        return []
    if kind in ("dict", "record", "named"):
        inner = (content if kind == "dict" else structure["fields"]).items()
    else:
        inner = ((str(index), part) for index, part in enumerate(content))
    return [name for key, part in inner for name in leaf_names(part, f"{path}_{key}" if path else key)]


def sound(structure: Any) -> str | None:
    """Return the error in a structure that was read from a file; None for one that `describe` could have made."""
    try:
        count = _count(structure, 0, 0)
    except ValueError as error:
        return str(error)
    return None if count <= LEAVES else f"more than {LEAVES:,} tensors"


def tensors_of(structure: Structure) -> int:
    """Number of tensors in a sound structure."""
    return _count(structure, 0, None)


def _count(structure: Any, depth: int, next_index: int | None) -> int:
    """Count tensors; they must be numbered in order from `next_index`, unless that is None.

    Raises:
        ValueError: not a structure; the message says what was read.
    """
    if depth > DEPTH:
        raise ValueError(f"nested deeper than {DEPTH} levels")
    if not isinstance(structure, dict) or not structure:
        raise ValueError("a part is no structure")
    kind, content = next(iter(structure.items()))
    fields = kind in ("named", "record")
    if set(structure) != ({kind, "fields"} if fields else {kind}) or kind not in KINDS:
        raise ValueError(f"a part has the keys {ascii(sorted(map(str, structure)))[:80]}")
    if kind == "tensor" and (type(content) is not int or next_index not in (None, content)):
        raise ValueError(f"a tensor has the number {ascii(content)[:20]}, not {next_index}")
    if kind == "const" and not (content is None or isinstance(content, (bool, int, float, str))):
        raise ValueError("a constant is no number and no text")
    if kind == "float" and content not in ("nan", "inf", "-inf"):
        raise ValueError(f"{ascii(content)[:20]} is no float that JSON cannot hold")
    if kind in ("tensor", "const", "float"):
        return int(kind == "tensor")
    if fields:
        words = content.split(".") if isinstance(content, str) else [""]
        if not all(word.isidentifier() and not iskeyword(word) for word in words if word != "<locals>"):
            raise ValueError("a class has no name")
        content = structure["fields"]
    if not isinstance(content, list if kind in ("tuple", "list") else dict):
        raise ValueError(f"a {kind} holds no parts")
    total = 0
    for part in content if isinstance(content, list) else content.values():
        total += _count(part, depth + 1, None if next_index is None else next_index + total)
    return total


def _same(fixed: Any, value: Any) -> bool:
    # 2 and 2.0 are equal but compute in different types; tensors and arrays have no single truth value
    if not isinstance(value, type(fixed)):
        return False
    return bool(value == fixed) or (isinstance(fixed, float) and math.isnan(fixed) and math.isnan(value))


def _fields(value: Any) -> dict[str, Any] | None:
    if isinstance(value, tuple):
        if type(value).__module__ == "torch.return_types":
            return dict(zip(type(value).__match_args__, value, strict=True))  # type: ignore[attr-defined]
        return dict(value._asdict()) if hasattr(value, "_asdict") else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Mapping):  # Hugging Face outputs: only the fields that are set
            return dict(value.items())
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _named(cls: Any, name: str, fields: dict[str, Any]) -> Any:
    if cls is None:
        make: Any = collections.namedtuple
        cls = make(name.rpartition(".")[2], list(fields), rename=True)
    return cls._make(fields.values()) if hasattr(cls, "_make") else cls(list(fields.values()))


def _record(cls: Any, fields: dict[str, Any]) -> Any:
    if cls is None:
        return Record(fields)
    computed = {field.name for field in dataclasses.fields(cls) if not field.init}
    record = cls(**{key: value for key, value in fields.items() if key not in computed})
    for name in computed & set(fields):
        object.__setattr__(record, name, fields[name])
    return record


def _brief(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    name = type(value).__name__
    return f"{name} of {len(value)}" if hasattr(value, "__len__") else name
