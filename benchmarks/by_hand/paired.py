"""Whether two sides differ on the same test samples by more than chance: an exact paired test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # largest p value of a difference that counts
Hits = np.ndarray  # bool (samples,): whether a side tells a sample right


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One side's accuracy minus another's on the same samples.

    Args:
        points: the difference in percentage points, the mean over the seeds.
        samples: how many each side was tested on.
        differ: how many of them one side tells right more often than the other.
        p: probability of a difference at least as large, up or down, if the sides are equally good.
    """

    points: float
    samples: int
    differ: int
    p: float

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"` or `"equal within error"`."""
        if self.p > LEVEL:
            return "equal within error"
        return "better" if self.points > 0 else "worse"


def packed(hits: Sequence[bool] | Hits) -> str:
    """Hits as hexadecimal digits, the first sample in the highest bit."""
    return np.packbits(np.asarray(hits, dtype=bool)).tobytes().hex()


def unpacked(text: str, samples: int) -> Hits:
    """Hits from what `packed` made of them."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=samples).astype(bool)


def difference(ours: Sequence[Hits], theirs: Sequence[Hits]) -> Difference:
    """The difference of two sides with the same seeds, with the exact two-sided p value of a paired sign-flip test.

    If the sides are equally good, the difference on a sample, summed over the seeds, is as often positive as negative.
    The p value counts the signs of all samples that make the total as large as it is. Seeds add no samples: sides that
    give the same file for every seed get the p value of one seed, which is that of McNemar's exact test.

    Source: Fisher 1935, The Design of Experiments, section 21; McNemar 1947, Psychometrika 12.
    """
    per_sample = np.sum(ours, 0, dtype=int) - np.sum(theirs, 0, dtype=int)
    sizes = np.abs(per_sample[per_sample != 0])
    total = int(per_sample.sum())
    most = int(sizes.sum())
    chances = np.zeros(2 * most + 1)  # of every total from -most to most
    chances[most] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2  # no chance reaches an end before the last
    p = chances[np.abs(np.arange(-most, most + 1)) >= abs(total)].sum()
    samples = len(per_sample)
    points = 100 * total / (len(ours) * samples)
    return Difference(points=points, samples=samples, differ=len(sizes), p=min(1.0, float(p)))
