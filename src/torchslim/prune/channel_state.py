"""The state of channel or depth pruning between its rounds, and its checkpoint after every cut."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core import distributed
from torchslim.core.files import present
from torchslim.core.isolation import warn
from torchslim.core.layer_patterns import parameter_paths
from torchslim.core.parts import under
from torchslim.core.seals import read_sealed, write_sealed
from torchslim.core.step import Context
from torchslim.core.trees import device_of
from torchslim.errors import PruneError, StorageError
from torchslim.prune.latency.table import Rows
from torchslim.prune.reconstruction.reconstruct import Solved
from torchslim.prune.structured.record import replay, surgery
from torchslim.prune.structured.surgery import Surgery


@dataclass
class PartState:
    """The figures of a part, or of the whole model, that later rounds need."""

    total: float = 0.0  # the size of the part that the step received; 0 before the first cut
    kept: float = 0.0  # the size of the part now, in the same measure
    tolerance: float = 0.0  # a result this far from the target does not miss it
    refused: list[tuple[str, str]] = field(default_factory=list)  # layer and reason
    rows: Rows = field(default_factory=dict)  # times by row and width, for of="latency"


@dataclass
class PruningState:
    """The model so far, and the figures that later rounds need; the checkpoint uses the same names."""

    model: nn.Module
    masks: dict[str, Tensor]
    parts: dict[str, PartState]  # by path; the whole model has the path ""
    cuts: int = 0  # rounds whose cut is done
    warnings: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    reconstructed: dict[str, dict[str, Any]] = field(default_factory=dict)  # by weight: fields of the last `Solved`

    def note_solved(self, solved: Iterable[Solved]) -> None:
        """Keep the results of a round's reconstruction; later rounds replace those of earlier ones."""
        self.reconstructed |= {result.weight: asdict(result) for result in solved}

    def solved(self) -> list[Solved]:
        """The results of reconstructions so far."""
        return [Solved(**fields) for fields in self.reconstructed.values()]

    @property
    def refused(self) -> list[tuple[str, str]]:
        """Layers whose channels stay, with the reasons."""
        return [(under(path, layer), reason) for path, part in self.parts.items() for layer, reason in part.refused]

    def save(self, ctx: Context) -> None:
        """Store the surgery that leads to the model, its weights, masks and figures."""
        path = _checkpoint(ctx)
        if path is None or not distributed.is_first():
            return
        figures = {name: value for name, value in vars(self).items() if name not in ("model", "masks", "parts")}
        figures["parts"] = {name: vars(part) for name, part in self.parts.items()}
        checkpoint = {
            "about": json.dumps({**figures, "surgery": surgery(self.model)}),
            "weights": self.model.state_dict(),
            "masks": self.masks,
        }
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_sealed(path, buffer.getvalue(), ctx.key)


def restored_state(model: nn.Module, ctx: Context) -> PruningState | None:
    """The stored state, its surgery repeated on the model that the step received; None where none is stored."""
    path = _checkpoint(ctx)
    if path is None or not present(path):
        return None
    try:
        content = read_sealed(path, ctx.key)
    except StorageError as error:
        if distributed.is_first():
            warn(f"{error}; the rounds of pruning start over")
        return None
    try:
        return _read(content, model)
    except Exception as error:
        raise PruneError(
            f"the stored round {path} cannot be resumed from ({error}); delete it to start over"
        ) from error


def _read(content: bytes, model: nn.Module) -> PruningState:
    checkpoint = torch.load(io.BytesIO(content), map_location=device_of(model), weights_only=True)
    figures = json.loads(checkpoint["about"])
    record = figures.pop("surgery")
    pruned = model if record is None else replay(model, record)
    pruned.load_state_dict(checkpoint["weights"])
    parts = {name: _part(stored) for name, stored in figures.pop("parts").items()}
    return PruningState(model=pruned, masks=checkpoint["masks"], parts=parts, **figures)


def _part(stored: Mapping[str, Any]) -> PartState:
    refused = [(layer, reason) for layer, reason in stored["refused"]]
    rows = {name: {int(width): ratio for width, ratio in ratios.items()} for name, ratios in stored["rows"].items()}
    return PartState(**{**stored, "refused": refused, "rows": rows})


def _checkpoint(ctx: Context) -> Path | None:
    return None if ctx.state is None else ctx.state / "cut.ckpt"


def cut_masks(masks: Mapping[str, Tensor], surgery: Surgery, model: nn.Module) -> dict[str, Tensor]:
    """Masks of weights that are zero already, without what the surgery removes from the whole `model`."""
    first_path = {path: first for first, paths in parameter_paths(model).items() for path in paths}
    lost = {name for drop in surgery.drops for name in drop.tensors}
    remaining = {name: mask for name, mask in masks.items() if name not in lost}
    for cut in surgery.cuts:
        for name, mask in remaining.items():
            if first_path.get(name) == cut.weight:
                remaining[name] = mask.index_select(cut.dim, torch.tensor(cut.kept, device=mask.device))
    return remaining
