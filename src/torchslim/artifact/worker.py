"""The worker: takes programs from an authenticated client, and times them in a child process. See `artifact.remote`.

A client that knows the token may make this machine compute, and nothing else: files get names of the worker's own
choice, sizes are bounded before anything is allocated, programs are checked as those of artifacts are, and only listed
runtimes run them, with the worker's own script. Machine code is none of them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from torchslim.artifact.bench_pack import PACK, PACK_FORMAT
from torchslim.artifact.bench_script import machine
from torchslim.artifact.manifest import Dtype, Threads
from torchslim.artifact.remote import (
    ANSWER,
    GREETING,
    JOB,
    JOB_S,
    LENGTH,
    MAC,
    NONCE,
    RUNTIMES,
    WAIT_S,
    address_of,
    mac,
    read_token,
    receive,
)
from torchslim.artifact.storage import bench_script
from torchslim.artifact.times import MOST_PROGRAMS, TIMES, TIMES_FILE
from torchslim.core.files import json_bytes
from torchslim.core.json_types import STRICT, Axis, Hash, Name, Size
from torchslim.core.schema import MIB, Limits, Schema, shorten
from torchslim.errors import TorchslimError, WorkerError
from torchslim.runtimes import find_runtime
from torchslim.runtimes.kernel_listing import UNWANTED

HEADER_S = 10.0  # to send a header: until then the client is not known
HEADER_BYTES = 4 * MIB
FILES_BYTES = 2**31
SLOWEST = 2**20  # bytes a second with which files must arrive
ERROR = 2_000  # characters of a child's message
FILE = re.compile(r"(\d{1,2})(\.onnx|\.xml|\.bin|\.pte|\.npz|-in\d{3}\.bin)")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class FileJson(TypedDict):
    """A file that follows the header."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    name: Annotated[str, Field(max_length=20)]
    size: Annotated[int, Field(ge=1, le=FILES_BYTES)]
    sha256: Hash


class CallJson(TypedDict):
    """How a program is called."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    sizes: Annotated[list[Annotated[list[Size | None], Field(max_length=64)]], Field(max_length=1_000)]
    dtypes: Annotated[list[Dtype], Field(max_length=1_000)]
    batch_axis: Axis | None


class ProgramJson(TypedDict):
    """A program to time."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    name: Name
    program: Hash
    runtime: Annotated[str, Field(max_length=100)]
    threads: Threads | None
    file: Annotated[str, Field(max_length=20)]
    example: Annotated[str, Field(max_length=20)]
    spec: CallJson


class OptionsJson(TypedDict):
    """How the programs are timed."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    batch: Annotated[int, Field(ge=1, le=65_536)] | None
    threads: Threads | None


class JobJson(TypedDict):
    """The header of a job; without programs it asks for the description of the machine."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    options: OptionsJson
    programs: Annotated[list[ProgramJson], Field(max_length=MOST_PROGRAMS)]
    files: Annotated[list[FileJson], Field(max_length=1_000)]


def _sound(job: JobJson) -> str | None:
    """A message for names, sizes or runtimes that no client of torchslim sends."""
    names = [file["name"] for file in job["files"]]
    if wrong := next((name for name in names if FILE.fullmatch(name) is None), None):
        return f"{shorten(wrong)} is no name of a packed file"
    if len(set(names)) < len(names):
        return "a file is listed twice"
    if sum(file["size"] for file in job["files"]) > FILES_BYTES:
        return f"the files have more than {FILES_BYTES:,} bytes"
    for number, program in enumerate(job["programs"]):
        if program["runtime"] not in RUNTIMES:
            return f"runtime {shorten(program['runtime'])} is not one of {', '.join(RUNTIMES)}"
        suffixes = find_runtime(program["runtime"]).suffixes
        needed = [*(f"{number}{suffix}" for suffix in suffixes), f"{number}.npz"]
        if program["file"] != needed[0] or program["example"] != needed[-1] or not set(needed) <= set(names):
            return f"program {number} needs the files {', '.join(needed)}"
    return None


