"""A sensitivity analysis gives a search a place to begin."""

from __future__ import annotations

import tomllib

import pytest

from torchslim.analysis.result import Point, Sensitivity
from torchslim.tuning import make_space
from torchslim.tuning.warm_start import informed_start, total_damage

RECIPE = """
model = "a:b"
task = "c:d"
[budget]
metric_drop = 1.5
[[step]]
do = "prune"
skip = { search = [true, false] }
pattern = "channel"
sparsity = { search = [0.1, 0.6] }
[[step]]
do = "quantize"
scheme = { search = ["int4-weights", "int8"] }
"""


def found(measure: str, pruned: dict[float, float], schemes: dict[str, float]) -> Sensitivity:
    """Two groups and two layers that share the damages given equally."""
    points = [
        Point(name=name, kind="channels", change=f"{amount:.0%}", amount=amount, value=90 - hurt / 2)
        for amount, hurt in pruned.items()
        for name in ("a", "b")
    ] + [
        Point(name=name, kind="layer", change=scheme, value=90 - hurt / 2)
        for scheme, hurt in schemes.items()
        for name in ("a", "b")
    ]
    return Sensitivity(
        model="m", measure=measure, unit="%", higher_is_better=True, reference=90.0, runtime="onnxruntime",
        points=(*points, Point(name="c", kind="layer", change="int8", refused="why")),
    )  # fmt: skip


def test_damages_add_up_over_the_model() -> None:
    totals = total_damage(found("metric", {0.25: 1.0, 0.5: 4.0}, {"int8": 0.5, "int4-weights": 3.0}))
    assert totals == pytest.approx({0.25: 1.0, 0.5: 4.0, "int8": 0.5, "int4-weights": 3.0})


@pytest.mark.parametrize(
    ("measure", "pruned", "sparsity"),
    [
        ("metric", {0.25: 1.0, 0.5: 4.0}, 0.25),  # within the budget's drop
        ("metric", {0.25: 0.5, 0.5: 1.4, 0.75: 1.5}, 0.6),  # the range ends before
        ("metric", {0.25: 2.0}, 0.1),  # nothing is bearable
        ("kl", {0.25: 0.4, 0.5: 1.0}, 0.25),  # less than what int8 does
    ],
)
def test_it_begins_at_the_strongest_that_is_bearable(measure: str, pruned: dict[float, float], sparsity: float) -> None:
    start = informed_start(make_space(tomllib.loads(RECIPE)), found(measure, pruned, {"int8": 0.5, "int4-weights": 3}))
    assert start == {"1-prune.skip": False, "1-prune.sparsity": sparsity, "2-quantize.scheme": "int8"}
