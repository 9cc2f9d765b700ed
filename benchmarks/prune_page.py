"""The page of the comparison of criteria, from its rows alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.one_cut import BATCH, ROUND_TO, SAMPLES, Way
from benchmarks.prune_plan import BLOCKS, DEFAULT, EPOCHS, PEERS, SEEDS, SPARSITIES, Found
from benchmarks.rows import Row
from torchslim.prune import CRITERIA

COMMAND = "python -m benchmarks.prune"
BAR = -0.2
RECONSTRUCTED = (
    "*Reconstructed*: the remaining weights are solved for on the same images right after the cut",
    "(`reconstruct=True`).",
)
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Half of the width of a 95 % t-interval in standard errors, by degrees of freedom."""


def page(rows: Iterable[Row], machine: dict[str, Any], epochs: int = EPOCHS) -> str:
    """The Markdown page, from the rows and the machine alone."""
    found = Found(rows, epochs)
    versions = Counter((way.side, row["version"]) for (way, _, _), row in found.rows.items())
    lines = [
        "# Criteria for channels, compared",
        "",
        f"Written by `{COMMAND}`; {machine['processor']}, torch {machine['versions']['torch']}; "
        + ", ".join(f"{side} {name} ({number} rows)" for (side, name), number in sorted(versions.items()))
        + ".",
        f"The demo's baseline on Fashion-MNIST; channels go in steps of {ROUND_TO}, ranked over the whole model. Both",
        f"sides see the same {SAMPLES} images for scores and batch norms, drawn by the seed, and are finetuned alike:",
        f"{epochs} epoch{'s' * (epochs > 1)} of SGD, learning rate 0.01, cosine, batches of {BATCH} in the same order.",
        "Torch-Pruning has its defaults and cuts in small steps until the target is reached, as in the reproduction of",
        "its paper. MACs are counted by torchslim on both sides. *Cut* is right after the cut, *recalibrated* with the",
        "batch norms' statistics taken again, from which the finetuning starts on both sides.",
        *(RECONSTRUCTED if any(way.reconstruct for way in found.ours()) else ()),
        "**Everything is selected on validation** (5,000 images held out of train); test never selects.",
        "",
        "Unpruned: " + _baseline(found.baseline),
    ]
    for sparsity in SPARSITIES:
        lines += ["", f"## Every criterion with its default options, {_target(sparsity)}, seed 0", ""]
        lines += _criteria(found, sparsity)
    lines += ["", "## Options of the best, seed 0, validation only", "", *_options(found)]
    for sparsity in SPARSITIES:
        lines += ["", f"## {len(SEEDS)} seeds, {_target(sparsity)}", "", *_seeds(found, sparsity)]
    return "\n".join([*lines, "", "## Verdict", "", *_verdict(found)]) + "\n"


def _target(sparsity: float) -> str:
    return f"{1 / (1 - sparsity):.0f}x fewer MACs"


def _baseline(row: Row) -> str:
    if not row:
        return "not measured."
    return (
        f"{row['macs'] / 1e6:.2f} M MACs, {row['parameters'] / 1e3:.0f} k parameters, {row['val']:.2f} % on validation "
        f"and {row['test']:.2f} % on test."
    )


def _name(way: Way) -> str:
    solved = ("reconstructed",) if way.reconstruct else ()
    options = (way.normalization, way.reduction, *solved) if way.side == "ours" else ()
    prefix = {"ours": "", "peer": "Torch-Pruning ", "blocks": "blocks, "}[way.side]
    return f"{prefix}`{way.criterion}`{''.join(f', {option}' for option in options)}"


