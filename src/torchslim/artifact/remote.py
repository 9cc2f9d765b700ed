"""Time programs on a worker: `torchslim worker` on the machine that counts, and its client here.

One connection is one job. The worker sends a greeting with fresh random bytes. The client answers with a header, JSON
that lists the files with their SHA-256, and an HMAC-SHA256 of both under the shared token; then with the files. The
worker answers with JSON under an HMAC of its own. Nothing is unpickled on either side. The token never crosses the
network, and a recorded job cannot be sent again; contents are not encrypted, so use a tunnel where others can listen.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from typing_extensions import TypedDict

from torchslim.artifact.assembled import AnyDeployed, DeployedParts
from torchslim.artifact.bench_pack import packed
from torchslim.artifact.latency import Timings
from torchslim.artifact.times import MachineJson, Times
from torchslim.core.checks import check_fields
from torchslim.core.json_types import STRICT
from torchslim.core.schema import MIB, Limits, Schema
from torchslim.errors import WorkerError

GREETING = b"torchslim worker 1\n"
NONCE, MAC = 32, 32  # bytes
LENGTH = struct.Struct(">Q")
JOB, ANSWER = b"job", b"answer"
ANSWER_BYTES = 16 * MIB
SHORTEST_TOKEN = 32  # characters
RUNTIMES = ("onnxruntime", "openvino", "executorch")
"""Runtimes that a worker runs: their files are data, which are checked; torch programs and machine code are not."""
WAIT_S = 30.0  # for a connection, and for each read while the worker is not timing
JOB_S = 600.0  # that a worker may take for a job


class AnswerJson(TypedDict):
    """What a worker answers: times.json as text, or a message."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    status: Literal["ok", "refused"]
    content: str


ANSWERS: Schema[AnswerJson] = Schema(
    AnswerJson, "the worker's answer", WorkerError, limits=Limits(size_bytes=ANSWER_BYTES), mend="start it again"
)


MACHINES: Schema[MachineJson] = Schema(MachineJson, "a worker's machine", WorkerError, mend="start it again")


