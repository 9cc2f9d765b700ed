"""Changes to the files of an artifact, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchslim.artifact.manifest import manifest_digest
from torchslim.core.files import sha256


def rewritten(folder: Path, **changes: Any) -> None:
    """A manifest as somebody would write it who knows the format."""
    path = folder / "artifact.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))


def listed(folder: Path, name: str, target: Path | None = None) -> None:
    """Let the manifest list a file with its present hash, or with that of another file."""
    known = json.loads((folder / "artifact.json").read_text())["files"]
    rewritten(folder, files={**known, name: sha256(target or folder / name)})
