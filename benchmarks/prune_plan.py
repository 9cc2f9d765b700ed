"""What the comparison of criteria runs, stage by stage, and what it chooses: by validation alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from statistics import mean

from benchmarks.one_cut import Run, Way
from benchmarks.rows import Row
from torchslim.prune import CRITERIA

SPARSITIES = (0.5, 0.75)
EPOCHS = 1
SEEDS = range(5)
BEST = 3  # are run with every seed
TUNED = 2  # are tried with every normalization; the best of those with every reduction
CONTROL = "random"  # what a criterion must beat; it is never chosen
DEFAULT = Way()
PEERS = (Way(side="peer", criterion="l2"), Way(side="peer", criterion="taylor"))
BLOCKS = (Way(side="blocks", criterion="kl"), Way(side="blocks", criterion="influence"))
NORMALIZATIONS = ("none", "mean", "max", "gaussian")
REDUCTIONS = ("mean", "sum", "max", "first")


class Found:
    """The rows of one number of epochs, by way, sparsity and seed; the newest counts."""

    def __init__(self, rows: Iterable[Row], epochs: int = EPOCHS) -> None:
        self.rows: dict[tuple[Way, float, int], Row] = {}
        self.baseline: Row = {}
        for row in rows:
            if row["side"] == "unpruned":
                self.baseline = row
            elif row["epochs"] == epochs:
                names = [each.name for each in fields(Way)]
                self.rows[Way(**{name: row[name] for name in names}), row["sparsity"], row["seed"]] = row

    def get(self, way: Way, sparsity: float, seed: int = 0) -> Row | None:
        """The row of a run that ended well."""
        row = self.rows.get((way, sparsity, seed))
        return row if row is not None and not row["reason"] else None

    def validation(self, way: Way, seeds: Iterable[int] = (0,)) -> float | None:
        """Mean accuracy over the targets and seeds; None where one is missing."""
        rows = [self.get(way, sparsity, seed) for sparsity in SPARSITIES for seed in seeds]
        return mean(row["val"] for row in rows if row) if rows and all(rows) else None

    def ranked(self, ways: Iterable[Way], seeds: Iterable[int] = (0,)) -> list[Way]:
        """Those that are measured, the best on validation first; the control is none of them."""
        seeds = list(seeds)
        values = {way: self.validation(way, seeds) for way in ways if way.criterion != CONTROL}
        return sorted((way for way in values if values[way] is not None), key=lambda way: -(values[way] or 0))

    def ours(self) -> list[Way]:
        """Every way of ours that was run."""
        return list(dict.fromkeys(way for way, _, _ in self.rows if way.side == "ours"))

    def leaders(self) -> list[Way]:
        """The best criteria, each with the default options."""
        return self.ranked(Way(criterion=name) for name in CRITERIA)[:BEST]

    def best_of(self, criterion: str) -> list[Way]:
        """The best options of a criterion, if it was run; reconstruction is compared apart."""
        return self.ranked(way for way in self.ours() if way.criterion == criterion and not way.reconstruct)[:1]

    def contestants(self) -> list[Way]:
        """The best criteria, each with its best options."""
        return self.ranked(way for name in CRITERIA for way in self.best_of(name))[:BEST]

    def chosen(self) -> Way | None:
        """The best of ours that ran with every seed, on validation."""
        ways = self.ranked(self.ours(), SEEDS)
        return ways[0] if ways else None


def stages(epochs: int) -> Iterator[Callable[[Found], list[Run]]]:
    """Functions from what is found so far to the runs that come next."""

    def runs(ways: Iterable[Way], seeds: Iterable[int] = (0,)) -> list[Run]:
        return [
            Run(way=way, sparsity=sparsity, seed=seed, epochs=epochs)
            for seed in seeds
            for way in dict.fromkeys(ways)
            for sparsity in SPARSITIES
        ]

    yield lambda found: runs([*(Way(criterion=name) for name in CRITERIA), *PEERS])
    yield lambda found: runs(
        replace(way, normalization=each) for way in found.leaders()[:TUNED] for each in NORMALIZATIONS
    )
    yield lambda found: runs(replace(best, reduction=each) for best in found.contestants()[:1] for each in REDUCTIONS)
    yield lambda found: runs([*found.contestants(), *PEERS, *BLOCKS], SEEDS)
    yield lambda found: runs([replace(best, reconstruct=True) for best in found.contestants()[:1]], SEEDS)


def missing(runs: Iterable[Run], found: Found) -> list[Run]:
    """Those that were not run."""
    return [run for run in runs if (run.way, run.sparsity, run.seed) not in found.rows]
