"""Surgery: a copy of the user's own module with slices of its weights gone and its attributes that carry sizes mended.

No class is known by name. An attribute is taken for a size when its value is one that changed around the module; where
that is not certain, values are tried one at a time against the predicted shape of every intermediate value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchslim.core.isolation import duplicate
from torchslim.errors import PruneError
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.trace import named_weights
from torchslim.prune.structured.literals import FORWARD, literals, write


@dataclass(frozen=True, slots=True)
class Cut:
    """Which indices of one dimension of a weight stay."""

    weight: str
    dim: int
    size: int  # before
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Patch:
    """One attribute of a module that carries a size."""

    module: str
    name: str
    place: tuple[int, ...]  # where in nested tuples or lists; empty for a plain number
    old: int
    new: int


@dataclass(frozen=True, slots=True)
class Surgery:
    """What one round removed: replayed on a fresh instance of the base, it gives the same module."""

    cuts: tuple[Cut, ...]
    patches: tuple[Patch, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and numbers."""
        return {
            "cuts": [
                {"weight": cut.weight, "dim": cut.dim, "size": cut.size, "kept": list(cut.kept)} for cut in self.cuts
            ],
            "patches": [
                {
                    "module": patch.module,
                    "name": patch.name,
                    "place": list(patch.place),
                    "old": patch.old,
                    "new": patch.new,
                }
                for patch in self.patches
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Surgery:
        """The inverse of `to_dict`."""
        return cls(
            tuple(Cut(cut["weight"], cut["dim"], cut["size"], tuple(cut["kept"])) for cut in data["cuts"]),
            tuple(
                Patch(patch["module"], patch["name"], tuple(patch["place"]), patch["old"], patch["new"])
                for patch in data["patches"]
            ),
        )


def cuts_of(coupling: Coupling, removed: Mask) -> tuple[Cut, ...]:
    """What a removal takes from every weight."""
    cuts = []
    for name, value in coupling.trace.weights.items():
        for dim, keep in enumerate(coupling.kept(value.layers, value.shape, removed)):
            if keep is not None:
                cuts.append(Cut(name, dim, len(keep), tuple(np.flatnonzero(keep).tolist())))
    return tuple(cuts)


@torch.no_grad()
def perform(model: nn.Module, surgery: Surgery) -> nn.Module:
    """A copy of the model after the surgery; the full weights are never copied.

    Raises:
        PruneError: the model is not the one that the surgery was made for.
    """
    weights = named_weights(model)
    cut: dict[str, Tensor] = {}
    for each in surgery.cuts:
        if each.weight not in weights:
            raise PruneError(f"the surgery cuts {each.weight!r}, which this model ({type(model).__name__}) lacks")
        value = cut.get(each.weight, weights[each.weight].detach())
        if value.dim() <= each.dim or value.shape[each.dim] != each.size:
            raise PruneError(
                f"the surgery cuts dimension {each.dim} of {each.weight!r} from {each.size} to {len(each.kept)}, but "
                f"its shape here is {tuple(value.shape)}; give the factory of the model that was pruned"
            )
        cut[each.weight] = value.index_select(each.dim, torch.tensor(each.kept, device=value.device))
    placed: dict[int, Tensor] = {}
    for name, value in cut.items():
        before = weights[name]
        if before.dim() == 4 and before.is_contiguous(memory_format=torch.channels_last) and not before.is_contiguous():
            value = value.contiguous(memory_format=torch.channels_last)
        placed[id(before)] = nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value
    shrunk = duplicate(model, placed)
    for patch in surgery.patches:
        apply_patch(shrunk, patch)
    return shrunk


def apply_patch(model: nn.Module, patch: Patch, *, back: bool = False) -> None:
    """Set one attribute, or set it back."""
    module = model.get_submodule(patch.module)
    value = patch.old if back else patch.new
    if patch.name == FORWARD:
        if not any((number,) == patch.place for number, _ in literals(module)):
            raise PruneError(f"the surgery changes the number {patch.place} in {patch.module}.forward, which lacks it")
        write(module, patch.place[0], value)
        return
    if patch.name not in vars(module):
        raise PruneError(f"the surgery sets {patch.module}.{patch.name}, which this model lacks")
    vars(module)[patch.name] = _replaced(vars(module)[patch.name], patch.place, value)


def _replaced(value: Any, place: Sequence[int], new: int) -> Any:
    if not place:
        return new
    items = list(value)
    items[place[0]] = _replaced(items[place[0]], place[1:], new)
    return torch.Size(items) if isinstance(value, torch.Size) else type(value)(items)
