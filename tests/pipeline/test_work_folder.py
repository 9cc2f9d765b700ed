"""Whatever stands in a working folder: a run ends as if the folder had been empty, or says what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchslim as ts
from tests.mutations import Kind
from tests.mutations.folders import KINDS_OF_FOLDERS, stage_row
from tests.support import tiny
from tests.support.kills import listing, states
from torchslim.artifact.storage import write_artifact
from torchslim.core.files import TEMPORARY, digest, write_json
from torchslim.core.seals import is_sealed, key_id, own_secret, read_sealed, seal, write_sealed
from torchslim.errors import RecipeError, StorageError, TorchslimError
from torchslim.pipeline.stages import keep, kept
from torchslim.report.records import Layer
from torchslim.runtimes import Runtime, aoti, find_runtime

JUNK = st.sampled_from([b"", b"{}", b"null", b"[" * 5000, b"\xff\xfe\x00", b'{"format": 1e999}', b"PK\x03\x04"])


@pytest.fixture(scope="module", autouse=True)
def untimed() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["torchslim.pipeline.stage_timing"], "compare", tiny.compare)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, tiny.outcome(tiny.run(folder))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed as it was about to delete the checkpoints of its last step."""
    folder = tmp_path_factory.mktemp("half")
    left = states(lambda: tiny.run(folder / "run"), folder / "run", folder / "album")
    return next(each for each in reversed(left) if list(each.glob("work/02-distill.state/*.ckpt")))


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """A way to damage a file."""
    kind = draw(st.sampled_from(["truncate", "flip", "junk", "folder", "gone", "types", "unreadable"]))
    where, junk = draw(st.floats(0, 0.999)), draw(JUNK)

    def damage(path: Path) -> None:
        data = path.read_bytes()
        place = int(where * len(data))
        if kind == "truncate":
            path.write_bytes(data[:place])
        elif kind == "flip" and data:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        elif kind == "junk":
            path.write_bytes(junk)
        elif kind == "folder":
            path.unlink()
            path.mkdir()
        elif kind == "gone":
            path.unlink()
        elif kind == "types" and path.suffix == ".json":
            found = json.loads(data)
            key = sorted(found)[int(where * len(found))]
            path.write_text(json.dumps({**found, key: [found[key]]}))
        elif kind == "unreadable":
            path.chmod(0)

    return damage


@pytest.mark.slow
@settings(max_examples=10)
@given(st.data())
def test_a_damaged_folder_gives_the_same_result_or_a_clear_error(
    finished: tuple[Path, Any], half: Path, data: st.DataObject
) -> None:
    whole, expected = finished
    source = data.draw(st.sampled_from([whole, half]))
    name = data.draw(st.sampled_from(sorted(listing(source))))
    damage = data.draw(damages())
    with TemporaryDirectory() as place, warnings.catch_warnings(record=True):
        folder = Path(place) / "copy"
        shutil.copytree(source, folder)
        damage(folder / name)
        if (folder / name).is_dir() and name in ("work/recipe.json", "work/.torchslim.lock"):
            with pytest.raises(TorchslimError, match="cannot write"):  # a folder that nobody of us made is not deleted
                tiny.run(folder)
            shutil.rmtree(folder / name)
        found = tiny.run(folder)
    assert tiny.outcome(found) == expected


def test_the_row_of_a_layer_has_the_fields_of_its_record() -> None:
    """A field that is added to the one and not to the other would make every stage unreadable."""
    assert set(Layer.__annotations__) == {each.name for each in fields(ts.LayerRecord)} | {"version"}


def test_evidence_with_numbers_for_keys_is_sealed_as_it_is_read_back(tmp_path: Path) -> None:
    row = stage_row("prune") | {"evidence": {"widths": {8: 1.0, 16: (2.0, 3)}}}
    keep(tmp_path / "stage", "key", module=nn.Linear(2, 2), masks={}, row=row)
    found = kept(tmp_path / "stage", "key")
    assert found is not None
    assert found.row is not None
    assert found.row["evidence"] == {"widths": {"8": 1.0, "16": [2.0, 3]}}
    assert kept(tmp_path / "nothing", "key") is None


def edited(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "01-prune") -> None:
    path = folder / "work" / name / "stage.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "copy"))


