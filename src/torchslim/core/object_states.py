"""How a call changes objects that hold tensors beyond the values of these tensors.

The first step of a generation fills an empty cache: it adds tensors and sets flags. A program returns tensors alone.
Where their paths or the object's plain values differ from those before the call, the module runs once in Python on a
copy of the arguments, and the caller's own objects are brought into the state that the copies have afterwards. This
state depends on the structure of the arguments, for which the program was captured, and not on their values.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.isolation import untouched
from torchslim.core.tensor_objects import DEPTH, PLAIN, emptied, named_arguments, unpacked
from torchslim.core.trees import changed


def end_states(
    module: nn.Module, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The objects of a call without their tensors, in the state after the call; by name, as of `unpacked`."""
    args, kwargs = detached_copy((args, dict(kwargs)))
    objects: dict[str, Any] = {}
    unpacked(named_arguments(signature, args, kwargs), objects)
    with untouched(module), torch.no_grad():
        module(*args, **kwargs)
    return {name: emptied(value) for name, value in objects.items()}


def detached_copy(tree: Any) -> Any:
    """A deep copy of arguments, with detached tensors."""
    memo: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        memo[id(tensor)] = tensor.detach().clone()
        return tensor

    with torch.inference_mode(False):  # a clone made in inference mode could not be captured
        changed(tree, note)
        return copy.deepcopy(tree, memo)


def become(value: Any, end: Any, tensors: Mapping[str, Tensor], path: str = "", depth: int = 0) -> Any:
    """Give an object the state of `end`, in place as far as the types agree, with the tensors by their paths."""
    if path in tensors:
        return tensors[path]
    if depth > DEPTH or isinstance(end, (Tensor, *PLAIN)):
        return end

    def inner(before: Any, after: Any, name: str) -> Any:
        return become(before, after, tensors, f"{path}{name}", depth + 1)

    alike = type(value) is type(end)
    if isinstance(end, tuple):
        before = value if alike and len(value) == len(end) else [None] * len(end)
        items = [inner(own, item, f"[{n}]") for n, (own, item) in enumerate(zip(before, end, strict=True))]
        return type(end)(*items) if hasattr(end, "_fields") else type(end)(items)
    target = value if alike else copy.deepcopy(end)
    if isinstance(end, list):
        before = [*value, *[None] * len(end)] if alike else [None] * len(end)
        target[:] = [inner(own, item, f"[{n}]") for n, (own, item) in enumerate(zip(before, end, strict=False))]
    elif isinstance(end, dict):
        items_ = {key: inner(value.get(key) if alike else None, item, f"[{key!r}]") for key, item in end.items()}
        target.clear()
        target.update(items_)
    elif hasattr(end, "__dict__") and not callable(end):
        held = vars(value) if alike else {}
        own = {name: inner(held.get(name), item, f".{name}") for name, item in vars(end).items()}
        vars(target).clear()
        vars(target).update(own)
    return target
