"""Commands for the results of a run: artifacts and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from torchslim.cli.console import EXAMPLE
from torchslim.core.terminal import printable


@click.command(epilog=f"{EXAMPLE}torchslim kernels out/")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--trusted", is_flag=True, help="Load an artifact of machine code too (runtime aoti).")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help="Refuse artifacts that were not signed with the private key of this public key (PEM, Ed25519).",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def kernels(artifact: Path, trusted: bool, public_key: Path | None, as_json: bool) -> None:
    """List the layers of an ARTIFACT (a saved folder) that run on integers, their kernels, and why others do not."""
    from torchslim.artifact.integer_coverage import lowered_parts
    from torchslim.artifact.loading import load_pieces

    executed = lowered_parts(load_pieces(artifact, trusted=trusted, public_key=public_key))
    click.echo(json.dumps(executed.to_dict(), indent=1) if as_json else printable(executed.table(), lines=True))


@click.command(epilog=f"{EXAMPLE}torchslim bench out/a out/b --batch 16")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(min=1), help="Samples a call; default 1 where the batch is free.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of threads; default: that of each artifact.")
@click.option("--rounds", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--trusted", is_flag=True, help="Load artifacts of machine code too (runtime aoti).")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help="Refuse artifacts that were not signed with the private key of this public key (PEM, Ed25519).",
)
@click.option("--json", "as_json", is_flag=True)
def bench(
    artifacts: tuple[Path, ...],
    batch: int | None,
    threads: int | None,
    rounds: int,
    trusted: bool,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """Time saved artifacts side by side, interleaved; ratios are over the first.

    Where sizes vary, the median-size example and the largest one are timed. Of an artifact with parts of a model, every
    part is timed: the code around them is not in the artifact.
    """
    from torchslim.artifact.latency import compare, compare_largest
    from torchslim.artifact.loading import load_pieces
    from torchslim.artifact.storage import render_timings

    loaded = {
        f"{path}, part {part}" if part else str(path): piece
        for path in artifacts
        for part, piece in load_pieces(path, threads=threads, trusted=trusted, public_key=public_key).items()
    }
    largest = compare_largest(loaded, batch=batch, rounds=rounds)
    rows = render_timings(compare(loaded, batch=batch, rounds=rounds), next(iter(loaded)), largest)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    width = max(len(printable(row["artifact"])) for row in rows)
    for size in ("median", "largest") if largest is not None else ("",):
        if size:
            click.echo(f"inputs of the {size} size:")
        click.echo(f"{'artifact':<{width}}  {'latency ms [p10-p90]':>26}  {'speed-up [p10-p90]':>24}")
        for row in rows:
            _print_timed(printable(row["artifact"]).ljust(width), row["largest"] if size == "largest" else row)


def _print_timed(name: str, row: dict[str, Any]) -> None:
    """Print a line of the table of `torchslim bench`."""
    latency_ms, ratio = row["latency_ms"], row["speedup"]
    latency = f"{latency_ms['median']:.3f} [{latency_ms['p10']:.3f}-{latency_ms['p90']:.3f}]"
    speedup = f"{ratio['median']:.2f}x [{ratio['p10']:.2f}-{ratio['p90']:.2f}]"
    click.echo(f"{name}  {latency:>26}  {speedup:>24}  {ratio['verdict']}")


@click.command(epilog=f"{EXAMPLE}torchslim report runs/fashion_mnist")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Default: report.html beside it.")
def report(folder: Path, out: Path | None) -> None:
    """Rebuild the report page from run.json, search.json or sensitivity.json, and print the table."""
    from torchslim.core.files import write_bytes
    from torchslim.report import REPORTS, kind_of

    load, render, table = REPORTS[kind_of(folder)]
    record = load(folder)
    out = out or (folder if folder.is_dir() else folder.parent) / "report.html"
    write_bytes(out, render(record).encode())
    click.echo(printable(table(record), lines=True))
    click.echo(f"\nreport: {out}")
