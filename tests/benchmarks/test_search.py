"""What the page of the search benchmark says follows from its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.search import Counted, cost, drawn, drawn_units, singles
from benchmarks.search_page import area, page, told
from examples.fashion_mnist.data import Batches
from torchslim.pipeline.recipe import load_document
from torchslim.tuning import make_space


def point(technique: str, drop: float, ratio: float) -> dict[str, object]:
    return {"technique": technique, "drop_val": drop, "drop_test": drop, "ratio": ratio, "size": 0.5}


ROWS = [
    {"seed": 0, "method": "search", "samples": 10, "artifacts": 3,
     "points": [point("search", 0.5, 0.4), point("search", 1.0, 0.2)]},
    {"seed": 0, "method": "singles", "samples": 9, "artifacts": 3,
     "points": [point("int8", 0.4, 0.5), point("prune", 1.0, 0.3), point("distilled small net", 9.0, 0.1)]},
]  # fmt: skip


def test_a_hypervolume_is_a_part_of_the_square() -> None:
    assert area([point("a", 0.0, 0.0)], "test") == 1.0  # type: ignore[list-item]
    assert area([point("a", -3.0, 0.5)], "test") == 0.5  # type: ignore[list-item]
    assert area([point("a", 1.0, 0.5)], "test") == 0.25  # type: ignore[list-item]
    assert area([point("a", 2.0, 0.5), point("a", 0.0, 1.0)], "test") == 0.0  # type: ignore[list-item]


def test_who_is_beaten_and_what_is_beyond_is_counted() -> None:
    search, single = ROWS[0]["points"], ROWS[1]["points"]
    assert [told(each, search, "test") for each in single] == ["no", "yes", "no"]  # type: ignore[arg-type, union-attr]
    assert told(search[0], search, "test") == "equal"  # type: ignore[arg-type, index]
    text = page(ROWS)
    assert "Beaten: 1 of 2 and 0 equalled on test; 1 of 2 and 0 equalled on val" in text
    assert "slack, about one standard error on 4,000 images, 2 of 2 and 0 equalled" in text
    assert "| torchslim search, sampled | 0 | 10 | 3 |" in text


def test_the_example_can_be_searched_and_random_recipes_are_drawn_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    make_space(load_document("examples/fashion_mnist/search.toml"))
    first, second = ([steps for _, steps in drawn(seed)] for seed in (1, 2))
    assert len(first) == 60
    assert first != second
    assert first == [steps for _, steps in drawn(1)]


@pytest.mark.slow
def test_random_units_are_recipes_of_the_solver_s_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    drawn_recipes = [steps for _, steps in drawn_units(1)]
    assert drawn_recipes == [steps for _, steps in drawn_units(1)]
    kinds = {step.pattern for steps in drawn_recipes for step in steps if hasattr(step, "pattern")}  # type: ignore[attr-defined]
    assert kinds == {"block", "channel"}
    assert all(cost(steps) == 6_000 * 4 for steps in drawn_recipes)


def test_samples_are_counted(tmp_path: Path) -> None:
    import torch

    batches = Counted(Batches((torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.zeros(10).long()), 4), tmp_path / "n")
    assert sum(len(labels) for _, labels in batches) == 10
    assert Counted.total(tmp_path / "n") == 10
    assert [cost(steps) for technique, steps in singles() if technique == "int8"] == [0, 0, 18_000]
