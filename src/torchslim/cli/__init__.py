"""The command line: thin calls of the library, and the only code that draws on the terminal."""

from __future__ import annotations

import os
import sys
import traceback

import click

from torchslim.cli.artifacts import kernels, report
from torchslim.cli.console import EXAMPLE
from torchslim.cli.models import inspect, latency, sensitivity
from torchslim.cli.runs import check, run, search, suggest
from torchslim.cli.starting import demo, init, list_
from torchslim.cli.timing import bench, worker
from torchslim.core.terminal import printable


@click.group(epilog=f"{EXAMPLE}torchslim run examples/fashion_mnist/recipe.toml")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="torchslim")
def cli(debug: bool) -> None:
    """Prune, distill and quantize a trained PyTorch model, and measure what ships."""


COMMANDS = (
    *(demo, init, list_, run, check, search, suggest, inspect, sensitivity, latency),
    *(kernels, bench, worker, report),
)
for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Run the command line; exit with 0 on success, 2 on the user's error (one line), 1 on an internal error."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        cli.main(args=arguments, prog_name="torchslim", standalone_mode=False)
        if distributed := sys.modules.get("torchslim.core.distributed"):
            distributed.leave()
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; run the same command again to resume", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the last resort: tells user errors from internal ones
        from torchslim.errors import TorchslimError

        if debug:
            traceback.print_exc()
        if isinstance(error, TorchslimError):
            click.echo(f"error: {printable(str(error), lines=True)}", err=True)
            sys.exit(2)
        hint = "" if debug else "; run with --debug for the traceback"
        said = printable(" ".join((str(error), *getattr(error, "__notes__", ()))), lines=True)
        click.echo(f"internal error: {type(error).__name__}: {said}{hint}", err=True)
        sys.exit(1)
