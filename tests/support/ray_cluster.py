"""A Ray cluster of the test's own: two nodes on this machine, without a dashboard and with little memory."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import require

STORE_BYTES = 80 * 2**20  # the least that Ray takes
TRIES = 3  # Ray gives its agents 15 seconds to start, which they miss on a busy machine


@contextmanager
def ray_cluster() -> Iterator[str]:
    """The address of a cluster with one processor a node; without Ray the test is skipped, where CI is set it fails."""
    if importlib.util.find_spec("ray") is None:
        require("Ray", "nothing, but pip install ray", None)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets have short paths
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        cluster = Cluster()
        try:
            for _ in range(2):
                start(cluster, node)
            cluster.wait_for_nodes(120)
            yield cluster.address
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def start(cluster: Any, node: dict[str, Any]) -> None:
    """Add a node; where it does not start in Ray's time, try again."""
    for attempt in range(1, TRIES + 1):
        try:
            cluster.add_node(**node)
            return
        except Exception:
            if attempt == TRIES:
                raise
            if cluster.head_node is None:
                cluster.shutdown()