@pytest.mark.slow
@pytest.mark.parametrize(("change", "says"), [
    (lambda record: record["row"]["metric"]["val"].update(value=100.0), "stage.json.*changed"),
    (lambda record: record["row"].update(more=1), "more: Extra inputs are not permitted"),
    (lambda record: record.update(artifact="0" * 64), "stage.json.*changed"),
    (lambda record: record.update(key_id="0" * 64), "other weights, data, settings.*another version"),
    (lambda record: record.update(seal="x"), "stage.json.*changed"),
])  # fmt: skip
def test_an_edited_stage_is_noticed_and_taken_again(
    change: Any, says: str, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = copied(finished[0], tmp_path)
    edited(folder, change)
    with pytest.warns(UserWarning, match=rf"{says}.*step is run again$"):
        assert tiny.outcome(tiny.run(folder)) == finished[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert tiny.outcome(tiny.run(folder)) == finished[1]  # mended


@pytest.mark.slow
def test_other_weights_in_a_stage_are_noticed(finished: tuple[Path, Any], tmp_path: Path) -> None:
    """An artifact that is whole in itself, in the place of the one that the run wrote."""
    folder = copied(finished[0], tmp_path)
    stage = folder / "work" / "01-prune"
    record = (stage / "stage.json").read_bytes()
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    shutil.rmtree(stage)
    write_artifact(stage, deployed=ts.deploy(module, (torch.ones(2, 4),), runtime="eager", threads=1), module=module)
    (stage / "stage.json").write_bytes(record)
    with pytest.warns(UserWarning, match="not those.*stage.json.*step is run again"):
        assert tiny.outcome(tiny.run(folder)) == finished[1]


@pytest.mark.slow
def test_the_key_is_nowhere_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: set[str] = set()
    monkeypatch.setattr(
        sys.modules["torchslim.pipeline.stages"], "seal", lambda key, *content: (keys.add(key), seal(key, *content))[1]
    )
    tiny.run(tmp_path)
    assert len(keys) >= 1 + tiny.STEPS
    for path in tmp_path.rglob("*"):
        text = path.read_bytes() if path.is_file() else b""
        assert not any(key.encode() in text or key[:12] in path.name for key in keys if len(key) > 12), path


# ------------------------------------------------------------------------------------------ machine code


class Alarm:
    """In place of the runtime's reader of machine code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[str] = []
        sessions: dict[bytes, Any] = {}
        eager = find_runtime("eager")

        def make(captured: Any, spec: Any, threads: Any) -> Any:
            session = eager.make(captured, spec, threads)[0]
            payload = b"machine code %d" % len(sessions)
            sessions[payload] = session
            return session, payload

        def read(payload: bytes, spec: Any, threads: Any) -> Any:
            self.read.append(payload.decode())
            return sessions[payload]

        fake = Runtime(name="aoti", suffix=".aoti.pt2", make=make, read=read, native=True)
        monkeypatch.setattr(aoti, "RUNTIME", fake)


def hostile(stage: Path) -> None:
    """What an attacker does who can write to the folder: other code, with all hashes beside it right."""
    manifest = json.loads((stage / "artifact.json").read_text())
    files = {name: (stage / name).read_bytes() for name in manifest["files"]}
    files["model.aoti.pt2"] = b"hostile"
    manifest["runtime"] = "aoti"
    manifest["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    del manifest["digest"]
    (stage / "model.aoti.pt2").write_bytes(b"hostile")
    write_json(stage / "artifact.json", manifest | {"digest": digest(manifest)})
    record = json.loads((stage / "stage.json").read_text())
    record["artifact"] = digest(manifest)
    write_json(stage / "stage.json", record)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", "aoti"])
def test_resuming_runs_no_code_that_was_put_into_a_stage(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarm = Alarm(monkeypatch)
    whole = tiny.outcome(tiny.run(tmp_path, runtime=runtime))
    hostile(tmp_path / "work" / "01-prune")
    with pytest.warns(UserWarning, match="the step is run again"):
        assert tiny.outcome(tiny.run(tmp_path, runtime=runtime)) == whole
    assert "hostile" not in alarm.read


@pytest.mark.slow
def test_machine_code_is_loaded_where_this_user_made_it_and_compiled_again_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarm = Alarm(monkeypatch)
    whole = tiny.run(tmp_path, runtime="aoti")
    assert alarm.read == []
    tiny.run(tmp_path, runtime="aoti")
    assert len(alarm.read) == 1 + tiny.STEPS
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    again = tiny.run(tmp_path, runtime="aoti")
    assert len(alarm.read) == 1 + tiny.STEPS
    assert torch.equal(again.deployed(torch.ones(2, 4)), whole.deployed(torch.ones(2, 4)))


def test_the_secret_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = own_secret()
    path = tmp_path / "torchslim" / "secret"
    assert first == own_secret() == path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["secret"]
    for spoil in (lambda: path.chmod(0o644), lambda: path.write_text("short"), path.unlink):
        path.chmod(0o600)
        spoil()
        assert own_secret() != first
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("0" * 64)
    (tmp_path / "elsewhere").chmod(0o600)
    assert own_secret() is None


# ------------------------------------------------------------------------------------------------- folder


@pytest.mark.slow
def test_a_folder_of_leftovers_alone_is_taken_and_cleaned(tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "deep").mkdir(parents=True)
    (work / f"{TEMPORARY}recipe.json.abc.json").write_text("{")
    shutil.rmtree(work / "deep")
    tiny.run(tmp_path)
    assert not any(TEMPORARY in name for name in listing(tmp_path))


def test_a_damaged_recipe_is_written_again_where_the_folder_is_marked(
    finished: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = copied(finished[0], tmp_path)
    (folder / "work" / "recipe.json").write_text("{")
    with pytest.warns(UserWarning, match="recipe.json.*damaged.*again"):
        assert tiny.outcome(tiny.run(folder)) == finished[1]
    (folder / "work" / "recipe.json").write_text("{")
    (folder / "work" / ".torchslim.lock").unlink()
    with pytest.raises(RecipeError, match="files.*no run"):
        tiny.run(folder)


def test_a_copy_without_hidden_files_is_still_a_run(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    (folder / "work" / ".torchslim.lock").unlink()
    phases: list[str] = []
    tiny.run(folder, progress=lambda event: phases.append(event.phase))
    assert phases.count("resumed") == tiny.STEPS


@pytest.mark.slow
def test_links_in_a_folder_are_not_followed(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder, thesis = copied(finished[0], tmp_path), tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "years.txt").write_text("of work")
    for name in ("01-prune", "02-distill.state"):
        shutil.rmtree(folder / "work" / name, ignore_errors=True)
        (folder / "work" / name).symlink_to(thesis)
    shutil.rmtree(folder / "work" / "02-distill")
    assert tiny.outcome(tiny.run(folder)) == finished[1]
    assert listing(thesis) == {"years.txt"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_FOLDERS, ids=lambda kind: kind.name)
def test_mutated_files_are_refused_in_words(kind: Kind) -> None:
    """As benchmarks/fuzz.py does for longer; an edited stage that is taken up is an AssertionError."""
    outcomes = Counter[str]()

    @settings(max_examples=25)
    @given(kind.examples)
    def attempt(example: bytes) -> None:
        try:
            kind.attempt(example)
            outcomes["taken"] += 1
        except TorchslimError:
            outcomes["refused"] += 1

    attempt()
    assert outcomes["refused" if kind.name != "stage.json" else "taken"]  # a stage is taken again, with a warning


# -------------------------------------------------------------------------------------------------- seals


@given(st.binary(max_size=40), st.binary(max_size=40), st.text(max_size=5), st.text(max_size=5))
def test_a_seal_holds_for_its_key_and_content_alone(one: bytes, two: bytes, key: str, other: str) -> None:
    assert is_sealed(seal(key, one), key, one)
    assert is_sealed(seal(key, one), key, two) == (one == two)
    assert is_sealed(seal(key, one), other, one) == (key == other)
    assert (key_id(key) == key_id(other)) == (key == other)


@given(st.binary(max_size=60), st.integers(0, 10**6), st.booleans())
def test_a_sealed_file_is_read_as_it_was_written_or_refused(data: bytes, place: int, cut: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write_sealed(path, data, "key")
        assert read_sealed(path, "key") == data
        raw = path.read_bytes()
        place %= len(raw)
        path.write_bytes(raw[:place] if cut else raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(StorageError, match="was truncated or changed"):
            read_sealed(path, "key")
