"""Changes to a `.pt2` file, by hand."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

JSON = dict[str, Any]


def changed(data: bytes, change: Callable[[JSON], None], entry: str = "models/model.json") -> bytes:
    """A `.pt2` with another graph, or another list of weights."""
    source, buffer = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(entry):
                parsed = json.loads(content)
                change(parsed)
                content = json.dumps(parsed).encode()
            archive.writestr(name, content)
    return buffer.getvalue()


def nodes(program: JSON) -> list[JSON]:
    return program["graph_module"]["graph"]["nodes"]  # type: ignore[no-any-return]


def retarget(program: JSON, target: str, **arguments: Any) -> None:
    """Let the first node call something else."""
    node = nodes(program)[0]
    node["target"] = target
    node["inputs"] = [{"name": name, "arg": value, "kind": 2} for name, value in arguments.items()]


def from_file(path: Path) -> Callable[[JSON], None]:
    return lambda program: retarget(
        program, "torch.ops.aten.from_file.default",
        filename={"as_string": str(path)}, shared={"as_bool": True}, size={"as_int": 2},
    )  # fmt: skip