JOBS: Schema[JobJson] = Schema(
    JobJson,
    "the job",
    WorkerError,
    limits=Limits(size_bytes=HEADER_BYTES, values=200_000, depth=8),
    mend="use the same version of torchslim on both sides",
    also=_sound,
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A worker that listens. Jobs run one after the other, since programs that are timed together disturb each other.

    Args:
        address: "HOST:PORT"; a host other than loopback only with `public`. Port 0 takes a free one.
        token: path of the file with the shared token.
        public: listen on an address that other machines reach.
        limit_s: seconds that a job's child process may take.
        header_s: seconds that a client has for its header.
        tell: called with a line for each job.
    """

    address: str
    token: str | Path
    public: bool = False
    limit_s: float = JOB_S
    header_s: float = HEADER_S
    tell: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        host, _ = address_of(self.address)
        if host not in LOOPBACK and not self.public:
            raise WorkerError(
                f"a worker listens on loopback, got {self.address}; tunnel to it with ssh -L, or allow other machines "
                "with --public"
            )
        read_token(self.token)

    def serve(self, *, jobs: int | None = None, ready: Callable[[str, int], None] = lambda host, port: None) -> None:
        """Serve clients one after the other.

        Args:
            jobs: connections after which to stop; None: never.
            ready: called with host and port once clients can connect.
        """
        host, port = address_of(self.address)
        token, served = read_token(self.token), 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family, backlog=16) as listening:
            ready(*listening.getsockname()[:2])
            while jobs is None or served < jobs:
                connection, client = listening.accept()
                served += 1
                with connection:
                    self.tell(f"{client[0]}: {self._handled(connection, token)}")

    def _handled(self, connection: socket.socket, token: bytes) -> str:
        """Serve one client; returns a line about it. No client ends the worker."""
        nonce = secrets.token_bytes(NONCE)
        try:
            connection.settimeout(self.header_s)
            connection.sendall(GREETING + nonce)
            header = self._header(connection, token, nonce)
            if header is None:
                return "refused: not authenticated"
            status, content = self._answer(connection, header)
            answer = json.dumps({"status": status, "content": content}).encode()
            connection.settimeout(WAIT_S)
            connection.sendall(LENGTH.pack(len(answer)) + answer + mac(token, nonce, ANSWER, answer))
            if status != "ok":
                _drain(connection, time.monotonic() + self.header_s)
        except TimeoutError:
            return "refused: too slow"
        except EOFError:
            return "refused: incomplete"
        except OSError as error:
            return f"lost: {error.strerror or type(error).__name__}"
        return "timed" if status == "ok" else f"refused: {shorten(content, 300)}"

    def _header(self, connection: socket.socket, token: bytes, nonce: bytes) -> bytes | None:
        """The header, if it is that of a client with the token."""
        deadline = time.monotonic() + self.header_s
        (length,) = LENGTH.unpack(receive(connection, LENGTH.size, deadline))
        if not 0 < length <= HEADER_BYTES:
            return None
        header = receive(connection, length, deadline)
        given = receive(connection, MAC, deadline)
        return header if hmac.compare_digest(given, mac(token, nonce, JOB, header)) else None

    def _answer(self, connection: socket.socket, header: bytes) -> tuple[Literal["ok", "refused"], str]:
        """Receive the files and time the programs; a message where that is refused."""
        try:
            job: Any = JOBS.parse(header)
            files = _received(connection, job["files"])
            for number, program in enumerate(job["programs"]):
                runtime = find_runtime(program["runtime"])
                if runtime.check is not None:
                    runtime.check({suffix: files[f"{number}{suffix}"] for suffix in runtime.suffixes})
            return "ok", self._timed(job, files) if job["programs"] else json.dumps(machine())
        except TorchslimError as error:
            return "refused", str(error)[:ERROR]

    def _timed(self, job: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
        """Run bench.py on the files in a child process; returns times.json.

        Raises:
            WorkerError: the child failed, or took too long.
        """
        with tempfile.TemporaryDirectory(prefix="torchslim-worker-") as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            (Path(folder) / "bench.py").write_bytes(bench_script([]))
            pack = {
                "format": PACK_FORMAT,
                "gives": TIMES,
                "programs": job["programs"],
                "disabled_optimizers": UNWANTED,
                "files": {file["name"]: file["sha256"] for file in job["files"]},
            }
            (Path(folder) / PACK).write_bytes(json_bytes(pack))
            options = [f"--{key}={value}" for key, value in job["options"].items() if value is not None]
            # isolated: the child imports nothing from its folder, which holds the client's files
            command = [sys.executable, "-I", "-W", "ignore", str(Path(folder) / "bench.py"), *options]
            code, said = _run(command, folder, self.limit_s)
            if code is None:
                raise WorkerError(f"the programs took longer than {self.limit_s:g} s; time fewer rounds or programs")
            if code:
                raise WorkerError(f"the programs did not run: {said[-ERROR:]}")
            return (Path(folder) / TIMES_FILE).read_text()


def _drain(connection: socket.socket, deadline: float) -> None:
    """Read what a refused client still sends until it closes: closing first could take the answer from it."""
    with suppress(OSError):
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(MIB):
                return


def _received(connection: socket.socket, listed: list[Mapping[str, Any]]) -> dict[str, bytes]:
    """The files that follow a header, with the hashes that it lists."""
    deadline = time.monotonic() + WAIT_S + sum(file["size"] for file in listed) / SLOWEST
    files = {}
    for file in listed:
        data = receive(connection, file["size"], deadline)
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise WorkerError(f"{file['name']} is not the file that the job lists; send it again")
        files[file["name"]] = data
    return files


def _run(command: list[str], folder: str, limit_s: float) -> tuple[int | None, str]:
    """Exit status (None: out of time) and messages of a child, which is ended together with its own children."""
    output = Path(folder) / "output"
    with output.open("wb") as file:
        child = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                _end(child)
    with output.open("rb") as written:
        written.seek(max(output.stat().st_size - 4 * ERROR, 0))
        return code, written.read().decode(errors="replace").strip()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and the processes that it has started."""
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()
