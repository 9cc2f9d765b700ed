"""The speed benchmark: what is left to run, and what the page says of the rows."""

from __future__ import annotations

import pytest

from benchmarks import speed

MACHINE = {"processor": "a processor", "threads": 2, "versions": {"torch": "2.0"}}


def pair(model, thing, ours, peer, **more):
    base = {"model": f"torchvision/{model}", "what": "pair", "thing": thing, "ours": ours, "load": 1.0, "reason": ""}
    base |= {"peer": peer} if peer else {}
    if thing == "analysis":
        base |= {"record": ours * 0.75, "after": ours * 0.25, "nodes": 100, "groups": 0.1}
    return base | {"version": "v1"} | more


def others(model, passes=5, peak=90):
    base = {"model": f"torchvision/{model}", "version": "v1"}
    return [
        base | {"what": "passes", "passes": passes},
        base | {"what": "whole", "peak": peak * 2**20, "weights": 20 * 2**20},
        base | {"what": "forward", "peak": 40 * 2**20, "weights": 20 * 2**20},
    ]


def cells(page, model, section):
    part = page.partition(f"## {section}")[2].partition("\n## ")[0]
    line = next(line for line in part.splitlines() if line.startswith(f"| {model} "))
    return [each.strip() for each in line.strip("|").split("|")]


def test_tasks_run_once_for_each_source():
    rows = [pair("resnet18", "whole", 1, 1), *others("resnet18")[:2]]
    assert speed.missing(["torchvision/resnet18"], rows, "v1") == [("torchvision/resnet18", "forward")]
    assert len(speed.missing(["torchvision/resnet18"], rows, "v2")) == len(speed.TASKS)


def test_the_bar_is_of_the_median_of_paired_ratios():
    # the medians of both sides are equal, those of the ratios are not
    times = [(1, 2), (2, 3), (3, 1), (9, 9.5), (8, 9)]
    page = speed.page([pair("resnet50", "whole", ours, peer) for ours, peer in times], MACHINE, "a peer 1.0")
    _, ours, peer, ratio, count, verdict = cells(page, "resnet50", "The whole call")
    assert [each.partition(" ")[0] for each in (ours, peer, ratio)] == ["3.00", "3.00", "0.89"]
    assert (count, verdict) == ("5", "met")


def test_a_missed_bar_and_one_that_is_none_are_told_apart():
    rows = [pair(name, "analysis", 2, 1, nodes=nodes) for name, nodes in (("resnet50", 200), ("resnet18", 90))]
    page = speed.page(rows, MACHINE, "a peer 1.0")
    assert cells(page, "resnet50", "Analysis")[5] == "**missed**"
    assert cells(page, "resnet18", "Analysis")[5] == "no"


def test_a_peer_that_fails_is_said_to():
    rows = [pair("vit_b_16", "whole", 2, None, reason="past 60 s")]
    _, _, peer, ratio, count, verdict = cells(speed.page(rows, MACHINE, "a peer 1.0"), "vit_b_16", "The whole call")
    assert (peer, ratio, count, verdict) == ("past 60 s", "-", "0", "no peer")


def test_growth_is_fitted_and_judged():
    assert speed.exponent([10, 20, 40], [1, 4, 16]) == pytest.approx(2)
    sizes = {"resnet18": (90, 1), "resnet50": (180, 4), "resnet152": (360, 16)}
    page = speed.page([pair(name, "analysis", s, 1, nodes=n) for name, (n, s) in sizes.items()], MACHINE, "a peer 1.0")
    assert "power of 2.00" in page
    assert "for both): **missed**" in page


@pytest.mark.parametrize(("peak", "met"), [(100, "met"), (101, "**missed**")])
def test_memory_is_held_against_three_copies_and_a_forward_pass(peak, met):
    assert cells(speed.page(others("resnet18", peak=peak), MACHINE, "a peer 1.0"), "resnet18", "Forward passes")[
        -2:
    ] == ["100", met]


def test_passes_must_be_as_many_for_every_model():
    assert "every model: met" in speed.page([*others("resnet18"), *others("resnet50")], MACHINE, "a peer 1.0")
    assert "every model: **missed**" in speed.page(
        [*others("resnet18"), *others("resnet50", passes=6)], MACHINE, "a peer 1.0"
    )


def test_a_busy_machine_is_said_to_be():
    busy = speed.page([pair("resnet18", "whole", 1, 1, load=9.0)], MACHINE, "a peer 1.0")
    assert "seconds are too high" in busy
    assert "seconds are too high" not in speed.page([pair("resnet18", "whole", 1, 1)], MACHINE, "a peer 1.0")
