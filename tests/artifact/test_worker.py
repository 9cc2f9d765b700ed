"""Programs timed on a worker: both sides, in two processes, and clients that mean harm."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from tests.support import toy
from torchslim.artifact.remote import ANSWER, GREETING, JOB, LENGTH, MAC, NONCE, TimingWorker, mac
from torchslim.artifact.worker import HEADER_BYTES, Server
from torchslim.errors import RecipeError, WorkerError

TOKEN = "0123456789abcdef" * 2


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "worker.token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return path


@contextmanager
def listening(token: Path, **options: Any) -> Iterator[tuple[str, list[str]]]:
    """A worker in a thread: its address, and the lines that it tells."""
    ready, found, lines = threading.Event(), [], list[str]()
    server = Server(address="127.0.0.1:0", token=token, tell=lines.append, **options)

    def began(host: str, port: int) -> None:
        found.append(f"{host}:{port}")
        ready.set()

    threading.Thread(target=lambda: server.serve(ready=began), daemon=True).start()
    assert ready.wait(30)
    yield found[0], lines


def deployed(runtime: str = "onnxruntime") -> ts.Deployed:
    torch.manual_seed(0)
    model = ts.deploy(nn.Linear(4, 2), (torch.randn(3, 4),), runtime=runtime, threads=1)
    assert isinstance(model, ts.Deployed)
    return model


def header(**changes: Any) -> dict[str, Any]:
    files = [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (("0.onnx", b"model"), ("0.npz", b"inputs"))
    ]
    program = {
        "name": "a",
        "program": "0" * 64,
        "runtime": "onnxruntime",
        "threads": 1,
        "file": "0.onnx",
        "example": "0.npz",
        "spec": {"sizes": [[3, 4]], "dtypes": ["float32"], "batch_axis": None},
    }
    options = {"rounds": 1, "batch": None, "threads": None}
    return {
        "options": {**options, **changes.pop("options", {})},
        "programs": [{**program, **changes.pop("program", {})}],
        "files": changes.pop("files", files),
        **changes,
    }


def sent(address: str, content: bytes, body: bytes = b"", token: str = TOKEN) -> tuple[bytes, bytes]:
    """The answer to a job, and the random bytes of the connection."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        nonce = connection.recv(len(GREETING) + NONCE, socket.MSG_WAITALL)[len(GREETING) :]
        connection.sendall(LENGTH.pack(len(content)) + content + mac(token.encode(), nonce, JOB, content) + body)
        with suppress(OSError):  # the worker may have refused and closed
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := connection.recv(65_536):
                answer += part
        except ConnectionResetError:
            pass
        return answer, nonce


def refused(address: str, content: bytes, body: bytes = b"") -> str:
    """The worker's reason, from an answer that is the worker's own."""
    answer, nonce = sent(address, content, body)
    (length,) = LENGTH.unpack(answer[: LENGTH.size])
    text, signature = answer[LENGTH.size : LENGTH.size + length], answer[LENGTH.size + length :]
    assert signature == mac(TOKEN.encode(), nonce, ANSWER, text)
    assert len(signature) == MAC
    parsed = json.loads(text)
    assert parsed["status"] == "refused"
    return str(parsed["content"])


