"""Tensors, devices and types of nested inputs and outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists, dicts and dataclasses, in order."""
    collected: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        collected.append(tensor)
        return tensor

    changed(tree, note)
    return collected


def to_device(tree: Any, device: torch.device | str) -> Any:
    """The same tree with every tensor on `device`."""
    return changed(tree, lambda tensor: tensor.to(device))


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Floating-point type of the model's parameters; None if there are several, or none."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def to_dtype(tree: Any, dtype: torch.dtype | None) -> Any:
    """The same tree with every floating-point tensor converted to `dtype`; None changes nothing."""
    if dtype is None:
        return tree
    return changed(tree, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def changed(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same containers with `change` applied to every tensor; other leaves stay."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        values = {key: changed(entry, change) for key, entry in tree.items()}
        return values if type(tree) is dict else _rebuilt(tree, values)
    if isinstance(tree, PackedSequence):  # its indices follow the data's device, its batch sizes do not
        data, indices = change(tree.data), (tree.sorted_indices, tree.unsorted_indices)
        return PackedSequence(
            data, tree.batch_sizes, *(index if index is None else index.to(data.device) for index in indices)
        )
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(changed(item, change) for item in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(changed(item, change) for item in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {field_.name: changed(getattr(tree, field_.name), change) for field_ in fields(tree)}
        copied = copy.copy(tree)
        for name, value in values.items():
            object.__setattr__(copied, name, value)  # works on frozen dataclasses, and does not run their checks again
        return copied
    return tree


def _rebuilt(tree: Mapping[str, Any], values: dict[str, Any]) -> Any:
    """Mapping of the same type; a Hugging Face output takes its fields as keywords, a batch takes one dict."""
    try:
        return type(tree)(**values) if is_dataclass(tree) else type(tree)(values)  # type: ignore[call-arg]
    except TypeError:
        return values


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
