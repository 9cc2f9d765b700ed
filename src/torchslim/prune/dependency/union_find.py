"""One union-find over every element of every dimension of every weight: which of them go together, and which stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

KEPT = 0
"""The atom of elements that no removal ever reaches."""


class Atoms:
    """Atoms are whole numbers; `union` couples them pairwise, `freeze` says that they cannot go and why.

    A class is a set of coupled atoms: it is removed whole or not at all.
    """

    def __init__(self) -> None:
        self._parent: Ids = np.arange(1024, dtype=np.int64)
        self._reason = np.zeros(1024, dtype=np.int32)  # per root: 0, or 1 + the index of why it was frozen
        self._elastic = np.zeros(1024, dtype=bool)
        self.reasons: list[str] = []
        self._known: dict[str, int] = {}
        self.count = 1
        self.freeze(np.array([KEPT]), "joined with values of a fixed size")

    def fresh(self, count: int, *, elastic: bool = False) -> Ids:
        """New atoms, each a class of its own; elastic ones belong to no weight, only to a size."""
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
        """Couple pairwise, broadcasting. Whatever meets `KEPT` is frozen, not coupled with all else that is."""
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
            # of several pairs with one larger root only the smallest wins; the others go round again
            np.minimum.at(self._parent, high, low)
            stuck = high[self._reason[high] > 0]
            roots = self.find(stuck)  # of a chain of pairs the middle is no root any more
            open_ = self._reason[roots] == 0
            self._reason[roots[open_]] = self._reason[stuck[open_]]

    def freeze(self, ids: Ids, why: str) -> None:
        """These never go; the first reason given is the one that is shown."""
        if why not in self._known:
            self.reasons.append(why)
            self._known[why] = len(self.reasons)
        roots = self.find(ids.reshape(-1))
        self._reason[roots[self._reason[roots] == 0]] = self._known[why]

    def why(self, ids: Ids) -> str:
        """The reason of the first of these that is frozen; empty where none is."""
        reasons = self._reason[self.find(ids.reshape(-1))]
        found = reasons[reasons > 0]
        return self.reasons[found[0] - 1] if found.size else ""

    def stuck(self, ids: Ids) -> bool:
        """Are all of these frozen?"""
        return bool(self._reason[self.find(ids)].all())

    def frozen(self) -> NDArray[np.int32]:
        """Per atom: 0 when its class may go, else 1 + the index of the reason."""
        return self._reason[self.find(np.arange(self.count))]