@pytest.mark.slow
def test_a_program_is_timed_in_another_process_through_the_commands(token: Path, tmp_path: Path, call: Any) -> None:
    """Costs two starts of Python with torch, and one of the child."""
    ts.save(deployed(), tmp_path / "out")
    command = [sys.executable, "-m", "torchslim", "worker", "--listen", "127.0.0.1:0", "--token", str(token)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        line = next(line for line in child.stderr if "listening on" in line)
        address = line.split()[2].rstrip(";")
        rows = json.loads(
            call("bench", tmp_path / "out", "--on", address, "--token", token, "--rounds", 3, "--json").out
        )
        assert rows[0]["latency_ms"]["rounds"] == 3
        assert rows[0]["latency_ms"]["median"] > 0
        refusal = call("bench", tmp_path / "out", "--on", address, "--token", _other(tmp_path), "--rounds", 3)
        assert refusal.code == 2
        assert "is the token the same" in refusal.err
    finally:
        child.terminate()
        child.wait(30)


def _other(folder: Path) -> Path:
    path = folder / "other.token"
    path.write_text("f" * 32)
    path.chmod(0o600)
    return path


@pytest.mark.slow
def test_a_run_trains_here_and_times_there(token: Path) -> None:
    with listening(token) as (address, lines):
        worker = ts.TimingWorker(address=address, token=token)
        step = ts.Quantize("int8", layers="auto", by="latency")
        result = ts.compress(toy.model(), toy.task(), [step], threads=1, worker=worker)
        machine = worker.machine()["processor"]
    latency = result.run["rows"][-1]["latency_ms"]
    assert latency["onnxruntime"]["machine"] == machine
    assert latency["eager"]["machine"] == "this"
    assert machine in result.run["machines"]
    assert result.run["rows"][1]["evidence"]["faster_in_float"][""]["programs"] >= 2
    assert all(line.endswith("timed") for line in lines)
    assert TOKEN not in json.dumps(result.run)


def test_a_token_that_is_wrong_gets_no_answer(token: Path) -> None:
    with listening(token) as (address, lines):
        content = json.dumps(header()).encode()
        assert sent(address, content, token="f" * 32)[0] == b""
        first, _ = sent(address, content, b"modelinputs")
        assert first  # the worker lives on
        assert "not authenticated" in lines[0]


def test_a_recorded_job_cannot_be_sent_again(token: Path) -> None:
    with listening(token) as (address, lines):
        host, _, port = address.rpartition(":")
        content = json.dumps(header()).encode()
        recorded = LENGTH.pack(len(content)) + content + mac(TOKEN.encode(), b"\0" * NONCE, JOB, content)
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.recv(len(GREETING) + NONCE, socket.MSG_WAITALL)
            connection.sendall(recorded)
            assert connection.recv(1) == b""
        _until(lambda: bool(lines))
        assert "not authenticated" in lines[0]


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_size_beyond_the_bounds_is_refused_before_it_is_read(token: Path) -> None:
    with listening(token) as (address, _):
        host, _, port = address.rpartition(":")
        for length in (2**63, HEADER_BYTES + 1, 0):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.recv(len(GREETING) + NONCE, socket.MSG_WAITALL)
                connection.sendall(LENGTH.pack(length))
                assert connection.recv(1) == b""
        huge = header(files=[{"name": "0.onnx", "size": 2**40, "sha256": "0" * 64}])
        assert "files.0.size" in refused(address, json.dumps(huge).encode())
        many = header(files=[{"name": f"{n}.onnx", "size": 2**31, "sha256": "0" * 64} for n in range(3)])
        assert "bytes" in refused(address, json.dumps(many).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": [{"name": "../0.onnx", "size": 1, "sha256": "0" * 64}]}, "no name of a packed file"),
        ({"files": [{"name": "/etc/passwd", "size": 1, "sha256": "0" * 64}]}, "no name of a packed file"),
        ({"files": [{"name": "bench.py", "size": 1, "sha256": "0" * 64}]}, "no name of a packed file"),
        ({"files": [{"name": "pack.json", "size": 1, "sha256": "0" * 64}]}, "no name of a packed file"),
        ({"files": [{"name": "0.onnx", "size": 1, "sha256": "0" * 64}] * 2}, "listed twice"),
        ({"files": [{"name": "0.onnx", "size": 0, "sha256": "0" * 64}]}, "size"),
        ({"program": {"runtime": "aoti"}}, "'aoti' is not one of"),
        ({"program": {"runtime": "eager"}}, "'eager' is not one of"),
        ({"program": {"runtime": "inductor"}}, "'inductor' is not one of"),
        ({"program": {"runtime": "x" * 50}}, "is not one of"),
        ({"program": {"file": "1.onnx"}}, "needs the files 0.onnx"),
        ({"program": {"example": "../x.npz"}}, "needs the files"),
        ({"options": {"rounds": 10**9}}, "rounds"),
        ({"options": {"trusted": True}}, "trusted"),
        ({"more": 1}, "more"),
    ],
)
def test_names_runtimes_and_options_that_no_client_sends_are_refused(
    token: Path, changes: dict[str, Any], message: str
) -> None:
    with listening(token) as (address, _):
        assert message in refused(address, json.dumps(header(**changes)).encode())


