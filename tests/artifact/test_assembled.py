"""Models with deployed parts: they compute as PyTorch does, on the runtime, and are saved part by part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support.parted import (
    Branching,
    Cache,
    Counted,
    Decoder,
    Remembering,
    Speech,
    Translator,
    images,
    seeded,
    sentences,
)
from torchslim.artifact.assembled import DeployedParts
from torchslim.artifact.opened import open_artifact
from torchslim.core.files import sha256
from torchslim.errors import ArtifactError, DeployError, ExportError, SelectError, TaskError
from torchslim.graph.capturable import MOST_PROGRAMS

SLOW = settings(max_examples=8)


@pytest.fixture(scope="module")
def branching() -> tuple[nn.Module, DeployedParts]:
    model = seeded(Branching)
    deployed = ts.deploy(model, images(4)[:1], part=["backbone", "neck"], threads=1)
    assert isinstance(deployed, DeployedParts)
    return model, deployed


@pytest.fixture(scope="module")
def speech() -> tuple[nn.Module, Any]:
    model = seeded(Speech)
    return model, ts.deploy(model, [(torch.randn(2, 40),), (torch.randn(3, 50),)], part="encoder", runtime="eager")


@pytest.fixture(scope="module")
def translator() -> tuple[nn.Module, Any]:
    model = seeded(Translator)
    inputs = [{"method": "generate", "args": sentences(batch, length)[:1]} for batch, length in ((2, 5), (3, 7))]
    return model, ts.deploy(model, inputs, part=["encoder", "decoder"], runtime="eager")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved(branching: tuple[nn.Module, DeployedParts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ts.save(branching[1], tmp_path_factory.mktemp("parts") / "saved")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


# --- as PyTorch computes ---


@SLOW
@given(count=st.integers(1, 6), seed=st.integers(0, 100))
def test_a_branch_on_data_stays_in_python(branching: tuple[nn.Module, DeployedParts], count: int, seed: int) -> None:
    model, deployed = branching
    x, _ = images(count, seed=seed)
    with torch.no_grad():
        for signed in (x, -3 * x):
            assert close(deployed(signed), model(signed))


@SLOW
@given(count=st.integers(1, 4), length=st.integers(8, 90), seed=st.integers(0, 100))
def test_a_decoder_of_ctc_collapses_what_the_runtime_computes(
    speech: tuple[nn.Module, Any], count: int, length: int, seed: int
) -> None:
    model, deployed = speech
    x = torch.randn(count, length, generator=torch.Generator().manual_seed(seed))
    assert deployed(x) == model(x)


@SLOW
@given(count=st.integers(1, 4), length=st.integers(2, 9), steps=st.integers(1, 10))
def test_a_generation_with_a_cache_computes_all_steps_on_the_runtime(
    translator: tuple[nn.Module, Any], count: int, length: int, steps: int
) -> None:
    model, deployed = translator
    source, target = sentences(count, length, seed=steps)
    counted = Counted(deployed)
    generated = deployed.generate(source, steps)
    with torch.no_grad():
        assert torch.equal(generated, model.generate(source, steps))
        done = generated.shape[1] - 1
        expected = {"encoder": 1, "decoder": done - 1, "decoder#2": 1}
        assert counted.calls == expected, "the first step's cache is empty: it has a program of its own"
        assert close(deployed(source, target), model(source, target))


def test_a_saved_generation_computes_all_steps_on_the_runtime(
    translator: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    model, deployed = translator
    loaded: Any = ts.load(ts.save(deployed, tmp_path / "saved"), Translator)
    assert list(loaded.parts) == ["encoder", "decoder", "decoder#2"]
    counted, python = Counted(loaded), 0
    for count, length, steps in ((2, 5, 4), (4, 3, 6), (1, 9, 1)):
        source, _ = sentences(count, length, seed=steps)
        counted.calls.update(dict.fromkeys(loaded.parts, 0))
        expected = model.generate(source, steps)
        with mock.patch.object(Decoder, "forward", autospec=True, side_effect=Decoder.forward) as forward:
            generated = loaded.generate(source, steps)
        python += forward.call_count
        assert torch.equal(generated, expected)
        done = generated.shape[1] - 1
        assert counted.calls == {"encoder": 1, "decoder": done - 1, "decoder#2": 1}
    assert python == 1, "once in Python, to see how the first step changes an empty cache"


def test_structures_beyond_the_limit_run_in_python_and_are_noted() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: int = 1, *, shift: Tensor | None = None) -> Tensor:
            return self.layer(x) * scale + (0 if shift is None else shift)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Scaled()

        def forward(self, x: Tensor, scales: list[int]) -> Tensor:
            outputs = [self.part(x, scale=scale) for scale in scales]
            return torch.stack([*outputs, self.part(x, shift=outputs[0])])

    model = seeded(Uses)
    scales = [1, 1, 1, 2, 2, 3, 4, 5]
    deployed: Any = ts.deploy(model, (torch.randn(3, 4), scales), part="part", runtime="eager")
    assert list(deployed.parts) == ["part", *(f"part#{number}" for number in range(2, MOST_PROGRAMS + 1))]
    assert deployed.notes == ["part: calls with arguments of 2 other structures run in PyTorch, in float"]
    counted = Counted(deployed)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert close(deployed(x, [*scales, 6]), model(x, [*scales, 6]))
    assert counted.calls["part"] == 3
    assert sum(counted.calls.values()) == 7


def test_a_further_program_leaves_sizes_that_it_does_not_take_to_python(translator: tuple[nn.Module, Any]) -> None:
    model, _ = translator
    example: Any = {"method": "generate", "args": sentences(2, 5)[:1]}
    deployed: Any = ts.deploy(model, example, part="decoder", runtime="eager")
    counted = Counted(deployed)
    source, _ = sentences(2, 7)
    assert deployed.parts["decoder#2"].spec.sizes[1][1] == 5, "one example frees the batch alone"
    with pytest.raises(DeployError, match="memory"):
        deployed.generate(source, 3)
    assert counted.calls["decoder#2"] == 0
    assert torch.equal(deployed.generate(sentences(4, 5)[0], 1), model.generate(sentences(4, 5)[0], 1))
    assert counted.calls["decoder#2"] == 1


@pytest.fixture(scope="module")
def remembering() -> tuple[nn.Module, Any]:
    model = seeded(Remembering)
    return model, ts.deploy(model, [(torch.ones(2, 4, 8),), (torch.ones(3, 6, 8),)], part="step", runtime="eager")


@SLOW
@given(count=st.integers(1, 4), length=st.integers(1, 12), seed=st.integers(0, 100))
def test_an_object_that_is_written_in_place_and_not_returned_is_written(
    remembering: tuple[nn.Module, Any], count: int, length: int, seed: int
) -> None:
    model, deployed = remembering
    x = torch.randn(count, length, 8, generator=torch.Generator().manual_seed(seed))
    counted = Counted(deployed)
    with torch.no_grad():
        for sign, calls in ((1, length), (-1, 0)):  # another value in the object is another structure
            counted.calls["step"] = 0
            signed = x * x[:1, :1, :1].sign() * sign
            assert close(deployed(signed), model(signed))
            assert counted.calls["step"] == calls


def test_the_model_that_was_deployed_is_as_before(branching: tuple[nn.Module, DeployedParts]) -> None:
    model, _ = branching
    assert type(model.backbone) is type(Branching().backbone)
    state = seeded(Branching).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_outputs_come_without_gradients_in_eval_mode(branching: tuple[nn.Module, DeployedParts]) -> None:
    _, deployed = branching
    assert not deployed(images(2)[0]).requires_grad


def test_figures_are_those_of_all_parts(branching: tuple[nn.Module, DeployedParts]) -> None:
    _, deployed = branching
    assert deployed.size_bytes == sum(part.size_bytes or 0 for part in deployed.parts.values())
    assert (deployed.runtime, deployed.threads, deployed.quantized) == ("onnxruntime", 1, False)
    assert deployed.made_from is None
    assert "'backbone'" in repr(deployed)
    assert "'neck'" in repr(deployed)
    eager = deployed.on_eager(1)
    x, _ = images(3)
    assert eager.runtime == "eager"
    assert close(eager(x), deployed(x))


# --- refused ---


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ("backbon", SelectError, ("'backbon'", "backbone")),
        (["backbone", "backbone.0"], SelectError, ("overlap", "backbone.0")),
        ("low", TaskError, ("'low'", "never called")),
        ("", SelectError, ("empty",)),
    ],
)
def test_wrong_parts_are_named(part: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    class Never(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.high(self.backbone(x))

    with pytest.raises(error) as caught:
        ts.deploy(seeded(Never), images(2)[:1], part=part, runtime="eager")
    assert all(word in str(caught.value) for word in words)


class Fresh(Decoder):
    """Returns a cache of its own."""

    def forward(self, token: Tensor, memory: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        own = Cache()
        own.keys, own.values = list(cache.keys), list(cache.values)
        return super().forward(token, memory, own)


class Counting(Decoder):
    """Counts the steps in a number of the cache."""

    def forward(self, token: Tensor, memory: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        cache.steps = getattr(cache, "steps", 0) + 1  # type: ignore[attr-defined]
        return super().forward(token, memory, cache)


class Appending(Decoder):
    """Keeps the tokens, too, one tensor a step."""

    def forward(self, token: Tensor, memory: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        cache.tokens = [*getattr(cache, "tokens", []), token]  # type: ignore[attr-defined]
        return super().forward(token, memory, cache)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Fresh, ("Fresh", "Cache", "makes itself")),
        (Counting, ("Counting", ".steps")),
        (Appending, ("Appending", "Cache", "adds or removes")),
    ],
)
def test_what_a_program_cannot_do_to_an_object_is_named(kind: type[Decoder], words: tuple[str, ...]) -> None:
    model: Any = seeded(Translator)
    model.decoder.__class__ = kind
    inputs: Any = {"method": "generate", "args": sentences(2, 5)[:1]}
    with pytest.raises(ExportError) as caught:
        ts.deploy(model, inputs, part="decoder", runtime="eager")
    assert all(word in str(caught.value) for word in words), caught.value


# --- saved ---


def test_a_part_and_the_whole_load_as_they_were_saved(saved: Path, branching: tuple[nn.Module, DeployedParts]) -> None:
    _, deployed = branching
    x, _ = images(5)
    whole = ts.load(saved, Branching)
    assert torch.equal(whole(x), deployed(x)), "the weights of the rest come from the artifact"
    assert torch.equal(ts.load(saved, part="backbone")(x), deployed.parts["backbone"](x))
    rebuilt = ts.load_module(saved, Branching)
    state = branching[0].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in rebuilt.state_dict().items())
    assert ts.load(saved, part="neck", runtime="eager").runtime == "eager"


def test_the_files_of_parts_are_artifacts_of_their_own(saved: Path) -> None:
    for part in ("backbone", "neck"):
        folder = saved / "parts" / part
        assert (folder / "model.onnx").is_file()
        assert ts.load(folder).runtime == "onnxruntime"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ("'backbone'", "'neck'", "factory")),
        ({"part": "head"}, ("'head'", "'backbone'")),
        ({"part": "neck", "factory": Branching}, ("factory", "part", "not both")),
    ],
)
def test_what_to_load_must_be_clear(saved: Path, arguments: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ArtifactError) as caught:
        ts.load(saved, **arguments)
    assert all(word in str(caught.value) for word in words)


def test_a_factory_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises((ArtifactError, SelectError)):
        ts.load(saved, Speech)


def test_a_whole_model_takes_neither_part_nor_factory(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ts.save(ts.deploy(model, (torch.ones(1, 2),), runtime="eager"), tmp_path / "whole")
    with pytest.raises(ArtifactError, match="'0'.*whole model"):
        ts.load(tmp_path / "whole", part="0")
    with pytest.raises(ArtifactError, match="factory"):
        ts.load(tmp_path / "whole", lambda: model)


def test_one_part_needs_no_name(speech: tuple[nn.Module, Any], tmp_path: Path) -> None:
    _, deployed = speech
    ts.save(deployed, tmp_path / "speech")
    x = torch.randn(2, 33)
    assert torch.equal(ts.load(tmp_path / "speech")(x), deployed.parts["encoder"](x))


def test_another_model_replaces_the_parts(tmp_path: Path, saved: Path, speech: tuple[nn.Module, Any]) -> None:
    folder = shutil.copytree(saved, tmp_path / "a")
    (folder / "parts" / "backbone" / "mine.txt").write_text("notes")
    ts.save(speech[1], folder)
    assert (folder / "parts" / "backbone" / "mine.txt").read_text() == "notes", "files of others stay"
    assert not (folder / "parts" / "neck").exists()
    assert sorted(path.name for path in (folder / "parts" / "backbone").iterdir()) == ["mine.txt"]
    ts.load(folder)
    ts.save(ts.deploy(nn.Linear(2, 2), (torch.ones(1, 2),), runtime="eager"), folder)
    assert not (folder / "parts" / "encoder").exists()


# --- tampered with ---


@pytest.mark.parametrize("name", ["parts/backbone/model.onnx", "parts/neck/artifact.json", "parts/neck/example.npz"])
def test_a_changed_file_of_a_part_is_refused(copied: Path, name: str) -> None:
    with (copied / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ArtifactError, match=r"changed"):
        ts.load(copied, part="backbone")


@pytest.mark.parametrize("name", ["parts", "parts/backbone", "parts/backbone/model.onnx"])
def test_links_are_not_followed(copied: Path, name: str) -> None:
    moved = (copied / name).rename(copied.parent / "moved")
    (copied / name).symlink_to(moved)
    with pytest.raises(ArtifactError, match="link"):
        ts.load(copied, part="backbone")
    with pytest.raises(ArtifactError):
        ts.load_module(copied, Branching)


@pytest.mark.parametrize(
    "name", ["parts/../../outside", "parts/../model.onnx", "../parts/x/model.onnx", "parts/a/b/model.onnx",
             "other/a/model.onnx", "parts//model.onnx", "/parts/a/model.onnx", "parts/backbone"],
)  # fmt: skip
def test_a_manifest_names_files_of_parts_alone(copied: Path, name: str) -> None:
    manifest = json.loads((copied / "artifact.json").read_text())
    manifest["files"][name] = "0" * 64
    (copied / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside its folder|changed"):
        open_artifact(copied)


@pytest.mark.parametrize("folder", ["../elsewhere", "..", "absent"])
def test_a_part_is_a_folder_that_is_listed(copied: Path, folder: str) -> None:
    manifest = json.loads((copied / "artifact.json").read_text())
    manifest["parts"]["backbone"] = folder
    (copied / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="part"):
        open_artifact(copied)


def test_a_nested_manifest_lists_the_files_that_the_outer_one_lists(copied: Path) -> None:
    inner = copied / "parts" / "backbone" / "artifact.json"
    manifest = json.loads(inner.read_text())
    manifest["files"]["model.onnx"] = "0" * 64
    inner.write_text(json.dumps(manifest))
    outer = json.loads((copied / "artifact.json").read_text())
    outer["files"]["parts/backbone/artifact.json"] = sha256(inner)
    (copied / "artifact.json").write_text(json.dumps(outer))
    with pytest.raises(ArtifactError):
        ts.load(copied, part="backbone")


def test_a_signature_covers_the_parts(branching: tuple[nn.Module, DeployedParts], tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    folder = ts.save(branching[1], tmp_path / "signed", key=key)
    x, _ = images(2)
    assert torch.equal(ts.load(folder, Branching, public_key=key.public_key())(x), branching[1](x))
    ts.load(folder, part="neck", public_key=key.public_key())
    with pytest.raises(ArtifactError, match="sign"):
        ts.load(folder, part="neck", public_key=other.public_key())


# --- on the command line ---


def test_kernels_and_bench_take_an_artifact_with_parts(call: Any, saved: Path) -> None:
    printed = call("kernels", saved)
    assert printed.code == 0, printed.err
    assert "backbone.0" in printed.out
    assert "neck.2" in printed.out
    printed = call("bench", saved, "--rounds", 3)
    assert printed.code == 0, printed.err
    for part in ("backbone", "neck"):
        assert part in printed.out
