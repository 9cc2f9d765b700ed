"""Two processes of one training."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.support.forked import become, context
from tests.support.rehearsals import skip
from tests.support.timing import shorten


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in two processes with the environment that torchrun gives.

    Raises:
        ProcessRaisedException: one of them failed; its traceback is in the message.
    """
    context()
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    mp.start_processes(_begin, (environment, work, arguments), nprocs=2, start_method="forkserver")


def torchslim_on_two(command: Sequence[str], folder: Path) -> str:
    """What `torchslim COMMAND` prints when torchrun starts it on two processes; it must succeed."""
    two_processes(_command, list(command), folder)
    return "".join((folder / f"stdout-{rank}").read_text() for rank in (0, 1))


def _begin(rank: int, environment: Mapping[str, str], work: Callable[..., None], arguments: Sequence[Any]) -> None:
    become(environment)
    shorten(pytest.MonkeyPatch())
    skip(pytest.MonkeyPatch())
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    work(rank, *arguments)


def _command(rank: int, command: list[str], folder: Path) -> None:
    from torchslim.cli import main

    with (folder / f"stdout-{rank}").open("w") as out, redirect_stdout(out):
        sys.argv = ["torchslim", "--debug", *command]
        main()
