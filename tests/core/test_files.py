"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from torchslim.core.files import digest, replacing, sha256, write_bytes, write_json
from torchslim.errors import StorageError

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from torchslim.errors import StorageError
from torchslim.core.files import write_bytes
path = Path(sys.argv[1])
write_bytes(path, b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(path, b"new" * 10_000)
except StorageError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert f"cannot write {path}" in done.stdout
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["c.ckpt"]


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.slow
@given(st.binary(max_size=100), st.binary(max_size=100))
def test_the_last_write_is_what_stands_there(tmp_path_factory: pytest.TempPathFactory, old: bytes, new: bytes) -> None:
    path = tmp_path_factory.mktemp("f") / "deep" / "er" / "file.bin"
    write_bytes(path, old)
    write_bytes(path, new)
    assert path.read_bytes() == new
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


class Interrupted(BaseException):
    """As KeyboardInterrupt is."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_an_interrupted_write_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: type) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]
    with pytest.raises(error), replacing(tmp_path / "other"):
        raise error
    assert names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_or_replaced_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write .*space.*folder"):
        write_bytes(tmp_path / "file" / "inside", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        write_bytes(tmp_path / "folder", b"x")
    assert names(tmp_path) == ["file", "folder"]


def test_json_is_read_back_as_it_was_and_has_no_nan(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "ü"], "a": {}}
    write_json(tmp_path / "v.json", value)
    assert json.loads((tmp_path / "v.json").read_text()) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "v.json", {"x": float("nan")})
    assert json.loads((tmp_path / "v.json").read_text()) == value


PARTS = st.lists(st.binary(max_size=4) | st.text(max_size=4) | st.integers(0, 99), max_size=3)


@example([b"1"], [1])
@given(PARTS, PARTS)
def test_digests_are_equal_exactly_where_the_parts_are(first: list[object], second: list[object]) -> None:
    assert (digest(*first) == digest(*second)) == (first == second)


def test_a_files_digest_is_the_known_one(tmp_path: Path) -> None:
    write_bytes(tmp_path / "abc", b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
