"""The page of `benchmarks.search`: fronts, hypervolumes, and whether the combination wins at every level."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torchslim.core.hardware import describe_machine
from torchslim.tuning.pareto import front_of, volume

SLACK = 0.25  # points: about one standard error of a difference on 4,000 images
LEVEL = 2.0  # points of accuracy: what is farther from the baseline counts nothing
Row = Mapping[str, Any]
METHODS = {
    "search": "torchslim search, sampled",
    "solve": "torchslim search, solved",
    "solve-fifth": "torchslim search, solved, a fifth of the samples",
    "singles": "grid of single techniques",
    "random": "random search",
    "random-units": "random search on the solver's space",
}


def area(points: Sequence[Mapping[str, float]], split: str) -> float:
    """The part of the square (0 to 2 points lost, 0 to 1 of the baseline's time) that the front on val covers."""
    front = front_of(dict(enumerate(points)), ("drop_val", "ratio"))
    placed = [(max(points[each][f"drop_{split}"], 0.0) / LEVEL, points[each]["ratio"]) for each in front]
    return volume(placed, (1.0, 1.0))


def told(single: Mapping[str, float], points: Sequence[Mapping[str, float]], split: str, slack: float = 0.0) -> str:
    """Is one of the points at least as accurate and as fast? "yes", or "equal" where it is no better either."""
    pairs = [(point[f"drop_{split}"] - single[f"drop_{split}"], point["ratio"] - single["ratio"]) for point in points]
    good = [pair for pair in pairs if pair[0] <= slack and pair[1] <= 0]
    return "no" if not good else "yes" if any(pair[0] < 0 or pair[1] < 0 for pair in good) else "equal"


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    machine = describe_machine()
    seeds = sorted({row["seed"] for row in rows})
    rows = sorted(rows, key=lambda row: (list(METHODS).index(row["method"]), row["seed"]))
    lines = [
        "# The search beside single techniques and random search",
        "",
        "`python -m benchmarks.search` wrote this page; figures of other machines differ.",
        "",
        "The demo's network on Fashion-MNIST, 6,000 training, 2,000 validation and 4,000 test images, ONNX Runtime "
        "with one thread, one sample a call. All methods get as many trained samples and measured artifacts as the "
        "search took, its cheap and short trials counted. Latency is the time over the float baseline's, "
        "from paired rounds, the same for programs of one structure. The hypervolume is the part of the square of 0 to "
        f"{LEVEL:g} points lost and 0 to 1 of the baseline's time that the artifacts cover: 1 would be everything at "
        "no cost. Of each method the artifacts count that none of its others beats on val; points lost are on test.",
        "",
        f"{machine['processor']}, {machine['instruction_set']}, {machine['cores']} cores; "
        f"torch {machine['versions']['torch']}, onnxruntime {machine['versions']['onnxruntime']}.",
        "",
        "| method | seed | samples trained | artifacts measured | hypervolume, test | val |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in METHODS.items():
        mine = [row for row in rows if row["method"] == name]
        lines += [
            f"| {title} | {row['seed']} | {row['samples']:,} | {row['artifacts']} | {area(row['points'], 'test'):.3f} "
            f"| {area(row['points'], 'val'):.3f} |"
            for row in mine
        ]
        if mine:
            found = [area(row["points"], "test") for row in mine]
            lines.append(f"| **{title}, median** | | | | **{statistics.median(found):.3f}** | |")
    missing = [
        f"{title} with seed {seed}" for name, title in METHODS.items() for seed in range(3)
        if not any(row["method"] == name and row["seed"] == seed for row in rows)
    ]  # fmt: skip
    budgets = {row["seed"]: row["samples"] for row in rows if row["method"] == "search"}
    lines += [
        f"\n{METHODS[row['method']]} with seed {row['seed']} was run with more samples than that search took."
        for row in rows
        if row["samples"] > budgets.get(row["seed"], row["samples"])
    ]
    versions = sorted({f"{METHODS[row['method']]}: {row['version']}" for row in rows if "version" in row})
    if versions:
        lines += ["", f"Versions of torchslim's source: {'; '.join(versions)}."]
    if missing:
        lines += ["", f"Not run yet (the same command goes on): {', '.join(missing)}."]
    lines += ["", "## Against each single technique, level by level", ""]
    lines += [
        "Each artifact of a single technique that loses at most 2 points, and the search's artifacts of the same seed, "
        "of the solved one where it was run: "
        "is one of them at least as accurate and at least as fast, better in one of the two? Equal: it is the same.",
        "",
        "| seed | technique | points lost, test | time | beaten on test | beaten on val |",
        "|---|---|---|---|---|---|",
    ]
    answers: dict[str, list[str]] = {"test": [], "val": [], "slack": []}
    for seed in seeds:
        found = {row["method"]: row["points"] for row in rows if row["seed"] == seed}
        searched = found.get("solve", found.get("search"))
        if searched is None or "singles" not in found:
            continue
        for single in sorted(found["singles"], key=lambda single_: single_["drop_test"]):
            found_out = {
                split: told(single, searched, split) if single[f"drop_{split}"] <= LEVEL else "beyond 2 points"
                for split in ("test", "val")
            }
            for split, answer in found_out.items():
                answers[split] += [answer] * (single[f"drop_{split}"] <= LEVEL)
            if single["drop_test"] <= LEVEL:
                answers["slack"].append(told(single, searched, "test", SLACK))
                lines.append(
                    f"| {seed} | {single['technique']} | {single['drop_test']:.2f} | {single['ratio']:.3f} | "
                    f"{found_out['test']} | {found_out['val']} |"
                )
    counts = {
        name: f"{sum(each == 'yes' for each in given)} of {len(given)} "
        f"and {sum(each == 'equal' for each in given)} equalled"
        for name, given in answers.items()
    }
    if not answers["slack"]:
        lines.append("| not run | | | | | |")
    lines += [
        "",
        f"Beaten: {counts['test']} on test; {counts['val']} on val; on test with {SLACK:g} points of slack, about one "
        f"standard error on 4,000 images, {counts['slack']}.",
        "",
        "## The search's artifacts",
        "",
        "| method | seed | points lost, val | test | time over the baseline's | bytes over the baseline's |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["method"] in ("search", "solve"):
            lines += [
                f"| {METHODS[row['method']]} | {row['seed']} | {point['drop_val']:.2f} | {point['drop_test']:.2f} | "
                f"{point['ratio']:.3f} | {point['size']:.3f} |"
                for point in sorted(row["points"], key=lambda point: point["ratio"])
            ]
    return "\n".join(lines) + "\n"
