"""Artifacts: what is saved is read back bit for bit, and what was tampered with is not read at all."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support.deployment_models import (
    ROOT,
    Structured,
    TokenClassifier,
    TwoInputs,
    architectures,
    fresh_python,
    trained_conv,
)
from torchslim.artifact import loading, storage, writing
from torchslim.artifact.latency import Timings
from torchslim.artifact.opened import open_artifact
from torchslim.artifact.state import pack_masks
from torchslim.artifact.storage import write_artifact
from torchslim.core.archives import read_masks
from torchslim.core.files import digest, sha256
from torchslim.core.isolation import quiet
from torchslim.errors import (
    ArtifactError,
    DeployError,
    ExportError,
    RecipeError,
    RuntimeUnavailable,
    StorageError,
)
from torchslim.graph.export import capture
from torchslim.quantize import static
from torchslim.runtimes.pt2 import load_program, pack_program

KINDS = (
    "eager-float", "eager-int8", "onnxruntime-float", "onnxruntime-int8", "openvino-float", "openvino-int8",
    "executorch-float", "executorch-int8",
)  # fmt: skip


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of each kind, in folders by name, with the input and the outputs of this process."""
    folder = tmp_path_factory.mktemp("artifacts")
    model = trained_conv()
    quantized = static(model, [(images(16),)])
    for kind in KINDS:
        runtime, _, precision = kind.partition("-")
        deployed = ts.deploy(quantized if precision == "int8" else model, (images(3),), runtime=runtime, threads=1)
        ts.save(deployed, folder / kind)
        np.save(folder / f"{kind}.npy", deployed(images(5)).numpy())
    np.save(folder / "x.npy", images(5).numpy())
    return folder


