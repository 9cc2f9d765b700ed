"""Pack a module's weights, masks and surgery as bytes, and restore them: safetensors and JSON, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from torchslim.core.archives import read_tensors
from torchslim.core.isolation import copy_model, is_plain
from torchslim.errors import ArtifactError, PruneError
from torchslim.prune.structured.record import difference, rebuild, shapes, surgery

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def pack_state(module: nn.Module) -> tuple[bytes, dict[str, str], list[str]]:
    """Contiguous tensors as bytes, each storage once; aliases of tied tensors; names of channels-last tensors."""
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    channels_last: list[str] = []
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"the model's state {name!r} is a {type(value).__name__}, only tensors can be saved")
        key = (value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride()))
        if value.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        layout = CHANNELS_LAST.get(value.dim())
        if layout and not value.is_contiguous() and value.is_contiguous(memory_format=layout):
            channels_last.append(name)
        state[name] = value.detach().cpu().contiguous().clone()
    return save_tensors(state), aliases, channels_last


def restore(
    module: nn.Module, weights: bytes, manifest: Mapping[str, Any], record: Mapping[str, Any] | None = None
) -> nn.Module:
    """A module with a saved state, made from one of the same architecture, or of the one before its surgery.

    Raises:
        ArtifactError: the module does not fit the state; names the difference.
    """
    state = read_tensors(weights, "weights.safetensors")
    tied: Mapping[str, str] = manifest["aliases"]
    unknown = [first for first in tied.values() if first not in state] + [name for name in tied if name in state]
    if unknown:
        raise ArtifactError(f"the ties of {unknown[0]!r} in the manifest do not fit the weights; save the model again")
    state |= {name: state[first] for name, first in tied.items()}
    odd = [name for name in manifest["channels_last"] if name not in state or state[name].dim() not in CHANNELS_LAST]
    if odd:
        raise ArtifactError(f"the manifest lists {odd[0]!r} as channels-last, unlike the weights; save it again")
    saved_shapes = {name: list(value.shape) for name, value in state.items()}
    if difference(shapes(module), saved_shapes) and not is_plain(module):
        module, _ = copy_model(module)  # masks of torch.nn.utils.prune were saved as zeros
    if record is not None:
        try:
            module = rebuild(module, record, saved_shapes, tied)
        # a record that does not fit: parts, dimensions or sizes that the module lacks
        except (PruneError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ArtifactError(f"the saved surgery cannot be replayed: {error}") from error
    misfit = difference(shapes(module), saved_shapes)
    if misfit:
        raise ArtifactError(f"the factory's model does not fit the saved weights; {misfit}")
    try:
        _fill(module, state, manifest["channels_last"])
    except (RuntimeError, TypeError) as error:  # numbers of a type that the module's tensors cannot have
        raise ArtifactError(f"the saved weights cannot be put into the factory's model: {error}") from error
    return module


def _fill(module: nn.Module, state: Mapping[str, Tensor], channels_last: Sequence[str]) -> None:
    own = module.state_dict(keep_vars=True)
    holders: dict[int, str] = {}
    for name, tensor in own.items():
        first = holders.setdefault(id(tensor), name)
        if first != name and not torch.equal(state[first], state[name]):
            raise ArtifactError(
                f"the factory's model ties {first!r} and {name!r}, which differ in the saved weights; untie them"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
            if name in channels_last:
                tensor.data = tensor.data.contiguous(memory_format=CHANNELS_LAST[tensor.dim()])
    module.load_state_dict(state)


def pack_surgery(module: nn.Module) -> bytes | None:
    """The surgery of channel pruning on a module, as JSON; None if there was none."""
    record = surgery(module)
    return None if record is None else (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()


def pack_masks(masks: Mapping[str, Tensor]) -> tuple[bytes, dict[str, list[int]]]:
    """Masks as packed bits, eight weights in a byte, and their shapes."""
    packed = {
        name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1).astype(bool))) for name, mask in masks.items()
    }
    return save_tensors(packed), {name: list(mask.shape) for name, mask in masks.items()}
