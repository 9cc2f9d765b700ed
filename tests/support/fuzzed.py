"""Batches of attempts that end in every way, under the watch of `benchmarks.fuzz`; prints their rows by name, as JSON.

It runs in a process of its own: batches are forked, and a process must not fork after a runtime made threads in it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from benchmarks import fuzz
from tests.mutations import Kind
from torchslim.errors import ArtifactError

CUT = 4.0  # seconds after which a batch is cut off: a busy machine takes some to start its process


def refuse(_: int) -> None:
    raise ArtifactError("no")


def out_of_memory(_: int) -> None:
    try:
        bytearray(2**34)
    except MemoryError as error:
        raise ArtifactError("it cannot be read") from error


def busy(_: int) -> None:
    end = time.process_time() + 20
    while time.process_time() < end:
        pass


def short(_: int) -> None:
    time.sleep(0.08)


def watched(attempt: Callable[[Any], object], *, count: int = 3, seconds: float = 30.0) -> fuzz.Row:
    fuzz.KINDS["made"] = Kind(name="made", group="made", examples=st.integers(), attempt=attempt)
    return fuzz.watched("made", 0, count, time.monotonic() + seconds)


def stopped() -> fuzz.Row:
    timer = threading.Timer(CUT, os.kill, (os.getpid(), signal.SIGTERM))
    with fuzz.told_to_stop():
        timer.start()
        row = watched(short, count=1_000)
    timer.join()
    return row


def main() -> None:
    fuzz.SECONDS, fuzz.SILENCE = 0.2, 3  # type: ignore[assignment]
    rows = {
        "accepted": watched(abs),
        "refused": watched(refuse),
        "raw": watched(lambda _: 1 / 0),
        "hang": watched(busy),
        "growth": watched(lambda _: bytearray(2**34)),
        "hidden growth": watched(out_of_memory),
        "death": watched(lambda _: os._exit(7)),
        "silence": watched(lambda _: time.sleep(60)),
        "the end": watched(short, count=1_000, seconds=CUT),
        "a signal": stopped(),
    }
    page = fuzz.page([rows["accepted"], rows["raw"]], {"processor": "a CPU", "versions": {"torch": "2"}})
    print(json.dumps({"rows": rows, "page": page}))


if __name__ == "__main__":
    main()