def test_damaged_headers_are_refused(token: Path) -> None:
    with listening(token) as (address, _):
        for content in (b"\xff", b"[" * 1000, b'{"options": NaN}', b"null", b'{"a": 1, "a": 1}'):
            assert "the job is damaged" in refused(address, content)


@pytest.mark.slow
def test_a_body_that_is_cut_or_changed_is_refused(token: Path) -> None:
    with listening(token) as (address, lines):
        content = json.dumps(header()).encode()
        assert sent(address, content, b"mod")[0] == b""
        _until(lambda: bool(lines))
        assert "incomplete" in lines[0]
        assert "not the file that the job lists" in refused(address, content, b"MODELinputs")
        assert "onnx" in refused(address, content, b"modelinputs").lower()  # the bytes that it lists, but no model


def test_a_slow_client_is_cut_off(token: Path) -> None:
    with listening(token, header_s=0.2) as (address, lines):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.recv(len(GREETING) + NONCE, socket.MSG_WAITALL)
            connection.sendall(LENGTH.pack(1000))
            began = time.monotonic()
            assert connection.recv(1) == b""
            assert time.monotonic() - began < 20
        _until(lambda: bool(lines))
        assert "too slow" in lines[0]


@pytest.mark.slow
def test_a_job_that_takes_too_long_is_ended(token: Path) -> None:
    with listening(token, limit_s=0.01) as (address, _):
        worker = TimingWorker(address=address, token=token)
        with pytest.raises(WorkerError, match="took longer than 0.01 s"):
            worker.times({"a": deployed()}, rounds=5)


def test_an_answer_of_somebody_without_the_token_is_refused(token: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def answer() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(GREETING + b"\0" * NONCE)
                connection.recv(65_536)
                text = json.dumps({"status": "ok", "content": "{}"}).encode()
                connection.sendall(LENGTH.pack(len(text)) + text + b"\0" * MAC)

        threading.Thread(target=answer, daemon=True).start()
        worker = TimingWorker(address=f"127.0.0.1:{impostor.getsockname()[1]}", token=token)
        with pytest.raises(WorkerError, match="not signed with this token"):
            worker.machine()


def test_nobody_at_the_address(token: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(WorkerError, match="cannot be reached.*torchslim worker"):
        TimingWorker(address=f"127.0.0.1:{port}", token=token).machine()


def test_tokens_and_addresses_are_checked(token: Path, tmp_path: Path) -> None:
    for address in ("127.0.0.1", ":70", "host:seventy", "host:70000"):
        with pytest.raises(WorkerError, match="HOST:PORT"):
            TimingWorker(address=address, token=token)
    with pytest.raises(WorkerError, match="loopback, got 0.0.0.0:0.*--public"):
        Server(address="0.0.0.0:0", token=token)
    Server(address="0.0.0.0:0", token=token, public=True)
    short = tmp_path / "short"
    short.write_text("secret")
    short.chmod(0o600)
    with pytest.raises(WorkerError, match="32 to 4,096 characters, got 6"):
        TimingWorker(address="127.0.0.1:1", token=short)
    with pytest.raises(WorkerError, match="cannot be read"):
        TimingWorker(address="127.0.0.1:1", token=tmp_path / "none")
    if hasattr(os, "getuid"):
        token.chmod(0o644)
        with pytest.raises(WorkerError, match="only you can read"):
            TimingWorker(address="127.0.0.1:1", token=token)
        token.chmod(0o600)
    assert str(token) not in repr(TimingWorker(address="127.0.0.1:1", token=token))


def test_a_run_on_a_runtime_that_no_worker_has_is_refused_at_once(token: Path) -> None:
    worker = TimingWorker(address="127.0.0.1:1", token=token)
    with pytest.raises(RecipeError, match="a worker runs onnxruntime, openvino, executorch, not 'eager'"):
        ts.compress(toy.model(), toy.task(), [ts.Quantize("int8")], runtime="eager", worker=worker)
