"""Removes residual blocks: those that are named, or the ones that cost the least until the target is met.

Damage does not add up, so every block is scored again after each removal. A block goes only if the model without it and
without those that went before equals the original with their branches at zero.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from torchslim.core.layer_patterns import Patterns, as_list
from torchslim.core.reason import Reason
from torchslim.core.step import Workbench
from torchslim.errors import PruneError
from torchslim.prune.depth.plan import BlockMeasure, DepthPlan
from torchslim.prune.depth.scores import BlockScores, Damage
from torchslim.prune.structured.plan import shapes_of
from torchslim.prune.structured.record import attach
from torchslim.prune.structured.removal import Stuck
from torchslim.prune.structured.surgery import Surgery, perform

SHOWN = 6
"""How many names or reasons a message lists."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DepthRemoval:
    """A verified removal of blocks."""

    model: nn.Module
    surgery: Surgery
    blocks: tuple[str, ...]
    fraction: float  # of the model, in the measure that was asked for
    scores: dict[str, float]  # of the removed blocks, when they went


class NoBlocks(Stuck):
    """No block can go, or not as many as asked for."""


def check_block_request(sparsity: float | None, blocks: Patterns) -> None:
    """Raise PruneError unless either a sparsity or names of blocks are given."""
    if (sparsity is None) == (blocks is None):
        given = "neither" if sparsity is None else f"sparsity={sparsity} and blocks={blocks!r}"
        raise PruneError(f"give either sparsity=... (the fraction removed) or blocks=[...] (their names), got {given}")
    if sparsity is not None and not 0 < sparsity < 1:
        raise PruneError(f"sparsity must be in (0, 1), got {sparsity}")
    if blocks is not None and not as_list(blocks):
        raise PruneError("blocks is empty; name blocks, such as blocks=['layer3.*'], or give sparsity=...")


def block_request(
    sparsity: float | None, blocks: Patterns, of: BlockMeasure, criterion: str | Damage | None
) -> dict[str, Any]:
    """The request for a record: the names of blocks, or the sparsity, its measure and the criterion."""
    if blocks is not None:
        return {"asked": as_list(blocks)}
    name = criterion if isinstance(criterion, str) or criterion is None else getattr(criterion, "__name__", "function")
    return {"sparsity": sparsity, "of": of, "criterion": name or "default"}


def remove_named(plan: DepthPlan, patterns: Patterns) -> DepthRemoval:
    """Remove the blocks that names or globs select, with the whole modules first.

    Raises:
        PruneError: a pattern matches no block, or a block cannot go; the message says why.
    """
    chosen = [name for pattern in as_list(patterns) for name in _matching(plan, pattern)]
    outer: list[str] = []
    for name in sorted(dict.fromkeys(chosen), key=lambda name: not plan.blocks[name].passed):  # whole modules first
        if not plan.covers(outer, name):
            if objection := plan.verify(outer, name):
                raise NoBlocks(f"block {name!r} cannot go: {objection}")
            outer.append(name)
    return _removal(plan, outer, "params", {})


def _matching(plan: DepthPlan, pattern: str) -> list[str]:
    names = [name for name in plan.blocks if fnmatchcase(name, pattern)]
    if names:
        return names
    near = difflib.get_close_matches(pattern, plan.blocks, n=3, cutoff=0.3) or list(plan.blocks)[:SHOWN]
    raise NoBlocks(
        f"{pattern!r} matches no residual block; "
        + (f"near names: {', '.join(near)}" if near else f"{type(plan.model).__name__} has none")
    )


