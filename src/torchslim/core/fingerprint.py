"""Digests of steps, functions and weights, to tell runs apart."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.files import digest


def canonical(value: Any) -> Any:
    """`value` as JSON that changes only if its meaning does; two runs are compared by it.

    Dataclasses become {"do": class, fields}, functions their name and a digest of their code, modules a digest of
    their weights.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"do": name, **{field_.name: canonical(getattr(value, field_.name)) for field_ in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): canonical(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [canonical(item) for item in value]
    if isinstance(value, nn.Module):
        return {"module": type(value).__qualname__, "weights": fingerprint(value.state_dict())}
    name = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, functools.partial):
        return {
            "partial": canonical(value.func),
            "args": canonical(value.args),
            "keywords": canonical(value.keywords),
        }
    if isinstance(value, Tensor):
        return {"tensor": fingerprint(value)}
    code = getattr(value, "__code__", None)
    if code is not None:
        # captured variables and defaults decide a function's behaviour as much as its code does
        captured = [_cell(cell) for cell in value.__closure__ or ()]
        return {
            "function": name,
            "code": _code(code),
            "captured": captured,
            "defaults": canonical(value.__defaults__),
        }
    state = getattr(value, "__dict__", None)
    if state is None or isinstance(value, type):
        return name
    return {
        "object": name,
        "state": canonical({key: attribute for key, attribute in state.items() if attribute is not value}),
    }


def _code(code: Any) -> str:
    constants = [_code(const) if hasattr(const, "co_code") else repr(const) for const in code.co_consts]
    return digest(code.co_code, constants, list(code.co_names))


def _cell(cell: Any) -> Any:
    try:
        return canonical(cell.cell_contents)
    except (ValueError, RecursionError):  # an empty cell, or a function that captures itself
        return None


def fingerprint(tree: Any) -> str:
    """Digest of all tensors in nested containers, and of the text of all other leaves."""
    leaves, structure = torch.utils._pytree.tree_flatten(tree)
    parts: list[Any] = [str(structure)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            data = leaf.detach().cpu().contiguous()
            parts += [str(data.dtype), list(data.shape), data.flatten().view(torch.uint8).numpy().tobytes()]
        else:
            parts.append(str(leaf))
    return digest(*parts)
