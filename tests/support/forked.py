"""Processes that begin with torchslim imported: forked from one that has imported it and has no threads."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext

PRELOADED = [
    "torchslim.cli",
    "torchslim.training.fsdp",
    "lightning_fabric",
    "optuna",
    "onnxruntime",
    "tests.support.toy",
]


def context() -> ForkServerContext:
    """The one context of all tests: the first call in a process decides what is preloaded."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOADED)
    return forkserver


def become(environment: Mapping[str, str]) -> None:
    """Take another environment; a forked process has that of the server."""
    os.environ.clear()
    os.environ.update(environment)
