"""Commands that time artifacts: here, on a worker, or from a folder that is copied to another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchslim.cli.console import EXAMPLE
from torchslim.core.terminal import printable

if TYPE_CHECKING:
    from torchslim.artifact.latency import Timings
    from torchslim.artifact.remote import TimingWorker
    from torchslim.artifact.times import Times
    from torchslim.runtimes import Deployed

ON = click.option("--on", metavar="HOST:PORT", help="Time on the worker that listens there; needs --token.")
TOKEN = click.option("--token", type=click.Path(path_type=Path), help="File with the token of the worker.")


def worker_at(on: str | None, token: Path | None) -> TimingWorker | None:
    """The worker at an address; None without one."""
    if on is None and token is None:
        return None
    if on is None or token is None:
        raise click.UsageError("--on and --token go together: the worker's address, and the file with its token")
    from torchslim.artifact.remote import TimingWorker

    return TimingWorker(address=on, token=token)


@click.command(epilog=f"{EXAMPLE}torchslim bench out/a out/b --batch 16")
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(min=1), help="Samples a call; default 1 where the batch is free.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of threads; default: that of each artifact.")
@click.option("--rounds", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--trusted", is_flag=True, help="Load artifacts of machine code too (runtime aoti).")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help="Refuse artifacts that were not signed with the private key of this public key (PEM, Ed25519).",
)
@click.option("--pack", type=click.Path(path_type=Path), help="Write a folder there that another machine times.")
@click.option(
    "--import",
    "imported",
    type=click.Path(path_type=Path),
    help="Show a times.json from a packed folder, and add it to the run in ARTIFACT.",
)
@click.option("--key", type=click.Path(path_type=Path), help="With --import: sign the artifact again with this key.")
@ON
@TOKEN
@click.option("--json", "as_json", is_flag=True)
def bench(
    artifacts: tuple[Path, ...],
    batch: int | None,
    threads: int | None,
    rounds: int,
    trusted: bool,
    public_key: Path | None,
    pack: Path | None,
    imported: Path | None,
    key: Path | None,
    on: str | None,
    token: Path | None,
    as_json: bool,
) -> None:
    """Time saved ARTIFACTS side by side, interleaved; ratios are over the first.

    Where sizes vary, the median-size example and the largest one are timed. Of an artifact with parts of a model, every
    part is timed: the code around them is not in the artifact.

    Elsewhere: --on times on a worker (torchslim worker). --pack DIR writes the artifacts with a script that needs only
    numpy and the runtime, or adb for ExecuTorch on a phone; it writes times.json, which --import shows and adds to the
    record and the report of a run.
    """
    from torchslim.artifact.latency import compare, compare_largest
    from torchslim.artifact.loading import load_pieces

    if imported is not None:
        _import(imported, artifacts, key, as_json)
        return
    if not artifacts:
        raise click.UsageError("name one or more artifacts: folders that torchslim saved")
    worker = worker_at(on, token)
    loaded = {
        f"{path}, part {part}" if part else str(path): piece
        for path in artifacts
        for part, piece in load_pieces(path, threads=threads, trusted=trusted, public_key=public_key).items()
    }
    if pack is not None:
        _pack(pack, loaded)
        return
    if worker is not None:
        times = worker.times(loaded, batch=batch, rounds=rounds, threads=threads)
        _show(times.named(), None, as_json, f"on {times.machine['processor']}:")
        return
    largest = compare_largest(loaded, batch=batch, rounds=rounds)
    _show(compare(loaded, batch=batch, rounds=rounds), largest, as_json)


def _pack(folder: Path, loaded: dict[str, Deployed]) -> None:
    from torchslim.artifact.bench_pack import PHONE, write_pack

    scripts = write_pack(folder, loaded)
    click.echo(f"packed: {folder}; copy it to the other machine and run there: python bench.py --threads 1")
    if PHONE in scripts:
        click.echo("or with an Android phone at this machine: sh phone.sh EXECUTOR_RUNNER")
    elif any(deployed.runtime == "executorch" for deployed in loaded.values()):
        click.echo("no phone.sh: executor_runner calls programs of fixed sizes; deploy with dynamic_shapes=None for it")
    click.echo("then, here: torchslim bench --import times.json RUN")


def _import(path: Path, runs: tuple[Path, ...], key: Path | None, as_json: bool) -> None:
    from torchslim.artifact.times import LIMITS, Times
    from torchslim.core.schema import read_file
    from torchslim.errors import ArtifactError

    times = Times.parse(read_file(path, ArtifactError, size_bytes=LIMITS.size_bytes), str(path))
    _show(times.named(), None, as_json, _about(times))
    for run in runs:
        from torchslim.pipeline.elsewhere import add_times

        add_times(run, times, key=key)
        click.echo(f"added to {run / 'run.json'} and {run / 'report.html'}", err=as_json)


def _about(times: Times) -> str:
    machine = times.machine
    return f"on {machine['processor']} ({machine['system']}, {machine['architecture']}):"


def _show(timings: Timings, largest: Timings | None, as_json: bool, heading: str = "") -> None:
    """Print a table of timings, or JSON."""
    from torchslim.artifact.storage import render_timings

    rows = render_timings(timings, next(iter(timings.rounds)), largest)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if heading:
        click.echo(printable(heading))
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


@click.command(epilog=f"{EXAMPLE}torchslim worker --listen 127.0.0.1:7070 --token worker.token")
@click.option("--listen", metavar="HOST:PORT", default="127.0.0.1:7070", show_default=True)
@click.option("--token", required=True, type=click.Path(path_type=Path), help="File with a token that clients share.")
@click.option("--public", is_flag=True, help="Listen where other machines reach it; nothing is encrypted.")
@click.option("--limit", type=click.FloatRange(min=1), default=600.0, show_default=True, help="Seconds for a job.")
def worker(listen: str, token: Path, public: bool, limit: float) -> None:
    """Time programs for torchslim on other machines, until it is stopped.

    Clients must know the token: openssl rand -hex 32 > worker.token; chmod 600 worker.token. The worker runs ONNX,
    OpenVINO and ExecuTorch programs, each job in a child process with a limit of time; no machine code, no pickles.
    Through a tunnel: ssh -L 7070:127.0.0.1:7070 board, then --on 127.0.0.1:7070.
    """
    from torchslim.artifact.worker import Server

    def ready(host: str, port: int) -> None:
        click.echo(f"listening on {host}:{port}; stop with Ctrl+C", err=True)

    server = Server(address=listen, token=token, public=public, limit_s=limit, tell=_told)
    try:
        server.serve(ready=ready)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)


def _told(line: str) -> None:
    click.echo(printable(line), err=True)
