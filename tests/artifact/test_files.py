"""What an artifact may do to files: saving removes its own alone, loading follows no link, a signature tells whose it is."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn

import torchslim as ts
from tests.mutations import Kind
from tests.mutations.artifacts import KINDS_OF_ARTIFACTS
from tests.support.artifacts import listed, rewritten
from torchslim.artifact import loading
from torchslim.artifact.opened import open_artifact
from torchslim.artifact.writing import STAGING
from torchslim.core import folder_lock
from torchslim.core.archives import read_arrays, unzip
from torchslim.errors import ArtifactError, RuntimeUnavailable, StorageError


def linear() -> nn.Module:
    return nn.Linear(4, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return ts.save(linear(), tmp_path / "a")


@pytest.mark.parametrize(
    "name", ["../mine.txt", "sub/mine.txt", "sub/../../mine.txt", "{outside}", ".saving/../../mine.txt"]
)
def test_saving_deletes_nothing_outside_of_its_folder(name: str, folder: Path) -> None:
    outside = folder.parent / "mine.txt"
    for path in (outside, folder / "sub" / "mine.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    listed(folder, name.replace("{outside}", str(outside)), outside)
    ts.save(linear(), folder)
    assert outside.read_text() == (folder / "sub" / "mine.txt").read_text() == "mine"


def test_saving_deletes_only_files_that_have_the_recorded_hash(folder: Path) -> None:
    for name in ("kept.txt", "gone.txt"):
        (folder / name).write_text("as recorded")
        listed(folder, name)
    (folder / "kept.txt").write_text("changed by the user")
    ts.save(linear(), folder)
    assert (folder / "kept.txt").read_text() == "changed by the user"
    assert not (folder / "gone.txt").exists()


def test_saving_follows_no_links(folder: Path) -> None:
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    (outside / "weights.safetensors").write_text("mine")
    (outside / "notes.txt").write_text("mine")
    (folder / STAGING).symlink_to(outside)
    (folder / f"{STAGING}-x").symlink_to(outside)
    (folder / "weights.safetensors").unlink()
    (folder / "weights.safetensors").symlink_to(outside / "weights.safetensors")
    (folder / "link.txt").symlink_to(outside / "notes.txt")
    listed(folder, "link.txt")
    ts.save(linear(), folder)
    assert sorted(path.name for path in outside.iterdir()) == ["notes.txt", "weights.safetensors"]
    assert {path.read_text() for path in outside.iterdir()} == {"mine"}
    assert not (folder / "weights.safetensors").is_symlink()
    ts.load_module(folder, linear)


def test_a_staging_folder_with_files_of_the_user_stays(folder: Path) -> None:
    (folder / STAGING).mkdir()
    for name in ("notes.txt", "model.pt2"):
        (folder / STAGING / name).write_text("half")
    ts.save(linear(), folder)
    assert [path.name for path in (folder / STAGING).iterdir()] == ["notes.txt"]


def _save(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    ts.save(nn.Linear(40 + seed, 20), folder)


def test_processes_that_save_at_once_leave_a_whole_artifact(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save, args=(tmp_path / "a", seed)) for seed in range(4)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    assert [each.exitcode for each in processes] == [0] * 4
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["artifact.json", "weights.safetensors"]
    open_artifact(tmp_path / "a")


def _save_often(folder: Path, level: float) -> None:
    deployed = constant(level)
    for _ in range(8):
        ts.save(deployed, folder)


def constant(level: float) -> ts.Deployed:
    """Answers with one number everywhere, and has weights of a size of its own."""
    model = nn.Sequential(nn.Linear(2, 8 + int(level)), nn.Linear(8 + int(level), 3))
    for each in model.parameters():
        nn.init.zeros_(each)
    nn.init.constant_(model[1].bias, level)  # type: ignore[arg-type]
    return ts.deploy(model, (torch.ones(1, 2),), runtime="eager", threads=1)


@pytest.mark.slow
def test_who_reads_while_others_save_finds_a_whole_artifact(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    ts.save(constant(1), folder)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_save_often, args=(folder, float(level))) for level in (1, 2)]
    for each in writers:
        each.start()
    read = []
    while any(each.is_alive() for each in writers) or not read:
        read.append(ts.load(folder)(torch.ones(1, 2)))
    for each in writers:
        each.join()
    assert [each.exitcode for each in writers] == [0, 0]
    assert all(
        torch.equal(each, torch.full((1, 3), float(each[0, 0]))) and float(each[0, 0]) in (1, 2) for each in read
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "artifact.json", "bench.py", "example.npz", "model.pt2"]  # fmt: skip


def test_threads_that_save_at_once_leave_a_whole_artifact(tmp_path: Path) -> None:
    deployed = [constant(level) for level in (1.0, 2.0, 3.0)]
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(ts.save, each, tmp_path / "a") for each in deployed]:
            done.result()
    assert float(ts.load(tmp_path / "a")(torch.ones(1, 2))[0, 0]) in (1, 2, 3)


def test_a_model_that_another_process_replaces_is_loaded_as_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ts.save(constant(1), tmp_path / "a")
    load, other = loading.load_opened, constant(2)

    def replaced_before(opened: Any, **settings: Any) -> Any:
        ts.save(other, tmp_path / "a")
        return load(opened, **settings)

    monkeypatch.setattr(loading, "load_opened", replaced_before)
    assert float(ts.load(tmp_path / "a")(torch.ones(1, 2))[0, 0]) == 1


def test_a_save_waits_for_who_holds_the_folder_and_says_so_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ts.save(linear(), tmp_path / "a")
    monkeypatch.setattr(folder_lock, "FOLDER_SECONDS", 0.01)
    with folder_lock.reading(tmp_path / "a"):
        ts.load_module(tmp_path / "a", linear)  # readers do not wait for each other
        with pytest.raises(StorageError, match="writing to, or reading, .*a for over .* s.*wait"):
            ts.save(linear(), tmp_path / "a")
    with (
        folder_lock.writing(tmp_path / "a"),
        pytest.raises(StorageError, match="another process.*writing to .*a for over"),
    ):
        ts.load_module(tmp_path / "a", linear)
    ts.save(linear(), tmp_path / "a")


@pytest.mark.parametrize("replace", ["artifact.json", "weights.safetensors"])
def test_loading_follows_no_links(replace: str, folder: Path) -> None:
    moved = (folder / replace).rename(folder.parent / "moved")
    (folder / replace).symlink_to(moved)
    with pytest.raises(ArtifactError, match="link|cannot be read"):
        ts.load_module(folder, linear)


# --- signatures ---

ed25519 = pytest.importorskip(
    "cryptography.hazmat.primitives.asymmetric.ed25519", reason="pip install 'torchslim[sign]'"
)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    private = ed25519.Ed25519PrivateKey.generate()
    return private, private.public_key()


def pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    if hasattr(key, "public_bytes"):
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)  # type: ignore[no-any-return]
    return key.private_bytes(  # type: ignore[no-any-return]
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def as_file(key: Any, folder: Path) -> Path:
    path = folder / ("public.pem" if hasattr(key, "public_bytes") else "private.pem")
    path.write_bytes(pem(key))
    return path


FORMS: dict[str, Callable[[Any, Path], Any]] = {
    "object": lambda key, folder: key,
    "bytes": lambda key, folder: pem(key),
    "path": as_file,
    "text": lambda key, folder: str(as_file(key, folder)),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_signed_loads_with_its_key_and_without(form: str, pair: tuple[Any, Any], tmp_path: Path) -> None:
    model = linear()
    folder = ts.save(model, tmp_path / "a", key=FORMS[form](pair[0], tmp_path))
    for key in (None, FORMS[form](pair[1], tmp_path)):
        loaded = ts.load_module(folder, linear, public_key=key)
        assert torch.equal(loaded.weight, model.weight)  # type: ignore[arg-type]


def test_what_is_not_signed_by_the_key_is_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    other = ed25519.Ed25519PrivateKey.generate()
    unsigned = ts.save(linear(), tmp_path / "unsigned", example_inputs=(torch.randn(3, 4),))
    foreign = ts.save(linear(), tmp_path / "foreign", example_inputs=(torch.randn(3, 4),), key=other)
    with pytest.raises(ArtifactError, match="not signed.*without"):
        ts.load(unsigned, public_key=pair[1])
    with pytest.raises(ArtifactError, match="by this key"):
        ts.load(foreign, public_key=pair[1])

    # a signature of other content, and content that was changed with all hashes made anew
    mine = ts.save(linear(), tmp_path / "mine", key=pair[0])
    signature = json.loads((mine / "artifact.json").read_text())["signature"]
    rewritten(unsigned, signature=signature)
    shutil.copy(foreign / "model.pt2", mine / "model.pt2")
    listed(mine, "model.pt2")
    for folder in (unsigned, mine):
        open_artifact(folder)
        with pytest.raises(ArtifactError, match="by this key"):
            open_artifact(folder, public_key=pair[1])


def test_keys_of_other_kinds_are_named(pair: tuple[Any, Any], tmp_path: Path) -> None:
    for key, message in ((b"nonsense", "no unencrypted PEM"), (pem(pair[1]), "no unencrypted PEM"), (3, "got int"),
                         (tmp_path / "missing.pem", "cannot be read"), (pair[1], "private key.*Ed25519")):  # fmt: skip
        with pytest.raises(ArtifactError, match=message):
            ts.save(linear(), tmp_path / "a", key=key)
        assert not (tmp_path / "a").exists()
    folder = ts.save(linear(), tmp_path / "a", key=pair[0])
    for key, message in ((b"nonsense", "no unencrypted PEM"), (pair[0], "must be a public key")):
        with pytest.raises(ArtifactError, match=message):
            open_artifact(folder, public_key=key)


def test_a_missing_package_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(RuntimeUnavailable, match=r"pip install 'torchslim\[sign\]'"):
        ts.save(linear(), folder, key=b"")


# --- archives ---


def test_archives_never_unpack_to_more_than_their_size() -> None:
    import io
    import zipfile

    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, in000=np.zeros(10**6))
    with pytest.raises(ArtifactError, match="compressed"):
        read_arrays(buffer.getvalue(), "example.npz")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
        archive.writestr("in000.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ArtifactError, match="does not fit its 0 bytes"):
        read_arrays(buffer.getvalue(), "example.npz")
    with pytest.raises(ArtifactError, match="damaged"):
        unzip(b"PK", "file")


# --- mutated artifacts ---


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS_OF_ARTIFACTS, ids=lambda kind: kind.name)
def test_a_mutated_artifact_is_accepted_or_refused_and_nothing_else(kind: Kind) -> None:
    @seed(0)
    @settings(
        max_examples=8, database=None, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
    )
    @given(kind.examples)
    def run(example: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # another instruction set
            with suppress(ts.TorchslimError):
                kind.attempt(example)

    run()
