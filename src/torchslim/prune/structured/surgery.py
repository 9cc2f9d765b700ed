"""Surgery: a copy of the user's module without slices of its weights, and with its attributes that carry sizes adapted.

Whole modules can be dropped as well: `bypass.py` has the modules that stand in their places.

No class is known by name. An attribute counts as a size if its value is one that changed around the module; where that
is not certain, values are tried one at a time against the predicted shape of every intermediate value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchslim.core.isolation import duplicate
from torchslim.core.parts import under
from torchslim.errors import PruneError
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.trace import named_weights
from torchslim.prune.structured.bypass import Drop, drop_in_place
from torchslim.prune.structured.literals import FORWARD, literals, write


@dataclass(frozen=True, slots=True)
class Cut:
    """The indices of one dimension of a weight that stay."""

    weight: str
    dim: int
    size: int  # before the cut
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
    """The changes of one round; replayed on a fresh instance of the base, they give the same module.

    Cuts and patches come first, then whole modules are dropped.
    """

    cuts: tuple[Cut, ...]
    patches: tuple[Patch, ...]
    drops: tuple[Drop, ...] = ()

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
            "drops": [drop.to_dict() for drop in self.drops],
        }

    def under(self, path: str) -> Surgery:
        """The same changes of a part, with the paths of the whole model."""
        return Surgery(
            tuple(replace(cut, weight=under(path, cut.weight)) for cut in self.cuts),
            tuple(replace(patch, module=under(path, patch.module)) for patch in self.patches),
            tuple(drop.under(path) for drop in self.drops),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Surgery:
        """The inverse of `to_dict`."""
        return cls(
            tuple(Cut(cut["weight"], cut["dim"], cut["size"], tuple(cut["kept"])) for cut in data["cuts"]),
            tuple(
                Patch(patch["module"], patch["name"], tuple(patch["place"]), patch["old"], patch["new"])
                for patch in data["patches"]
            ),
            tuple(map(Drop.from_dict, data.get("drops", ()))),
        )


def cuts_of(coupling: Coupling, removed: Mask) -> tuple[Cut, ...]:
    """The cuts that a removal makes in all weights."""
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
    cut_weights: dict[str, Tensor] = {}
    for cut in surgery.cuts:
        if cut.weight not in weights:
            raise PruneError(f"the surgery cuts {cut.weight!r}, which this model ({type(model).__name__}) lacks")
        value = cut_weights.get(cut.weight, weights[cut.weight].detach())
        if value.dim() <= cut.dim or value.shape[cut.dim] != cut.size:
            raise PruneError(
                f"the surgery cuts dimension {cut.dim} of {cut.weight!r} from {cut.size} to {len(cut.kept)}, but "
                f"its shape here is {tuple(value.shape)}; give the factory of the model that was pruned"
            )
        cut_weights[cut.weight] = value.index_select(cut.dim, torch.tensor(cut.kept, device=value.device))
    placed: dict[int, Tensor] = {}
    for name, value in cut_weights.items():
        weight = weights[name]
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
            value = value.contiguous(memory_format=torch.channels_last)
        placed[id(weight)] = nn.Parameter(value, weight.requires_grad) if isinstance(weight, nn.Parameter) else value
    shrunk = duplicate(model, placed)
    for patch in surgery.patches:
        apply_patch(shrunk, patch)
    for drop in surgery.drops:
        drop_in_place(shrunk, drop)
    return shrunk


def apply_patch(model: nn.Module, patch: Patch, *, back: bool = False) -> None:
    """Set one attribute to its new value, or with `back` to its old one."""
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
