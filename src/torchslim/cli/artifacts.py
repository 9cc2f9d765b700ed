"""Commands for the results of a run: artifacts and records."""

from __future__ import annotations

import json
from pathlib import Path

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
