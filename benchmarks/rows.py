"""What benchmarks share that go on where they stopped: rows of JSON, and the version of what they are of."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torchslim
from torchslim.core.hardware import describe_machine

Row = dict[str, Any]
PEERS = {  # their packages, by side
    "peer": "torch-pruning",
    "torchao": "torchao",
    "nncf": "nncf",
    "executorch": "executorch",
}


def version(side: str) -> str:
    """What the side's rows are of: a hash of our source, or the peer's release."""
    if side in PEERS:
        return f"{PEERS[side]} {importlib.metadata.version(PEERS[side])}"
    digest = hashlib.sha256()
    root = Path(torchslim.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def machine_named() -> str:
    """The processor of this machine with its instruction set, for rows."""
    machine = describe_machine(1)
    return f"{machine['processor']} ({machine['instruction_set']})"


def load(path: Path) -> list[Row]:
    """The rows so far; a last line that a kill cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(row: Row, path: Path) -> None:
    """Add a row, on a line of its own whatever a kill left before it."""
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(row) + "\n")
