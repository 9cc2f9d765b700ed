"""Criteria of depth pruning: what the outputs lose without a block, or how little a block changes its input."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from torchslim.core.batches import Outputs, output_logits
from torchslim.core.checks import shown
from torchslim.core.imports import resolve
from torchslim.core.isolation import duplicate
from torchslim.core.parts import under
from torchslim.errors import PruneError
from torchslim.prune.depth.flow import all_tensors
from torchslim.prune.depth.plan import DepthPlan
from torchslim.prune.depth.trial import Cut, removed

Damage = Callable[[Outputs, Outputs], float]
"""Returns how much worse the second outputs are than the first, the original model's, on one batch."""


def relative_error(before: Outputs, after: Outputs) -> float:
    """Squared error of the outputs over their variance, the mean over all floating outputs.

    An output whose values are all equal counts with its squared error over its mean square.
    """
    errors = []
    for old, new in zip(all_tensors(before), all_tensors(after), strict=True):
        if old.is_floating_point() and old.numel():
            old, new = old.double(), new.double()
            size = (old - old.mean()).square().sum()
            size = size if size > 0 else old.square().sum()
            errors.append(float((new - old).square().sum() / size.clamp(min=1e-300)))
    return sum(errors) / max(len(errors), 1)


def divergence(before: Tensor, after: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the class probabilities, KL(before || after), in nats.

    Shapes: (..., classes) with up to three dimensions, or (batch, classes, ...) with more.
    """
    dim = 1 if before.dim() > 3 else -1
    old, new = (functional.log_softmax(logits.double(), dim) for logits in (before, after))
    each = (old.exp() * (old - new)).sum(dim)
    return float(each.mean())


BLOCK_CRITERIA: Mapping[str, str] = {
    "kl": "divergence of the class probabilities without the block from the original ones",
    "error": "squared error of the outputs without the block, relative to their variance",
    "influence": "1 - cosine of the block's input and output (block influence, Men et al. 2024, arXiv:2403.03853)",
    "random": "a random order",
}
"""Criteria of depth pruning by name; blocks of the lowest score, per saved cost, go first."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Calibration batches, and how the model runs on one."""

    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Outputs]
    logits: Callable[[Outputs], Tensor] = output_logits
    classes: bool = False  # whether the logits are those of classes


def find_block_criterion(criterion: Any) -> str | Damage:
    """A name in `BLOCK_CRITERIA`, or the function that "package.module:name" names.

    Raises:
        PruneError: the criterion is not known.
    """
    if isinstance(criterion, str) and ":" in criterion:
        criterion = resolve(criterion, "criterion", PruneError)
    if criterion in BLOCK_CRITERIA if isinstance(criterion, str) else callable(criterion):
        return criterion  # type: ignore[no-any-return]
    raise PruneError(
        f"criterion {shown(criterion)} is not known for blocks; one of {', '.join(BLOCK_CRITERIA)}, a function "
        "(outputs before, outputs after) -> damage, or 'package.module:name'"
    )


@dataclass
class BlockScores:
    """Scores the blocks of a plan on data, as a model without some of them stands.

    Args:
        plan: of the model, or of the part of `whole` at `path`.
        criterion: a name in `BLOCK_CRITERIA` or a `Damage`; None: "kl" where labels are classes, else "error".
        data: batches of the whole model.
        whole: the model that runs; None: the plan's.
        path: of the part that the plan is of.
        seed: of the criterion "random".
    """

    plan: DepthPlan
    criterion: str | Damage | None
    data: Data
    whole: nn.Module | None = None
    path: str = ""
    seed: int = 0
    damage: dict[tuple[str, ...], float] = field(default_factory=dict)  # of the outputs, by the blocks that are gone

    def __post_init__(self) -> None:
        self.name = self.criterion or ("kl" if self.data.classes else "error")
        self._model = duplicate(self.plan.model if self.whole is None else self.whole).eval()
        self._original: list[Outputs] = []

    def __call__(self, gone: Sequence[str], candidates: Sequence[str]) -> dict[str, float]:
        """The score of each candidate for removal from the model without the blocks in `gone`.

        Scores are per batch, and their mean is over the batches. A criterion of the outputs scores by the increase of
        the damage.

        Raises:
            PruneError: the model's outputs, or the criterion's results, cannot be used.
        """
        if self.name not in ("random", "influence") and not self._original:  # before any block goes
            self._original = [self._run(Cut({}, {}), batch) for batch in self.data.batches]
        if self.name == "random":
            return {name: float(zlib.crc32(f"{self.seed} {name}".encode())) for name in candidates}
        prefixed = [{under(self.path, path): what for path, what in way.items()} for way in self.plan.ways(gone)]
        with removed(self._model, prefixed) if gone else nullcontext():
            if self.name == "influence":
                return self._influence(candidates)
            before = self.damage.setdefault(tuple(sorted(gone)), 0.0)
            scores = {}
            for name in candidates:
                damage = self._damage(name)
                self.damage[tuple(sorted([*gone, name]))] = damage
                scores[name] = damage - before
            return scores

    def _zeroed(self, name: str) -> tuple[dict[Any, int], dict[str, Any]]:
        block = self.plan.blocks[name]
        return (
            {(under(self.path, path), number): term for (path, number), term in block.zeroed.items()},
            {under(self.path, path): stream for path, stream in block.passed.items()},
        )

    def _damage(self, name: str) -> float:
        """Mean damage of the outputs over the batches, if the block goes too."""
        cut = self._zeroed(name)
        damages = [
            self._compare(original, self._run(Cut(*cut), batch))
            for batch, original in zip(self.data.batches, self._original, strict=True)
        ]
        return sum(damages) / len(damages)

    def _run(self, cut: Cut, batch: Any) -> Outputs:
        return cut.run(self._model, lambda model: self.data.forward(model, batch))

    def _compare(self, original: Outputs, outputs: Outputs) -> float:
        if self.name == "kl":
            damage = divergence(self.data.logits(original), self.data.logits(outputs))
        elif self.name == "error":
            damage = relative_error(original, outputs)
        else:
            assert callable(self.name)
            damage = float(self.name(original, outputs))
        return float("inf") if math.isnan(damage) else damage  # outputs without a number are the worst

    def _influence(self, candidates: Sequence[str]) -> dict[str, float]:
        """1 - cosine between what enters a block and what leaves it, each sample flattened; mean over samples."""
        totals: dict[str, list[float]] = {name: [] for name in candidates}
        owners: dict[Any, str] = {}
        watched: dict[Any, int] = {}
        streams: dict[str, Any] = {}
        for name in candidates:
            zeroed, passed = self._zeroed(name)
            watched |= zeroed
            streams |= passed
            owners |= dict.fromkeys((*zeroed, *passed), name)

        def seen(key: Any, before: Tensor, after: Tensor) -> None:
            old, new = (value.double().reshape(value.shape[0], -1) for value in (before, after))
            cosine = functional.cosine_similarity(old, new, dim=-1)
            totals[owners[key]].append(float((1 - cosine).mean()))

        for batch in self.data.batches:
            self._run(Cut({}, {}, watched=watched, streams=streams, seen=seen), batch)
        return {name: sum(values) / len(values) if values else float("inf") for name, values in totals.items()}
