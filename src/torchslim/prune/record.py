"""What was removed, kept with the module: rounds of surgery, and the base that they start from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchslim.channels.trace import named_weights
from torchslim.errors import PruneError
from torchslim.files import digest
from torchslim.prune.shrink import Surgery, perform

ATTRIBUTE = "_torchslim_surgery"
VERSION = 1


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of every parameter and buffer."""
    return {name: list(tensor.shape) for name, tensor in named_weights(model).items()}


def surgery(model: nn.Module) -> dict[str, Any] | None:
    """What channel pruning removed from this module, as plain JSON values; None where it never did.

    `base` says which model it starts from: its class, and a digest of the shapes of its weights. `rounds` holds, for
    each pruning in turn, `cuts` (which indices of which dimension of a weight stay), `patches` (attributes that carry
    sizes), and `about`: what was asked and reached, and why other channels stayed.
    """
    found = vars(model).get(ATTRIBUTE)
    return copy.deepcopy(found) if found is not None else None


def attach(shrunk: nn.Module, base: nn.Module, done: Surgery, about: Mapping[str, Any]) -> None:
    """Add a round to the record that the shrunk module carries on from its base."""
    known = surgery(base) or {
        "version": VERSION,
        "base": {"class": f"{type(base).__module__}.{type(base).__qualname__}", "shapes": digest(shapes(base))},
        "rounds": [],
    }
    known["rounds"].append({**done.to_json(), "about": dict(about)})
    vars(shrunk)[ATTRIBUTE] = known


def replay(base: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The shrunk module, made again from a fresh instance of its base, or from what earlier rounds have made of it.

    Raises:
        PruneError: the record is of a newer version, or of another model.
    """
    if record["version"] > VERSION:
        raise PruneError(
            f"the surgery has format version {record['version']}, this torchslim reads {VERSION}; upgrade it"
        )
    done = surgery(base) or {"base": {"shapes": digest(shapes(base))}, "rounds": []}
    past = len(done["rounds"])
    if done["base"]["shapes"] != record["base"]["shapes"] or done["rounds"] != record["rounds"][:past]:
        raise PruneError(
            f"the surgery was made on a {record['base']['class']} with other weights than this {type(base).__name__}; "
            "give the factory of the model that was pruned"
        )
    rounds: Sequence[Mapping[str, Any]] = record["rounds"][past:]
    for each in rounds:
        base = perform(base, Surgery.from_json(each))
    vars(base)[ATTRIBUTE] = copy.deepcopy(dict(record))
    return base
