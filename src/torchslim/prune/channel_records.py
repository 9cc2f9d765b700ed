"""Layer records of channel and depth pruning: what each module lost, and which groups or blocks stayed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from torchslim.core.reason import Reason
from torchslim.core.step import LayerRecord
from torchslim.prune.dependency.coupling import Coupling


def shapes_of_parameters(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of each parameter, by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def pruned_records(before: Mapping[str, torch.Size], model: nn.Module) -> list[LayerRecord]:
    """A record for each module whose parameters have become smaller than `before`, or are gone."""
    after = shapes_of_parameters(model)
    modules: dict[str, list[str]] = {}
    for name in before:
        if before[name] != after.get(name):
            modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    records = []
    for path, names in modules.items():
        matrices = [name for name in names if len(before[name]) > 1] or names[:1]
        if all(name not in after for name in names):
            records.append(LayerRecord(layer=path, action="pruned", reason="removed with its block", sparsity=1.0))
            continue
        changes = ", ".join(_change(name, before[name], after.get(name)) for name in matrices)
        old, new = (sum(shapes[name].numel() for name in names if name in shapes) for shapes in (before, after))
        records.append(LayerRecord(layer=path, action="pruned", reason=changes, sparsity=1 - new / old))
    return records


def _change(name: str, before: torch.Size, after: torch.Size | None) -> str:
    attribute = name.rpartition(".")[2]
    prefix = "" if attribute == "weight" else f"{attribute} "
    return f"{prefix}{' x '.join(map(str, before))} -> {'none' if after is None else ' x '.join(map(str, after))}"


def refused_records(refusals: Iterable[tuple[str, str]]) -> list[LayerRecord]:
    """A record for each pair of a layer and the reason why its channels stay."""
    return [LayerRecord(layer=layer, action="refused", reason=reason) for layer, reason in refusals]


def refusals(coupling: Coupling) -> list[tuple[str, str]]:
    """First member and reason of each group that stays; extents of kernels are left out, as all of them stay."""
    pairs = [(group.members[0].weight, group.reason) for group in coupling.groups if group.reason]
    return [pair for pair in dict.fromkeys(pairs) if not Reason.KERNEL_EXTENT.given_in(pair[1])]
