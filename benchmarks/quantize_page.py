"""The page of the coverage benchmark of quantization: benchmarks/coverage_quantize.md, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.one_zoo_quantized import BAR_DB, NOISE_DB, PHONE, PHONE_FLOAT, SAMPLES, STEPS
from benchmarks.rows import Row
from benchmarks.runner import escape, latest, versions_of

COMMAND = "python -m benchmarks.coverage_quantize"
SIDES = {"ours": "torchslim", "torchao": "torchao", "nncf": "nncf"}
SETTLED = "settled"  # ours, on models whose batch norms have the statistics of the calibration inputs
GROUPS = ("torchvision classification", "torchvision segmentation", "torchvision detection", "timm", "transformers")
# the share of models that must count, and of the multiply-accumulates that must run on integers
BARS = {"torchvision classification": 1.0, "timm": 0.92, "transformers": 0.92}
SHARES = {"convolutions": 0.95, "products": 0.90}
ROLLED_BACK = 0.05  # of the models, at most, may have layers that verification left in float
KINDS = {"convolutions": "networks of convolutions", "products": "networks of products (transformers, say)"}
COLUMNS = (
    "model", "counts", "exports", "quantizes", "runs", "SQNR", "worst channel", "rolled back", "MACs in int8",
    "seconds", "torchao", "nncf",
)  # fmt: skip
Rows = dict[tuple[str, str], Row]


def group(name: str) -> str:
    """The group of the page that a model is in."""
    suite, _, model = name.partition("/")
    if suite != "torchvision":
        return suite
    if any(part in model for part in ("rcnn", "fcos", "retinanet", "ssd")):
        return "torchvision detection"
    return f"torchvision {'segmentation' if model.startswith(('deeplab', 'fcn', 'lraspp')) else 'classification'}"


def page(rows: Iterable[Row], machine: dict[str, Any], names: Sequence[str] | None = None) -> str:
    """The Markdown page.

    Args:
        rows: the newest of each model and side counts.
        machine: as `describe_machine` gives it.
        names: of all models of the zoo; those without a row are listed as not run. None: those with rows.
    """
    have = latest(rows)
    models = sorted(names if names is not None else {name for name, _ in have})
    limits = ", ".join(f"{limit:.0f} s" for limit in sorted({row["time_limit"] for row in have.values()}))
    lines = [
        "# Coverage of quantization",
        "",
        f"Written by `make coverage` (`{COMMAND}`); {machine['processor']}, torch {machine['versions']['torch']};",
        f"one thread and a process of its own for every model and side, time limit {limits}. The models are those of",
        "[the coverage of channel pruning](coverage.md), as their library builds them, with random weights; calibrated",
        f"on {SAMPLES} samples drawn at random as the example is. Models of transformers answer without their caches,",
        "as for any export.",
        "",
        'One rule for all models: static int8 (`scheme="int8"`), `ts.quantize.prepare`, `calibrate`, `convert`, then',
        "deployed on ONNX Runtime. A model *counts* when it exports, quantizes, runs there and answers at least",
        f"{BAR_DB:.0f} dB (SQNR) from the float model: of all floating-point outputs together, caches and hidden",
        "states left out, on inputs that were not calibrated on. *MACs in int8*: of the multiply-accumulates, products",
        "of activations included, those in integer kernels of the graph that ONNX Runtime really executes. Seconds: of",
        "all that, on a machine that other work shares. *Worst channel*: of every index of every dimension of every",
        "output but the batch's, on samples that were calibrated on, the signal being its variation around its mean;",
        "random networks answer nearly the same to all inputs, so that it can be low where nothing is lost. *Rolled",
        "back*: layers that verification left in float; the reasons are below. Beside all this, on the same models and",
        "inputs: torchao's `X86InductorQuantizer`, whose converted graph is run in PyTorch, and `nncf.quantize` on the",
        "model as OpenVINO converts it, run there.",
        "",
        "Versions: "
        + "; ".join(f"{label} {versions_of(have, side) or 'not run'}" for side, label in SIDES.items())
        + ".",
        "",
        "| group | models | run | " + " | ".join(f"{name} counts" for name in SIDES.values()) + " |",
        "| --- " * 6 + "|",
        *(_summary(each, [name for name in models if group(name) == each], have) for each in GROUPS),
        _summary("all", models, have),
        "",
        "Shares of torchslim are of all models listed, those not run included; shares of the others of what was run.",
        "",
        *_bars(models, have),
    ]
    for each in GROUPS:
        inside = [name for name in models if group(name) == each]
        if inside:
            lines += ["", f"## {each}", "", *_table(inside, have)]
    lines += _settled(models, have) + _phones(models, have)
    lines += _returned(models, have) + _below(models, have) + _silent(models, have) + _failures(models, have)
    return "\n".join(lines).rstrip() + "\n"


def why(row: Row) -> str:
    """Why a row does not count, in a line."""
    reason = str(row["reason"] or "does not run")
    if row.get("noisy_db") is not None:
        reason += f" ({row['noisy_db']:.1f} dB are left in float by noise {NOISE_DB:.0f} dB below the inputs)"
    return reason


def _ours(models: Sequence[str], have: Rows) -> list[Row]:
    return [have[name, "ours"] for name in models if (name, "ours") in have]


def _summary(label: str, models: Sequence[str], have: Rows) -> str:
    cells = [label, str(len(models)), str(len(_ours(models, have)))]
    for side in SIDES:
        found = [have[name, side]["counts"] for name in models if (name, side) in have]
        cells.append(_share(sum(found), len(models) if side == "ours" else len(found)))
    return f"| {' | '.join(cells)} |"


def _share(number: int, total: int) -> str:
    return f"{number} of {total} ({100 * number / total:.0f} %)" if total else "not run"


def _bars(models: Sequence[str], have: Rows) -> list[str]:
    lines = ["| bar | wanted | reached | |", "| --- | --- | --- | --- |"]
    for name, wanted in BARS.items():
        inside = [model for model in models if group(model) == name]
        count = sum(row["counts"] for row in _ours(inside, have))
        met = bool(inside) and count >= wanted * len(inside)
        lines.append(f"| {name} counts | {100 * wanted:.0f} % | {_share(count, len(inside))} | {_verdict(met)} |")
    for kind, wanted in SHARES.items():
        shares = [row["integer_share"] for row in _ours(models, have) if row["kind"] == kind]
        if shares:
            below = sum(share < wanted for share in shares)
            reached = f"median {100 * median(shares):.1f} %; {below} of {len(shares)} models are below"
            verdict = _verdict(median(shares) >= wanted) + (" in the median" if below else "")
            lines.append(f"| MACs in int8, {KINDS[kind]} | {100 * wanted:.0f} % | {reached} | {verdict} |")
    checked = [row for row in _ours(models, have) if row.get("runs") and "rolled_back" in row]
    if checked:
        count = sum(bool(row["rolled_back"]) for row in checked)
        met = _verdict(count <= ROLLED_BACK * len(checked))
        lines.append(
            f"| nothing rolled back | {100 * (1 - ROLLED_BACK):.0f} % | all but {_share(count, len(checked))} | {met} |"
        )
    silent = sum(bool(row["silent"]) for row in _ours(models, have))
    reached = f"{silent} models with layers in float without a reason"
    lines.append(f"| no silent float | 0 models | {reached} | {_verdict(not silent)} |")
    return lines


def _rolled_back(row: Row) -> str:
    """How many layers verification left in float; rows from before it did say nothing."""
    return str(len(row["rolled_back"])) if row.get("runs") and "rolled_back" in row else "-"


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _table(models: Sequence[str], have: Rows) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for name in models:
        row = have.get((name, "ours"))
        ours = ["not run", *"--------"] if row is None else [
            _yes(row["counts"]), *(_yes(row[step]) for step in STEPS), _decibels(row["sqnr_db"]),
            _decibels(row.get("worst_db")), _rolled_back(row),
            "-" if row["integer_share"] is None else f"{100 * row['integer_share']:.1f} %",
            f"{row['seconds']:.0f}" if "seconds" in row else "-",
        ]  # fmt: skip
        peers = [_peer(have.get((name, side))) for side in SIDES if side != "ours"]
        lines.append(f"| {' | '.join([name.partition('/')[2], *ours, *peers])} |")
    return lines


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "-"}[value]


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def _peer(row: Row | None) -> str:
    if row is None:
        return "not run"
    failed = next((step for step in STEPS if not row[step]), None)
    return _decibels(row["sqnr_db"]) if failed is None else f"no ({failed})"


def _settled(models: Sequence[str], have: Rows) -> list[str]:
    """What is left where random networks have batch norms of their own activations."""
    rows = [have[name, SETTLED] for name in models if (name, SETTLED) in have]
    rows = [row for row in rows if row["sqnr_db"] is not None]
    if not rows:
        return []
    reached = sum(row["sqnr_db"] >= BAR_DB for row in rows)
    lines = [
        "", "## With batch norms that have seen the inputs", "",
        "The same, once batch norms have the statistics of the calibration inputs. A random network whose norms bring",
        "every layer back to one scale amplifies whatever differs; the last column is what its *float* answers keep",
        f"when the inputs have noise {NOISE_DB:.0f} dB below them, for the models below {BAR_DB:.0f} dB."
        f" {reached} of {len(rows)} models reach {BAR_DB:.0f} dB.",
        "", "| model | SQNR | float, noisy inputs |", "| --- | --- | --- |",
    ]  # fmt: skip
    return lines + [
        f"| {row['model']} | {_decibels(row['sqnr_db'])} | {_decibels(row.get('noisy_db'))} |" for row in rows
    ]


def _phones(models: Sequence[str], have: Rows) -> list[str]:
    """Models that were lowered for ExecuTorch, in float and in int8; a sample of the zoo."""
    names = [name for name in models if (name, PHONE) in have or (name, PHONE_FLOAT) in have]
    if not names:
        return []
    lines = [
        "", "## ExecuTorch", "",
        f"`{COMMAND} --side {PHONE}` (int8) and `--side {PHONE_FLOAT}`: lowered to a `.pte`, run with its",
        "Python runtime on x86, and compared with the float model in PyTorch. *Portable*: operations of",
        "the int8 program that XNNPACK does not compute.",
        "", "| model | float | int8 | MACs in int8 | portable |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in names:
        row, floats = have.get((name, PHONE)), have.get((name, PHONE_FLOAT))
        share = None if row is None else row["integer_share"]
        operations = [] if row is None else [f"{count} {reason}" for reason, count in row.get("portable", ())[:3]]
        lines.append(
            f"| {name} | {_peer(floats)} | {_peer(row)} | {'-' if share is None else f'{100 * share:.1f} %'} | "
            f"{escape('; '.join(operations)) or '-'} |"
        )
    failed = [have[name, side] for name in names for side in (PHONE, PHONE_FLOAT) if (name, side) in have]
    reasons = [f"- `{row['model']}` ({row['side']}): {escape(why(row))}" for row in failed if not row["counts"]]
    return [*lines, *(["", *reasons] if reasons else [])]


def _returned(models: Sequence[str], have: Rows) -> list[str]:
    """Models with layers that verification left in float, and why."""
    rows = [row for row in _ours(models, have) if row.get("rolled_back")]
    lines = [
        f"- `{row['model']}`: {escape('; '.join(row['rolled_back'][:3]))}"
        + (f"; and {len(row['rolled_back']) - 3} more" if len(row["rolled_back"]) > 3 else "")
        for row in rows
    ]
    return ["", "## Rolled back", "", *lines] if lines else []


def _below(models: Sequence[str], have: Rows) -> list[str]:
    """Models with less on integers than asked for, and what is in float."""
    lines = []
    for kind, wanted in SHARES.items():
        for row in _ours(models, have):
            if row["kind"] == kind and row["integer_share"] < wanted:
                reasons = "; ".join(f"{100 * share:.0f} % {reason}" for reason, share in row["left"][:3])
                lines.append(f"- `{row['model']}`: {100 * row['integer_share']:.1f} %; in float: {escape(reasons)}")
    return ["", "## Below the bar for MACs in int8", "", *lines] if lines else []


def _silent(models: Sequence[str], have: Rows) -> list[str]:
    lines = [f"- `{row['model']}`: {', '.join(row['silent'][:3])}" for row in _ours(models, have) if row["silent"]]
    return ["", "## In float without a reason", "", *lines] if lines else []


def _failures(models: Sequence[str], have: Rows) -> list[str]:
    lines = []
    for side, label in SIDES.items():
        of_side = [(name, have[name, side]) for name in models if (name, side) in have]
        failed = [f"- `{name}`: {escape(why(row))}" for name, row in of_side if not row["counts"]]
        if failed:
            lines += ["", f"### {label}", "", *failed]
    missing = [name for name in models if (name, "ours") not in have]
    if missing:
        lines += ["", "### not run", "", ", ".join(f"`{name}`" for name in missing)]
    return ["", "## What does not count", *lines] if lines else []


def whole_page(names: Callable[[], Sequence[str]]) -> Callable[[Iterable[Row], dict[str, Any]], str]:
    """`page` over all models of the zoo, whose names are looked up when the page is written."""
    return lambda rows, machine: page(rows, machine, names())