@pytest.fixture
def float_copy(saved: Path, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return shutil.copytree(saved / "eager-float", tmp_path / "copy")


# --- round trips ---

FRESH = """
import sys, numpy as np, torch, torchslim as ts
folder = sys.argv[1]
x = torch.from_numpy(np.load(folder + "/x.npy"))
for kind in sys.argv[2:]:
    deployed = ts.load(f"{folder}/{kind}")
    assert deployed.runtime == kind.partition("-")[0]
    assert deployed.threads == 1
    assert deployed.quantized == kind.endswith("int8")
    print(kind, np.array_equal(deployed(x).numpy(), np.load(f"{folder}/{kind}.npy")))
"""


@pytest.mark.slow
def test_outputs_in_a_fresh_process_are_bitwise_the_same(saved: Path) -> None:
    done = fresh_python(FRESH, saved, *KINDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{kind} True" for kind in KINDS]


@pytest.mark.slow
def test_an_artifact_compiles_for_another_runtime(saved: Path) -> None:
    deployed = ts.load(saved / "eager-int8", runtime="onnxruntime", threads=2)
    assert (deployed.runtime, deployed.threads) == ("onnxruntime", 2)
    expected = torch.from_numpy(np.load(saved / "eager-int8.npy"))
    assert torch.allclose(deployed(images(5)), expected, atol=0.1)
    with pytest.raises(RecipeError, match="not known"):
        ts.load(saved / "eager-int8", runtime="tensorrt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "names"), [("onnxruntime-int8", ["model.onnx"]), ("openvino-int8", ["model.xml", "model.bin"])]
)
def test_a_loaded_artifact_can_be_saved_again(kind: str, names: list[str], saved: Path, tmp_path: Path) -> None:
    first = ts.load(saved / kind)
    ts.save(first, tmp_path / "again")
    for name in (*names, "model.pt2"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / kind / name).read_bytes()
    assert ts.load(tmp_path / "again").spec == first.spec


@pytest.mark.slow
def test_calls_and_answers_keep_their_structure(tmp_path: Path) -> None:
    ids = torch.randint(20, (3, 6))
    model = TokenClassifier().eval()
    ts.save(model, tmp_path / "tokens", example_inputs=(ids,))
    answer = ts.load(tmp_path / "tokens")(ids, mask=None)
    assert list(answer) == ["logits", "hidden", "classes"]
    assert torch.allclose(answer["hidden"][0], model(ids)["hidden"][0], atol=1e-6)

    batch = {"x": torch.randn(3, 4), "extra": (torch.randn(3, 4), 2.0)}
    ts.save(Structured(), tmp_path / "structured", example_inputs=(batch,))
    answer = ts.load(tmp_path / "structured")(batch)
    assert answer.logits.shape == (3, 3)
    assert answer.values is None, "a field, where the class is not known"


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def last_channels(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": trained_conv,
    "tied": Tied,
    "channels last": lambda: last_channels(trained_conv()),
    "channels last 3d": lambda: nn.Conv3d(2, 3, 2).to(memory_format=torch.channels_last_3d),  # type: ignore[call-overload]
    "half": lambda: trained_conv().half(),
    "bfloat16": lambda: trained_conv().bfloat16(),
    "double": lambda: trained_conv().double(),
    "mixed": lambda: nn.Sequential(nn.Linear(3, 4).half(), nn.Linear(4, 2)),
    "empty": lambda: nn.Sequential(nn.ReLU()),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    model = MODULES[name]()
    ts.save(model, tmp_path / "weights")

    def factory() -> nn.Module:
        torch.manual_seed(99)
        fresh: nn.Module = type(model)(*model) if isinstance(model, nn.Sequential) else MODULES[name]()
        fresh = fresh.float()
        for value in (*fresh.parameters(), *fresh.buffers()):
            value.data = torch.zeros_like(value, memory_format=torch.contiguous_format)
        return fresh

    loaded = ts.load_module(tmp_path / "weights", MODULES[name] if name == "mixed" else factory)

    mine, theirs = model.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype
        if min(value.shape, default=1) > 1:  # where a size is 1 its stride means nothing
            assert value.stride() == theirs[key].stride()
        assert torch.equal(value, theirs[key])
    if name == "tied":
        assert loaded.head.weight is loaded.embed.weight
        stored = open_artifact(tmp_path / "weights").read("weights.safetensors")
        assert len(stored) < 1.9 * 7 * 4 * 4, "the shared tensor is stored once"


def test_a_factory_of_another_architecture_is_told_apart(tmp_path: Path) -> None:
    ts.save(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), tmp_path / "weights")
    with pytest.raises(ArtifactError, match=r"missing: none; unknown: 1.bias, 1.weight; other shapes: none"):
        ts.load_module(tmp_path / "weights", lambda: nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(ArtifactError, match=r"missing: 2.bias, 2.weight; .*0.weight \(3, 5\) instead of \(3, 4\)"):
        ts.load_module(tmp_path / "weights", lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2), nn.Linear(2, 2)))


def test_a_factory_that_ties_what_differs_is_refused(tmp_path: Path) -> None:
    ts.save(Tied(tied=False), tmp_path / "weights")
    with pytest.raises(ArtifactError, match="ties 'embed.weight' and 'head.weight', which differ"):
        ts.load_module(tmp_path / "weights", Tied)
    ts.save(Tied(tied=True), tmp_path / "tied")
    loose = ts.load_module(tmp_path / "tied", lambda: Tied(tied=False))
    assert torch.equal(loose.embed.weight, loose.head.weight)  # type: ignore[union-attr,arg-type]


@given(
    st.dictionaries(st.text("ab.", min_size=1), st.lists(st.integers(0, 7), max_size=3), max_size=3),
    st.integers(),
)
def test_masks_are_packed_into_bits_and_back(shapes: dict[str, list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    masks = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}
    data, stored = pack_masks(masks)
    unpacked = read_masks(data, json.loads(json.dumps(stored)), "masks")
    assert list(unpacked) == list(masks)
    for name, mask in masks.items():
        assert unpacked[name].dtype == torch.bool
        assert torch.equal(unpacked[name], mask)


def test_masks_take_an_eighth_of_a_byte_each(tmp_path: Path) -> None:
    masks = {"weight": torch.rand(64, 1024) < 0.5}
    ts.save(nn.Linear(4, 2), tmp_path / "a", masks=masks)
    opened = open_artifact(tmp_path / "a")
    assert len(opened.read("masks.safetensors")) < 64 * 1024 / 8 + 200
    assert torch.equal(opened.masks()["weight"], masks["weight"])
    ts.save(nn.Linear(4, 2), tmp_path / "b")
    assert open_artifact(tmp_path / "b").masks() == {}


def test_weights_alone_are_no_program_and_a_program_no_weights(saved: Path, tmp_path: Path) -> None:
    ts.save(nn.Linear(4, 2), tmp_path / "weights")
    with pytest.raises(ArtifactError, match="weights only.*ts.load_module"):
        ts.load(tmp_path / "weights")
    with pytest.raises(ArtifactError, match="no weights.*program.*ts.load"):
        ts.load_module(saved / "eager-float", trained_conv)


@pytest.mark.slow
def test_a_module_with_example_inputs_is_both(tmp_path: Path) -> None:
    model = trained_conv()
    ts.save(model, tmp_path / "both", example_inputs=(images(),))
    assert torch.equal(ts.load(tmp_path / "both")(images(5)), ts.deploy(model, (images(),), runtime="eager")(images(5)))
    assert torch.equal(ts.load_module(tmp_path / "both", nn_factory)(images(5)), model(images(5)))


def nn_factory() -> nn.Module:
    return trained_conv(seed=7)


def test_a_quantized_model_is_saved_as_its_program(tmp_path: Path) -> None:
    quantized = static(nn.Linear(4, 3), [(torch.randn(8, 4),)])
    with pytest.raises(ArtifactError, match="give example inputs"):
        ts.save(quantized, tmp_path / "a")
    ts.save(quantized, tmp_path / "a", example_inputs=(torch.randn(2, 4),))
    assert not (tmp_path / "a" / "weights.safetensors").exists()
    x = torch.randn(5, 4)
    assert torch.equal(ts.load(tmp_path / "a")(x), quantized(x))


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(ArtifactError, match="state '_extra_state' is a dict, only tensors"):
        ts.save(Extra(2, 2), tmp_path / "a")


# --- what is not trusted ---


def test_every_byte_that_changes_is_noticed(float_copy: Path) -> None:
    """Any file of the artifact, first, middle and last byte, the manifest included."""
    for path in sorted(float_copy.iterdir()):
        original = path.read_bytes()
        for position in (0, len(original) // 2, len(original) - 2):
            damaged = bytearray(original)
            damaged[position] ^= 1
            path.write_bytes(bytes(damaged))
            with pytest.raises(ArtifactError, match="copy"):
                ts.load(float_copy)
        path.write_bytes(original)
    ts.load(float_copy)


def test_truncated_and_missing_files_are_noticed(float_copy: Path) -> None:
    for path in sorted(float_copy.iterdir()):
        original = path.read_bytes()
        path.write_bytes(original[: len(original) // 2])
        with pytest.raises(ArtifactError, match="truncated or changed|damaged"):
            ts.load(float_copy)
        path.unlink()
        with pytest.raises(ArtifactError, match="is missing|has no artifact.json"):
            ts.load(float_copy)
        path.write_bytes(original)


def test_a_file_that_changes_after_it_was_opened_is_noticed(float_copy: Path) -> None:
    deployed = ts.load(float_copy)
    (float_copy / "model.pt2").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="changed.*opened"):
        deployed.program.pack()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other", "version": 1, "files": {}}', "\xff"])
def test_other_manifests_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "artifact.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"artifact.json is damaged"):
        ts.load(tmp_path)


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_folders_without_an_artifact_are_refused(where: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a torchslim artifact.*artifact.json"):
        ts.load(tmp_path / where)


def rewritten(folder: Path, **changes: Any) -> None:
    """A manifest as somebody would write it who knows the format."""
    path = folder / "artifact.json"
    manifest = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"} | changes
    path.write_text(json.dumps(manifest | {"digest": digest(manifest)}))


def test_a_newer_format_asks_for_an_upgrade(float_copy: Path) -> None:
    rewritten(float_copy, version=2)
    with pytest.raises(ArtifactError, match="version 2.*up to 1.*upgrade"):
        ts.load(float_copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link", "sub/../../outside", ""])
def test_files_outside_the_folder_are_not_read(name: str, float_copy: Path) -> None:
    outside = float_copy.parent / "outside"
    outside.write_bytes(b"secret")
    (float_copy / "link").symlink_to(outside)
    known = json.loads((float_copy / "artifact.json").read_text())["files"]
    rewritten(float_copy, files={**known, name: sha256(outside)})
    with pytest.raises(ArtifactError, match="file outside"):
        ts.load(float_copy)


@pytest.mark.parametrize("spec", [{"unknown": 1}, {}])
def test_a_spec_of_another_form_is_refused(spec: dict[str, Any], float_copy: Path) -> None:
    rewritten(float_copy, spec=spec)
    with pytest.raises(ArtifactError, match="is damaged"):
        ts.load(float_copy)


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def honest() -> bytes:
    return pack_program(capture(nn.Linear(4, 2), (torch.randn(3, 4),)).program)


def edited(data: bytes, entries: dict[str, bytes], program: Callable[[dict[str, Any]], None] | None = None) -> bytes:
    """A `.pt2` with other or additional entries."""
    source = zipfile.ZipFile(io.BytesIO(data))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in source.namelist():
            if name in entries:
                continue
            content = source.read(name)
            if program is not None and name.endswith("models/model.json"):
                parsed = json.loads(content)
                program(parsed)
                content = json.dumps(parsed).encode()
            archive.writestr(name, content)
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved_pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def weights_config(data: bytes) -> bytes:
    config = json.loads(zipfile.ZipFile(io.BytesIO(data)).read("archive/data/weights/model_weights_config.json"))
    for each in config["config"].values():
        each["use_pickle"] = True
    return json.dumps(config).encode()


def evil_programs(honest: bytes, marker: Path) -> dict[str, bytes]:
    """Ways to make `torch.export.load`, or the first use of what it gives, run code."""
    attack = saved_pickle((Evil(marker),))
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    custom = json.dumps(
        {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    )
    samples = saved_pickle(((torch.zeros(2, 4),), {}))

    def guards(program: dict[str, Any]) -> None:
        program["guards_code"] = [f"{code} is None"]

    def expression(program: dict[str, Any]) -> None:
        values = program["graph_module"]["graph"]["tensor_values"].values()
        size = next(size for each in values for size in each["sizes"] if "as_expr" in size)
        size["as_expr"]["expr_str"] = code

    def operation(program: dict[str, Any]) -> None:
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.os.system"

    def naming(program: dict[str, Any]) -> None:
        text = json.dumps(program).replace('"linear"', json.dumps(f"x = 1; {code}; linear"))
        program.clear()
        program.update(json.loads(text))

    return {
        "sample inputs": edited(honest, {"archive/data/sample_inputs/model.pt": attack}),
        "legacy weights": edited(honest, {"archive/data/weights/model.pt": attack}),
        "legacy constants": edited(honest, {"archive/data/constants/model.pt": attack}),
        "pickled weights": edited(
            honest,
            {
                "archive/data/weights/model_weights_config.json": weights_config(honest),
                "archive/data/weights/weight_0": attack,
            },
        ),
        "opaque object": edited(
            honest,
            {
                "archive/data/constants/opaque_obj_0": pickle.dumps(Evil(marker)),
                "archive/data/constants/model_constants_config.json": custom.encode(),
            },
        ),
        "opaque object in capitals": edited(
            honest,
            {
                "archive/data/constants/OPAQUE_OBJ_0": pickle.dumps(Evil(marker)),
                "archive/data/constants/model_constants_config.json": custom.encode(),
            },
        ),
        "native code": edited(honest, {"archive/data/aotinductor/model/model.so": b"\x7fELF"}),
        "twice": edited(honest, {}) + edited(honest, {"archive/data/sample_inputs/model.pt": attack}),
        "guards": edited(honest, {"archive/data/sample_inputs/model.pt": samples}, guards),
        "expression": edited(honest, {}, expression),
        "operation": edited(honest, {}, operation),
        "names": edited(honest, {}, naming),
        "old format": old_format(attack),
        "a plain pickle": attack,
        "no archive": b"PK",
    }


def old_format(attack: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("version", "8.20")
        for name in ("state_dict.pt", "constants.pt", "example_inputs.pt", "exported_program.json"):
            archive.writestr(f"serialized_{name}", attack)
    return buffer.getvalue()


EVIL = (
    "sample inputs", "legacy weights", "legacy constants", "pickled weights", "opaque object",
    "opaque object in capitals", "native code", "twice", "guards", "expression", "operation", "names", "old format",
    "a plain pickle", "no archive",
)  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_a_program_that_would_run_code_is_refused_and_nothing_runs(name: str, honest: bytes, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    with pytest.raises(ArtifactError, match=r"\.pt2"):
        load_program(io.BytesIO(evil_programs(honest, marker)[name])).module()(torch.zeros(3, 4))
    assert not marker.exists(), "code ran"


def test_guards_are_dropped(honest: bytes, tmp_path: Path) -> None:
    """They are Python text that torch would execute; the sizes of a call are checked without them."""
    data = edited(honest, {}, lambda program: program.update(guards_code=["undefined()"]))
    assert load_program(io.BytesIO(data))._guards_code == []


def test_the_attacks_are_real(honest: bytes, tmp_path: Path) -> None:
    """torch itself runs what is refused above; when it no longer does, the checks can go."""
    ran = {}
    for name in (
        "sample inputs",
        "legacy weights",
        "pickled weights",
        "opaque object",
        "guards",
        "expression",
    ):
        marker = tmp_path / name
        with quiet(), suppress(Exception):  # most fail after they have run
            torch.export.load(io.BytesIO(evil_programs(honest, marker)[name])).module()(torch.zeros(3, 4))
        ran[name] = marker.exists()
    assert all(ran.values()), ran


def test_an_artifact_with_such_a_program_is_refused(honest: bytes, float_copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    (float_copy / "model.pt2").write_bytes(evil_programs(honest, marker)["sample inputs"])
    known = json.loads((float_copy / "artifact.json").read_text())["files"]
    rewritten(float_copy, files={**known, "model.pt2": sha256(float_copy / "model.pt2")})
    with pytest.raises(ArtifactError, match="pickled sample inputs"):
        ts.load(float_copy)
    assert not marker.exists()


def test_example_arrays_are_not_unpickled(float_copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    with (float_copy / "example.npz").open("wb") as file:
        np.savez(file, in000=np.array([Evil(marker)], dtype=object))
    known = json.loads((float_copy / "artifact.json").read_text())["files"]
    rewritten(float_copy, files={**known, "example.npz": sha256(float_copy / "example.npz")})
    with pytest.raises(ArtifactError, match=r"example.npz cannot be read"):
        ts.load(float_copy)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures())
def test_every_program_that_is_saved_passes_the_check(name: str) -> None:
    model, inputs = architectures()[name]
    captured = capture(model, inputs)
    program = load_program(io.BytesIO(pack_program(captured.program)))
    assert len(program.state_dict) == len(captured.program.state_dict)


def test_odd_names_of_modules_pass_the_check() -> None:
    model = nn.ModuleDict({"a-b c(1)": nn.Linear(4, 2), "größe": nn.Linear(2, 2)})
    model.forward = lambda x: model["größe"](model["a-b c(1)"](x))  # type: ignore[method-assign]
    x = torch.randn(3, 4)
    data = pack_program(capture(model, (x,)).program)
    assert torch.allclose(load_program(io.BytesIO(data)).module()(x)[0], model(x), atol=1e-6)


def test_what_cannot_be_read_back_is_not_written() -> None:
    quote = nn.ModuleDict({'a"b': nn.Linear(4, 2)})
    quote.forward = quote['a"b'].forward  # type: ignore[method-assign]
    with pytest.raises(ExportError, match="cannot be saved as a .pt2"):
        pack_program(capture(quote, (torch.randn(3, 4),)).program)


# --- writing ---


def test_foreign_folders_and_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="torchslim did not save"):
        ts.save(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ArtifactError, match="is a file.*folder"):
        ts.save(nn.Linear(2, 2), tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_saving_over_an_artifact_leaves_nothing_of_it(saved: Path, tmp_path: Path) -> None:
    """A stale model.onnx beside a new model.pt2 would be taken for the model; a user's own file stays."""
    folder = shutil.copytree(saved / "onnxruntime-float", tmp_path / "copy")
    (folder / "notes.txt").write_text("mine")
    ts.save(ts.load(saved / "eager-int8"), folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "artifact.json", "bench.py", "example.npz", "model.pt2", "notes.txt",
    ]  # fmt: skip
    assert ts.load(folder).quantized


def test_what_a_killed_save_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "a" / writing.STAGING).mkdir(parents=True)
    (tmp_path / "a" / writing.STAGING / "model.pt2").write_bytes(b"half")
    ts.save(nn.Linear(2, 2), tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "artifact.json",
        "weights.safetensors",
    ]


FULL_DISK = """
import resource, sys, torch, torchslim as ts
from torch import nn
folder, limit = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    ts.save(nn.Linear(100, 100), folder)
except ts.TorchslimError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_on_a_full_disk_the_old_artifact_is_kept(tmp_path: Path) -> None:
    model = nn.Linear(10, 10)
    folder = ts.save(model, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    done = fresh_python(FULL_DISK, folder, 20_000)

    assert done.stdout.startswith("StorageError cannot write "), done.stderr
    assert re.search("space.*folder", done.stdout)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(ts.load_module(folder, lambda: nn.Linear(10, 10)).weight, model.weight)  # type: ignore[arg-type]


def test_a_failed_rename_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        ts.save(nn.Linear(2, 2), tmp_path / "a")


def test_more_files_are_hashed_too(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", module=nn.Linear(2, 2), extra={"run.json": b"{}"})
    assert open_artifact(tmp_path / "a").read("run.json") == b"{}"
    with pytest.raises(ArtifactError, match="no report.html.*without"):
        open_artifact(tmp_path / "a").read("report.html")
    (tmp_path / "a" / "run.json").write_bytes(b"[]")
    with pytest.raises(ArtifactError, match="changed.*saved"):
        open_artifact(tmp_path / "a")


def test_another_instruction_set_is_warned_of(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "instruction_set", lambda: "elsewhere")
    with pytest.warns(UserWarning, match="elsewhere.*int8.*slower"):
        ts.load(saved / "eager-int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ts.load(saved / "eager-float")


@pytest.mark.parametrize(
    ("name", "command"),
    [("onnxruntime", "pip install onnx onnxscript onnxruntime"), ("openvino", "pip install 'torchslim[openvino]'")],
)
def test_a_missing_runtime_says_what_to_install(
    name: str, command: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeUnavailable, match=re.escape(command)):
        ts.load(saved / f"{name}-float")


def test_timings_become_rows() -> None:
    timings = Timings({"a": [2.0, 2.0, 2.0], "b": [1.0, 1.0, 1.0]})
    first, second = storage.render_timings(timings, "a")
    assert first["speedup"]["verdict"] == "no difference"
    assert second["latency_ms"] == {"median": 1.0, "p10": 1.0, "p90": 1.0, "rounds": 3}
    assert (second["speedup"]["median"], second["speedup"]["verdict"]) == (2.0, "faster")


# --- the benchmark inside ---


def bench(folder: Path, *arguments: str, poisoned: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run an artifact's bench.py elsewhere; importing one of the poisoned modules fails."""
    poison = folder.parent / "poison"
    home = folder.parent / "home"
    for each in (poison, home):
        each.mkdir(exist_ok=True)
    for name in poisoned:
        (poison / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    done = subprocess.run(
        [sys.executable, folder / "bench.py", "--rounds", "3", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder.parent,
        env={"PYTHONPATH": str(poison), "PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnxruntime-float", "onnxruntime-int8", "openvino-float", "openvino-int8"])
def test_an_artifact_of_another_runtime_is_timed_without_torch(kind: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / kind, tmp_path / "moved")
    found = bench(folder, "--batch", "4", "--threads", "1", poisoned=("torch", "torchslim", "torchao"))
    assert found["largest_difference_to_recorded_outputs"] == 0
    assert found["inputs"] == [[4, 3, 8, 8]]
    assert found["threads"] == 1
    assert found["latency_ms"]["rounds"] == 3
    assert 0 < found["latency_ms"]["p10"] <= found["latency_ms"]["median"] <= found["latency_ms"]["p90"]
    assert not (tmp_path / "home" / "intel").exists(), "importing openvino wrote into the user's home"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eager-int8", "executorch-float", "executorch-int8"])
def test_an_artifact_that_needs_torch_is_timed_without_torchslim(kind: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / kind, tmp_path / "moved")
    found = bench(folder, poisoned=("torchslim", "onnxruntime"))
    # one sample, recorded with three: another kernel may round the last layer's input by one step
    bound = 0.01 if kind == "executorch-int8" else 1e-6
    assert found["largest_difference_to_recorded_outputs"] <= bound
    assert found["inputs"] == [[1, 3, 8, 8]]


@pytest.mark.slow
def test_keyword_only_inputs_and_bfloat16_are_timed_too(tmp_path: Path) -> None:
    """A program takes flat tensors in order, whatever the model's forward looks like."""
    inputs = {"left": torch.randn(3, 4).bfloat16(), "right": torch.randn(3, 5).bfloat16()}
    folder = ts.save(TwoInputs().bfloat16(), tmp_path / "two", example_inputs=inputs)
    found = bench(folder, poisoned=("torchslim",))
    assert found["largest_difference_to_recorded_outputs"] == 0
    assert found["inputs"] == [[1, 4], [1, 5]]


def test_the_benchmark_refuses_nonsense(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, saved / "onnxruntime-float" / "bench.py", "--batch", "0"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.search("rounds, batch and threads.*at least 1", done.stderr)


def test_the_spec_still_checks_a_loaded_models_calls(saved: Path) -> None:
    with pytest.raises(DeployError, match=r"input 'x' must have the shape \(any, 3, 8, 8\)"):
        ts.load(saved / "onnxruntime-int8")(torch.randn(2, 3, 9, 9))


class BitwiseMasks(nn.Module):
    """Masks joined by operators, which are operations of their own: `aten.__and__` and its kin."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        kept = ((one & two) | (one ^ two)) & True
        return self.layer(x).masked_fill(~kept, 0)


def test_operators_on_masks_are_saved_and_loaded(tmp_path: Path) -> None:
    inputs = (torch.randn(3, 4), torch.rand(3, 4) > 0.5, torch.rand(3, 4) > 0.5)
    model = BitwiseMasks()
    deployed = ts.deploy(model, inputs, runtime="eager")
    ts.save(deployed, tmp_path / "out")
    assert torch.equal(ts.load(tmp_path / "out")(*inputs), model(*inputs))
