"""Mutated artifacts: manifests with their specs, surgery records, programs, and the files of other runtimes.

Hashes and digests are made anew, as one who knows the format would. An artifact is good where it loads, runs on its
example inputs, and gives back its module.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.mutations.base import CONTAINERS, NUMBERS, TEXTS, Kind, garbled, mutated
from torchslim.artifact.manifest import manifest_digest
from torchslim.artifact.opened import open_artifact

Files = dict[str, bytes]
DEEP = list(CONTAINERS[:-2])
EXPRESSIONS = (
    "9**9**9**9", "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "Symbol('s0')", "Integer(-1)", "__import__('os')",
    "Mul(" * 50 + "Integer(1)" + ")" * 50, "FloorDiv(Integer(1), Integer(0))", "Max(Symbol('s0', positive=True, integer=True), Integer(7))",
)  # fmt: skip
TARGETS = (
    "torch.ops.aten.from_file.default", "torch.ops.aten.set_.source_Tensor", "torch.ops.aten.full.default",
    "torch.ops.aten.relu.default", "torch.ops.aten.mul.Tensor", "torch.ops.higher_order.cond", "_operator.pow", "_operator.mul",
    "torch.ops.aten.unbind.int", "torch.ops.aten.add_.Tensor", "torch.ops.aten.expand.default", "math.trunc",
)  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        x = torch.relu(self.hidden(torch.relu(self.stem(x)))).mean((2, 3)) * scale
        return {"logits": self.head(x), "pooled": x.reshape(x.shape[0] * 2, 4)}


GOOD: dict[str, Files] = {}
KINDS_OF_GOOD = ("eager", "onnxruntime", "openvino", "openvino int8")


def good(kind: str) -> Files:
    """The files of an artifact, pruned, with its weights and masks where it is eager; made once."""
    if kind not in GOOD:
        GOOD[kind] = _made(*kind.split())
    return GOOD[kind]


def _made(runtime: str, precision: str = "") -> Files:
    torch.manual_seed(0)
    example = (torch.randn(3, 3, 8, 8),)
    with tempfile.TemporaryDirectory() as folder:
        model = ts.prune.channels(Net().eval(), example, sparsity=0.3, min_channels=2, round_to=1)
        if runtime == "eager":
            masks = {"head.weight": torch.ones_like(model.head.weight, dtype=torch.bool)}  # type: ignore[union-attr,arg-type]
            ts.save(model, folder, example_inputs=example, masks=masks)
        else:
            if precision:
                model = ts.quantize.static(model, [example], runtime=runtime)
            ts.save(ts.deploy(model, example, runtime=runtime, threads=1), folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def hashed(files: Files, manifest: Any = None) -> Files:
    """With a manifest that fits the files."""
    made = json.loads(files["artifact.json"]) if manifest is None else manifest
    if isinstance(made, dict):
        if isinstance(made.get("files"), dict):
            known = {name: hashlib.sha256(files[name]).hexdigest() for name in made["files"] if name in files}
            made = {**made, "files": {**made["files"], **known}}
        made = {**made, "digest": _digest(made)}
    return files | {"artifact.json": _dumped(made)}


def _digest(manifest: Any) -> Any:
    try:
        return manifest_digest(manifest)
    except (TypeError, ValueError, RecursionError):
        return "0" * 64


def _dumped(value: Any) -> bytes:
    try:
        return json.dumps(value, default=str).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"[" * 100_000


def attempt(files: Files) -> None:
    """Load an artifact, run it, and make its module."""
    with tempfile.TemporaryDirectory() as place:
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        opened = open_artifact(place)
        opened.masks()
        if "surgery.json" in files:
            ts.load_module(place, Net)
        deployed = ts.load(place)
        deployed.run(deployed.example)


def values() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.sampled_from(NUMBERS[:-2]), st.sampled_from([each for each in TEXTS if len(each) < 10_000]), st.sampled_from(DEEP),
        st.sampled_from(EXPRESSIONS), st.sampled_from(TARGETS), st.booleans(), st.none(), st.integers(-3, 9),
    )  # fmt: skip


@st.composite
def manifests(draw: st.DrawFn) -> Files:
    files = good("eager")
    return hashed(files, draw(mutated([json.loads(files["artifact.json"])], values=values())))


@st.composite
def surgeries(draw: st.DrawFn) -> Files:
    files = good("eager")
    return hashed(
        files | {"surgery.json": _dumped(draw(mutated([json.loads(files["surgery.json"])], values=values())))}
    )


@st.composite
def texts(draw: st.DrawFn) -> Files:
    files = good("eager")
    name = draw(st.sampled_from(("artifact.json", "surgery.json")))
    data = draw(garbled(st.just(files[name].decode()))).encode("utf-8", "surrogatepass")
    return hashed(files | {name: data}) if name == "surgery.json" else files | {name: data}


@st.composite
def programs(draw: st.DrawFn) -> Files:
    files = good("eager")
    entry = draw(st.sampled_from(("models/model.json",) * 4 + ("weights_config.json", "constants_config.json")))
    source, buffer = zipfile.ZipFile(io.BytesIO(files["model.pt2"])), io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", draw(st.sampled_from((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,)))
    ) as archive:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith(entry):
                data = _dumped(draw(mutated([json.loads(data)], values=values())))
            archive.writestr(name, data)
    return hashed(files | {"model.pt2": buffer.getvalue()})


@st.composite
def payloads(draw: st.DrawFn, runtime: str, names: tuple[str, ...]) -> Files:
    """Bytes changed, cut out and repeated in one of the files that a runtime or numpy parses."""
    files = good(runtime)
    name = draw(st.sampled_from(names))
    data = bytearray(files[name])
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        what = draw(st.sampled_from(("change", "change", "cut", "repeat", "end")))
        if what == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif what == "cut":
            del data[place : place + draw(st.integers(1, 64))]
        elif what == "repeat":
            data[place:place] = data[place : place + 64] * draw(st.integers(1, 20))
        else:
            del data[place:]
    return hashed(files | {name: bytes(data)})


def shown(files: Files) -> str:
    """What differs from the good artifact."""
    same = next((good(each) for each in KINDS_OF_GOOD if set(good(each)) == set(files)), {})
    return ", ".join(f"{name}: {data[:200]!r}" for name, data in files.items() if same.get(name) != data)


def _kind(name: str, examples: Any) -> Kind:
    return Kind(name=name, group="artifacts", examples=examples, attempt=attempt, shown=shown)


KINDS_OF_ARTIFACTS = (
    _kind("artifact.json", manifests()),
    _kind("surgery.json", surgeries()),
    _kind("artifact texts", texts()),
    _kind("artifact program", programs()),
    _kind(
        "artifact payloads", payloads("eager", ("model.pt2", "example.npz", "weights.safetensors", "masks.safetensors"))
    ),
    _kind("artifact onnx", payloads("onnxruntime", ("model.onnx",))),
)
