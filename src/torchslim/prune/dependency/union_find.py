"""Union-find over all elements of all dimensions of all weights: which are coupled, and which must stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

KEPT = 0
"""The atom of all elements that are never removed."""


class Atoms:
    """Atoms are integers; `union` couples them pairwise, and `freeze` marks them as not removable, with a reason.

    A class is a set of coupled atoms: it is removed as a whole or not at all.
    """

    def __init__(self) -> None:
        self._parent: Ids = np.arange(1024, dtype=np.int64)
        self._reason = np.zeros(1024, dtype=np.int32)  # per root: 0, or 1 + the index of the reason why it is frozen
        self._elastic = np.zeros(1024, dtype=bool)
        self.reasons: list[str] = []
        self._known: dict[str, int] = {}
        self.count = 1
        self.freeze(np.array([KEPT]), "joined with values of a fixed size")

    def fresh(self, count: int, *, elastic: bool = False) -> Ids:
        """New atoms, each a class of its own; elastic atoms belong to a size that adapts, not to a weight."""
        first, self.count = self.count, self.count + count
        while self.count > len(self._parent):
            size = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(size, 2 * size)])
            self._reason = np.concatenate([self._reason, np.zeros(size, dtype=np.int32)])
            self._elastic = np.concatenate([self._elastic, np.zeros(size, dtype=bool)])
        ids = np.arange(first, self.count)
        self._elastic[ids] = elastic
        return ids

    def is_elastic(self, ids: Ids) -> bool:
        """Was the first of these atoms made for a size that adapts?"""
        return bool(ids.size and self._elastic[ids.flat[0]])

    def find(self, ids: Ids) -> Ids:
        """The class of each atom: its smallest member."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[ids] = roots
        return roots

    def union(self, left: Ids, right: Ids) -> None:
        """Couple pairwise, with broadcasting; atoms paired with `KEPT` are frozen, not coupled with each other."""
        left, right = (array.reshape(-1) for array in np.broadcast_arrays(left, right))
        kept = (left == KEPT) | (right == KEPT)
        if kept.any():
            self.freeze(np.maximum(left, right)[kept], self.reasons[0])
            left, right = left[~kept], right[~kept]
        while left.size:
            a, b = self.find(left), self.find(right)
            open_ = a != b
            if not open_.any():
                return
            left, right, a, b = left[open_], right[open_], a[open_], b[open_]
            low, high = np.minimum(a, b), np.maximum(a, b)
            # of several pairs with the same larger root only the smallest wins; the next round couples the others
            np.minimum.at(self._parent, high, low)
            stuck = high[self._reason[high] > 0]
            roots = self.find(stuck)  # in a chain of pairs the middle one is no longer a root
            open_ = self._reason[roots] == 0
            self._reason[roots[open_]] = self._reason[stuck[open_]]

    def freeze(self, ids: Ids, why: str) -> None:
        """Mark the classes of these atoms as not removable; the first reason of a class is kept."""
        if why not in self._known:
            self.reasons.append(why)
            self._known[why] = len(self.reasons)
        roots = self.find(ids.reshape(-1))
        self._reason[roots[self._reason[roots] == 0]] = self._known[why]

    def why(self, ids: Ids) -> str:
        """Reason of the first frozen atom among `ids`; empty if none is frozen."""
        numbers = self._reason[self.find(ids.reshape(-1))]
        frozen = numbers[numbers > 0]
        return self.reasons[frozen[0] - 1] if frozen.size else ""

    def stuck(self, ids: Ids) -> bool:
        """Are all atoms in `ids` frozen?"""
        return bool(self._reason[self.find(ids)].all())

    def frozen(self) -> NDArray[np.int32]:
        """Per atom: 0 if its class can be removed, else 1 + the index of the reason."""
        return self._reason[self.find(np.arange(self.count))]
