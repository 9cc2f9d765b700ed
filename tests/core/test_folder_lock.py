"""One process at a time in a folder, whoever was killed in it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import torchslim as ts
from tests.support import toy
from torchslim.core import folder_lock as module
from torchslim.core.folder_lock import LOCK, holding
from torchslim.errors import StorageError

HOLD = """
import sys, time
from pathlib import Path
from torchslim.core.folder_lock import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, path, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_second_process_is_told_who_works_in_the_folder_and_goes_on_when_that_was_killed(tmp_path: Path) -> None:
    first = holder(tmp_path / LOCK, 60)
    try:
        with pytest.raises(StorageError, match=rf"process {first.pid} on \S+, since \d{{4}}-.*wait"):
            ts.compress(toy.model(), toy.task(), [ts.Prune(sparsity=0.5)], runtime="eager", workdir=tmp_path)
        told: list[str] = []
        threading.Timer(0.5, first.send_signal, [signal.SIGKILL]).start()
        with holding(tmp_path / LOCK, told.append):
            assert told
            assert told[0].startswith(f"waiting for process {first.pid} on ")
    finally:
        first.kill()
        first.wait()
    assert [each.name for each in tmp_path.iterdir()] == [LOCK]  # nothing of the refused run


def test_two_runs_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    with holding(tmp_path / LOCK), pytest.raises(StorageError, match="this process"):
        ts.compress(toy.model(), toy.task(), [ts.Prune(sparsity=0.5)], runtime="eager", workdir=tmp_path)
    with holding(tmp_path / LOCK):
        pass


@pytest.mark.parametrize("damage", [b"", b"junk", b"[" * 4000, b'{"host": 1}', b"\xff"])
def test_a_damaged_lock_file_neither_hides_the_holder_nor_stays_in_the_way(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with holding(path):
        path.write_bytes(damage)
        with pytest.raises(StorageError, match="another process"), holding(path):
            pass
    with holding(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_file_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / LOCK).symlink_to(tmp_path / "thesis")
    with pytest.raises(StorageError, match="cannot write"), holding(tmp_path / LOCK):
        pass
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_names_in_a_lock_file_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with holding(path):
        path.write_text(json.dumps({"host": "\x1b[2J", "pid": 1, "since": "now", "started": None}))
        with pytest.raises(StorageError, match=r"on \\x1b\[2J, since"), holding(path):
            pass


def test_where_there_are_no_locks_a_warning_says_so_and_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"), holding(tmp_path / LOCK):
        done = True
    assert done


@pytest.mark.slow
def test_a_killed_process_whose_child_lives_on_is_waited_for(tmp_path: Path) -> None:
    """As the worker of a loader does until it notices."""
    code = HOLD.replace('print("held"', 'import os, threading\n    if not os.fork():\n        time.sleep(1)\n'
                                        '        os._exit(0)\n    print("held"')  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / LOCK, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    with holding(tmp_path / LOCK):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