def _criteria(found: Found, sparsity: float) -> list[str]:
    lines = [
        "| criterion | MACs left | parameters | cut, val % | recalibrated, val % | finetuned, val % | test % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    ways = [*(Way(criterion=name) for name in CRITERIA), *PEERS]
    for way in sorted(ways, key=lambda way: -(found.get(way, sparsity) or {"val": 0})["val"]):
        name = _name(way) if way.side == "peer" else f"`{way.criterion}`"
        row = found.get(way, sparsity)
        if row is None:
            why = found.rows.get((way, sparsity, 0), {"reason": "not measured"})["reason"]
            lines.append(f"| {name} | {why} | - | - | - | - | - |")
            continue
        accuracies = (f"{row[each]:.2f}" for each in ("val_cut", "val_recalibrated", "val", "test"))
        lines.append(
            f"| {name} | {100 * row['macs_left']:.1f} % | {row['parameters'] / 1e3:.0f} k | {' | '.join(accuracies)} |"
        )
    return lines


def _options(found: Found) -> list[str]:
    targets = [_target(sparsity).split()[0] for sparsity in SPARSITIES]
    lines = [
        "| criterion | normalization | reduction | "
        + " | ".join(f"recalibrated, {target}" for target in targets)
        + " | "
        + " | ".join(f"finetuned, {target}" for target in targets)
        + " | finetuned, mean |",
        "| --- " * (4 + 2 * len(targets)) + "|",
    ]
    for leader in found.leaders():
        for way in found.ranked(
            way for way in found.ours() if way.criterion == leader.criterion and not way.reconstruct
        ):
            rows = [found.rows[way, sparsity, 0] for sparsity in SPARSITIES]
            cells = [f"{row[name]:.2f}" for name in ("val_recalibrated", "val") for row in rows]
            cells.append(f"{mean(row['val'] for row in rows):.2f}")
            lines.append(f"| `{way.criterion}` | {way.normalization} | {way.reduction} | {' | '.join(cells)} |")
    return lines


def values(found: Found, way: Way, sparsity: float, what: str = "test") -> list[float]:
    """Of every seed; empty unless all have run."""
    rows = [row for seed in SEEDS if (row := found.get(way, sparsity, seed))]
    return [row[what] for row in rows] if len(rows) == len(SEEDS) else []


def better_peer(found: Found, sparsity: float) -> Way | None:
    """The one with the higher mean on test: the harder one to match."""
    ways = [way for way in PEERS if values(found, way, sparsity)]
    return max(ways, key=lambda way: mean(values(found, way, sparsity)), default=None)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean difference, and half the width of its 95 % t-interval."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean(differences), T_95[len(differences) - 1] * stdev(differences) / math.sqrt(len(differences))


def _seeds(found: Found, sparsity: float) -> list[str]:
    other = better_peer(found, sparsity)
    against = _name(other) if other else "-"
    lines = [
        "| way | MACs left | parameters | cut, val % | recalibrated, val % | finetuned, val % | test % | "
        f"test, paired with {against} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way in dict.fromkeys([*found.contestants(), *found.ours(), *BLOCKS, *PEERS]):
        if not (test := values(found, way, sparsity)):
            continue
        left = [100 * value for value in values(found, way, sparsity, "macs_left")]
        size = mean(values(found, way, sparsity, "parameters")) / 1e3
        measured = (values(found, way, sparsity, what) for what in ("val_cut", "val_recalibrated", "val", "test"))
        spread = (f"{mean(each):.2f} +- {stdev(each):.2f}" for each in measured)
        against = "-"
        if other is not None and way != other:
            difference, half = paired(test, values(found, other, sparsity))
            against = f"{difference:+.2f} [{difference - half:+.2f}, {difference + half:+.2f}]"
        lines.append(
            f"| {_name(way)} | {min(left):.1f}-{max(left):.1f} % | {size:.0f} k | {' | '.join(spread)} | {against} |"
        )
    return ["Mean +- standard deviation; paired mean difference in points [95 % t-interval].", "", *lines]


def _verdict(found: Found) -> list[str]:
    way = found.chosen()
    others = [better_peer(found, sparsity) for sparsity in SPARSITIES]
    if way is None or None in others:
        return ["Not all seeds have been run."]
    differences = [
        paired(values(found, way, sparsity), values(found, other, sparsity))[0]
        for sparsity, other in zip(SPARSITIES, others, strict=True)
        if other is not None
    ]
    holds = all(difference >= BAR for difference in differences)
    measured = ", ".join(f"{each:+.2f} at {_target(s)}" for each, s in zip(differences, SPARSITIES, strict=True))
    default, there = found.validation(DEFAULT), found.validation(way)
    beside = ""
    if default:
        beside = f" With seed 0: {there:.2f} %, and the library's default, {_name(DEFAULT)}, {default:.2f} %."
    return [
        f"Best on validation of those that ran with every seed: {_name(way)}, {found.validation(way, SEEDS):.2f} % on "
        f"average over both targets.{beside}",
        "",
        f"Bar: at least {BAR} points on test against the better of Torch-Pruning's two, paired, at both targets: "
        f"{'**met**' if holds else '**not met**'} ({measured}).",
    ]