def remove_blocks(
    plan: DepthPlan,
    sparsity: float,
    of: BlockMeasure,
    scores: BlockScores,
    *,
    workbench: Workbench | None = None,
    progress: Progress = lambda done, total: None,
) -> DepthRemoval:
    """Remove blocks of the lowest score per saved cost until at least the fraction `sparsity` is gone.

    Raises:
        NoBlocks: the blocks that can go are fewer; the message gives the largest fraction.
    """
    gone: list[str] = []
    taken: dict[str, float] = {}
    total = plan.total(of)
    fraction = 0.0
    while fraction < sparsity - 1e-9:
        candidates = [name for name in plan.offered if not plan.covers(gone, name)]
        before = plan.size(gone, of)
        savings = {name: plan.size([*gone, name], of) - before for name in candidates}
        candidates = [name for name in candidates if savings[name] > 0]
        values = scores(gone, candidates) if candidates else {}
        missing = max((sparsity - fraction) * total, 1.0)  # more than this is of no use
        for name in sorted(candidates, key=lambda name: _price(values[name], min(savings[name], missing))):
            inner = [other for other in gone if not plan.covers([name], other)]
            if objection := plan.verify(inner, name):
                plan.refuse(name, objection)
                continue
            gone, taken = [*inner, name], {**taken, name: values[name]}
            break
        else:
            raise NoBlocks(_too_few(plan, sparsity, of, fraction))
        fraction = plan.size(gone, of) / max(total, 1)
        if workbench is not None:
            fraction = 1 - _time(plan, gone, workbench)
        progress(int(100 * min(fraction, sparsity)), int(100 * sparsity))
    if workbench is None:
        gone = _without_spare(plan, gone, sparsity * total, of)
        fraction = plan.size(gone, of) / total
    return _removal(plan, gone, of, {name: taken[name] for name in gone}, fraction)


def _without_spare(plan: DepthPlan, gone: Sequence[str], target: float, of: BlockMeasure) -> list[str]:
    """The blocks without those that need not go, as later and larger ones save enough."""
    needed = list(gone)
    for name in gone:
        others = [other for other in needed if other != name]
        if others and plan.size(others, of) >= target and not plan.verify(others[:-1], others[-1]):
            needed = others
    return needed


def _price(score: float, saving: float) -> float:
    """The score per saved cost; a negative score, where the outputs gain, is better with a larger saving."""
    return score / saving if score > 0 else score * saving


def _time(plan: DepthPlan, gone: Sequence[str], workbench: Workbench) -> float:
    """Time of the model without blocks, over that of the plan's model."""
    name = "blocks-" + " ".join(sorted(gone))
    times = workbench.latency({name: lambda: perform(plan.model, plan.surgery(gone))}, plan.model)
    return times.get(name, 1.0)


def _too_few(plan: DepthPlan, sparsity: float, of: BlockMeasure, fraction: float) -> str:
    reasons = [f"{name}: {reason}" for name, reason in plan.reasons.items()]
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    stay = f" ({'; '.join(reasons[:SHOWN])}{more})" if reasons else ""
    model = type(plan.model).__name__
    if not plan.blocks:
        return f"{model} has no residual block: no addition of a branch to the value that it starts from"
    return f"the blocks of {model} that can go are {fraction:.2f} of its {of}, less than {sparsity}; ask for less{stay}"


def _removal(
    plan: DepthPlan, names: Sequence[str], of: BlockMeasure, scores: dict[str, float], fraction: float | None = None
) -> DepthRemoval:
    surgery = plan.surgery(names)
    fraction = plan.size(names, of) / max(plan.total(of), 1) if fraction is None else fraction
    return DepthRemoval(perform(plan.model, surgery), surgery, tuple(names), fraction, scores)


def describe(plan: DepthPlan, removal: DepthRemoval, request: dict[str, Any]) -> dict[str, Any]:
    """The entry "about" of a record: the request, the verification, sizes before and after, and blocks that stayed."""
    return {
        "verified": True,
        "precision": str(plan.trial.precision).removeprefix("torch."),
        "sizes": [shapes_of(plan.inputs)],
        **request,
        "blocks": list(removal.blocks),
        "left": 1 - removal.fraction,
        "scores": removal.scores,
        "parameters": [plan.total("params"), plan.total("params") - plan.size(removal.blocks, "params")],
        "macs": [plan.total("macs"), plan.total("macs") - plan.size(removal.blocks, "macs")],
        "stayed": {
            name: reason
            for name, reason in plan.reasons.items()
            if reason not in (Reason.EXCLUDED, Reason.NOT_INCLUDED)
        },
    }


def finish_blocks(
    whole: nn.Module, path: str, plan: DepthPlan, removal: DepthRemoval, request: dict[str, Any]
) -> nn.Module:
    """The whole model after a removal from the part at `path`, with its record."""
    about = describe(plan, removal, request)
    if not path:
        attach(removal.model, plan.model, removal.surgery, about)
        return removal.model
    surgery = removal.surgery.under(path)
    smaller: nn.Module = perform(whole, surgery)
    attach(smaller, whole, surgery, {**about, "part": path})
    return smaller
