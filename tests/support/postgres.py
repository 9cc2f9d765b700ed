"""A PostgreSQL server of the test's own, from Debian's package: on a socket in a temporary folder, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.programs import postgresql

USER = "torchslim"


@contextmanager
def database() -> Iterator[str]:
    """The SQLAlchemy URL of an empty database: several processes may use it at once, several tests have one each.

    Without PostgreSQL the test is skipped; where CI is set it fails instead.
    """
    binaries = postgresql()
    with tempfile.TemporaryDirectory(prefix="torchslim-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if os.geteuid() == 0:  # the server refuses to run as root
            shutil.chown(folder, "postgres", "postgres")

        def call(program: str, *arguments: str) -> None:
            account = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
            with (folder / f"{program}.txt").open("w") as output:  # not a pipe: the server would keep it open
                done = subprocess.run(
                    [binaries / program, *arguments], cwd=folder, stdout=output, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, timeout=120, check=False, **account,
                )  # fmt: skip
            if done.returncode:
                said = "\n".join(each.read_text() for each in folder.glob("*.txt"))
                raise RuntimeError(f"{program} of PostgreSQL ended with {done.returncode}: {said[-2000:]}")

        data = str(folder / "data")
        call("initdb", "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        # no port of the machine is taken: the socket in this folder is the only way in
        options = f"-k {folder} -c listen_addresses='' -c fsync=off -c shared_buffers=16MB"
        call("pg_ctl", "start", "-w", "-D", data, "-l", str(folder / "server.txt"), "-o", options)
        try:
            yield f"postgresql+psycopg://{USER}@/postgres?host={folder}"
        finally:
            call("pg_ctl", "stop", "-w", "-m", "immediate", "-D", data)