def read_token(path: str | Path) -> bytes:
    """The token in a file that only its owner can read.

    Raises:
        WorkerError: no such file, others can read it, or it is too short.
    """
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(4097).strip()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise WorkerError(f"the token {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode) or (hasattr(os, "getuid") and mode & 0o077):
        raise WorkerError(f"the token {path} must be a file that only you can read: chmod 600 {path}")
    if not SHORTEST_TOKEN <= len(token) <= 4096:
        raise WorkerError(
            f"the token {path} must have {SHORTEST_TOKEN} to 4,096 characters, got {len(token)}; make one with "
            "openssl rand -hex 32"
        )
    return token


def mac(token: bytes, nonce: bytes, kind: bytes, data: bytes) -> bytes:
    """HMAC-SHA256 of a message of one kind in one connection."""
    return hmac.new(token, b"".join((GREETING, nonce, kind, LENGTH.pack(len(data)), data)), "sha256").digest()


def receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly `count` bytes, until a moment of `time.monotonic`.

    Raises:
        TimeoutError: the peer is too slow.
        EOFError: the peer has closed the connection.
    """
    parts, missing = [], count
    while missing:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        part = connection.recv(min(missing, MIB))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def address_of(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT".

    Raises:
        WorkerError: no such address.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not int(port) < 2**16:
        raise WorkerError(f"an address is HOST:PORT, got {text!r}; for example 127.0.0.1:7070")
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, kw_only=True)
class TimingWorker:
    """A worker, seen from here: `compare` times programs there as `artifact.latency.compare` does here.

    Args:
        address: "HOST:PORT".
        token: path of the file with the shared token.
        patience_s: seconds that the worker may take for a job.
    """

    address: str
    token: str | Path = field(repr=False)
    patience_s: float = JOB_S

    def __post_init__(self) -> None:
        check_fields(self, WorkerError, "TimingWorker: ")
        if not self.patience_s > 0:
            raise WorkerError(f"patience_s must be above 0, got {self.patience_s}")
        address_of(self.address)
        read_token(self.token)

    def compare(
        self,
        deployed: Mapping[str, AnyDeployed],
        *,
        batch: int | None = None,
        rounds: int = 50,
        seconds: float = 60.0,
        inputs: Sequence[Tensor] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> Timings:
        """Interleaved latency on the worker; as `artifact.latency.compare`, but the rounds are not cut short.

        `seconds` and `clock` are not used: the worker has a limit of its own.

        Raises:
            WorkerError: the worker cannot be reached, or refuses the job; says why.
        """
        times = self.times(deployed, batch=batch, rounds=rounds, inputs=inputs)
        rounds_by_name = dict(zip(deployed, times.timings.rounds.values(), strict=True))
        return Timings(rounds_by_name, dict.fromkeys(deployed, str(times.machine["processor"])))

    def times(
        self,
        deployed: Mapping[str, AnyDeployed],
        *,
        batch: int | None = None,
        rounds: int = 50,
        threads: int | None = None,
        inputs: Sequence[Tensor] | None = None,
    ) -> Times:
        """Times of programs on the worker, with its description."""
        whole = {}
        for name, model in deployed.items():
            if isinstance(model, DeployedParts):
                raise WorkerError(
                    f"{name} is a model with deployed parts, whose Python code stays here; time its parts"
                )
            whole[name] = model
        files = packed(whole, inputs=inputs)
        options = {"rounds": rounds, "batch": batch, "threads": threads}
        programs = json.loads(files["pack.json"])["programs"]
        sent = {name: data for name, data in files.items() if not name.endswith((".py", ".sh", ".json"))}
        times = Times.parse(self._answered(programs, sent, options), "the times of the worker")
        if [program["program"] for program in times.programs] != [program["program"] for program in programs]:
            raise WorkerError("the worker timed other programs than it was sent; start it again")
        return times

    def machine(self) -> dict[str, Any]:
        """Description of the worker's machine."""
        options = {"rounds": 1, "batch": None, "threads": None}
        return dict(MACHINES.parse(self._answered([], {}, options), "the worker's description"))

    def _answered(self, programs: list[Any], sent: Mapping[str, bytes], options: Mapping[str, Any]) -> bytes:
        listed = [
            {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sent.items()
        ]
        header = json.dumps({"options": options, "programs": programs, "files": listed}).encode()
        token = read_token(self.token)
        try:
            with socket.create_connection(address_of(self.address), timeout=WAIT_S) as connection:
                greeting = receive(connection, len(GREETING) + NONCE, time.monotonic() + WAIT_S)
                if not greeting.startswith(GREETING):
                    raise WorkerError(f"{self.address} is no worker of this version of torchslim")
                nonce = greeting[len(GREETING) :]
                connection.settimeout(WAIT_S)
                try:
                    connection.sendall(LENGTH.pack(len(header)) + header + mac(token, nonce, JOB, header))
                    for data in sent.values():
                        connection.sendall(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the worker has refused the job, and its answer says why
                deadline = time.monotonic() + self.patience_s + WAIT_S
                (length,) = LENGTH.unpack(receive(connection, LENGTH.size, deadline))
                if length > ANSWER_BYTES:
                    raise WorkerError("the worker's answer is too long; start it again")
                answer = receive(connection, length, deadline)
                if not hmac.compare_digest(receive(connection, MAC, deadline), mac(token, nonce, ANSWER, answer)):
                    raise WorkerError("the worker's answer is not signed with this token; give both the same file")
        except TimeoutError as error:
            raise WorkerError(f"the worker {self.address} did not answer in time; look at its output") from error
        except (EOFError, ConnectionResetError) as error:
            raise WorkerError(
                f"the worker {self.address} closed the connection; is the token the same on both sides?"
            ) from error
        except OSError as error:
            raise WorkerError(
                f"the worker {self.address} cannot be reached: {error.strerror or error}; start it there with "
                "torchslim worker"
            ) from error
        parsed = ANSWERS.parse(answer)
        if parsed["status"] != "ok":
            raise WorkerError(f"the worker {self.address} refused: {parsed['content'][:2_000]}")
        return parsed["content"].encode()
