"""Artifacts that are timed where torchslim is not installed, and what is made of the answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from tests.support import toy
from torchslim.artifact.bench_pack import id_of, packed, write_pack
from torchslim.artifact.phone_script import Timed, phone_script
from torchslim.artifact.times import Times
from torchslim.errors import ArtifactError
from torchslim.pipeline.elsewhere import add_times, with_times
from torchslim.report import load_run, render, table

PROGRAM = "0" * 64


def answer(**changes: Any) -> dict[str, Any]:
    program = {
        "name": "out",
        "program": PROGRAM,
        "runtime": "onnxruntime",
        "threads": 1,
        "inputs": [[1, 3, 8, 8]],
        "largest_difference": 0.0,
        "ms": [2.0, 2.5, 3.0],
    }
    machine = {"processor": "a phone", "architecture": "arm64-v8a", "cores": 8, "system": "Android 15"}
    return {
        "format": "torchslim-times",
        "version": 1,
        "machine": {**machine, **changes.pop("machine", {})},
        "programs": [{**program, **changes.pop("program", {})}, *changes.pop("more", [])],
        **changes,
    }


def deployed(runtime: str = "onnxruntime", dynamic_shapes: Any = None) -> ts.Deployed:
    torch.manual_seed(0)
    model = ts.deploy(nn.Linear(4, 2), (torch.randn(3, 4),), runtime=runtime, threads=1, dynamic_shapes=dynamic_shapes)
    assert isinstance(model, ts.Deployed)
    return model


@pytest.mark.slow
def test_a_pack_is_timed_by_its_script_alone_and_the_answer_is_read(tmp_path: Path) -> None:
    model = deployed()
    assert write_pack(tmp_path / "board", {"one": model, "two": model}) == ["bench.py"]
    poison = tmp_path / "poison"
    for name in ("torch", "torchslim"):
        (poison / name).mkdir(parents=True)
        (poison / name / "__init__.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, tmp_path / "board" / "bench.py", "--rounds", "4"],
        capture_output=True, text=True, timeout=300, check=True, env={"PYTHONPATH": str(poison)},
    )  # fmt: skip
    times = Times.parse(Path(done.stdout.strip()).read_bytes())
    assert [program["name"] for program in times.programs] == ["one", "two"]
    assert {program["program"] for program in times.programs} == {id_of(model)}
    assert [program["inputs"] for program in times.programs] == [[[3, 4]], [[3, 4]]]
    assert all(program["largest_difference"] == 0 for program in times.programs)
    assert {len(rounds) for rounds in times.timings.rounds.values()} == {4}
    with pytest.raises(ArtifactError, match="holds something"):
        write_pack(tmp_path / "board", {"one": model})


def test_what_no_machine_could_time_is_refused() -> None:
    with pytest.raises(ArtifactError, match="1 to 64 programs, got 0"):
        packed({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program": {"ms": [2.0, -1.0]}}, "ms"),
        ({"program": {"ms": [2.0, 0.0]}}, "ms"),
        ({"program": {"ms": ["2.0"]}}, "ms"),
        ({"program": {"ms": []}}, "ms"),
        ({"program": {"ms": [1e300]}}, "ms"),
        ({"program": {"program": "../" * 20}}, "program"),
        ({"program": {"threads": 0}}, "threads"),
        ({"program": {"inputs": [[-1]]}}, "inputs"),
        ({"program": {"extra": 1}}, "extra"),
        ({"machine": {"cores": 0}}, "cores"),
        ({"machine": {"processor": ""}}, "processor"),
        ({"machine": {"processor": "x" * 300}}, "processor"),
        ({"format": "torchslim-run"}, "format"),
        ({"version": 2}, "version"),
        ({"more": [answer()["programs"][0] | {"ms": [1.0]}]}, "different numbers of rounds"),
    ],
)
def test_times_that_no_script_writes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Times.parse(json.dumps(answer(**changes)).encode())


def test_numbers_that_are_none_and_files_without_end_are_refused() -> None:
    text = json.dumps(answer())
    for damaged in (text.replace("2.5", "NaN"), text[:-3], "[" * 50, text.replace('"ms"', '"ms": [1.0], "ms"')):
        with pytest.raises(ArtifactError, match="times.json"):
            Times.parse(damaged.encode())


# the record of a run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "out"
    result = ts.compress(toy.model(), toy.task(), [ts.Quantize("int8")], threads=1, workdir=folder / "work")
    return result.save(folder)


def times_of(folder: Path, stages: dict[str, list[float]]) -> Times:
    programs = [
        answer()["programs"][0] | {"name": name, "program": id_of(ts.load(folder / name)), "ms": ms}
        for name, ms in stages.items()
    ]
    return Times.parse(json.dumps({**answer(), "programs": programs}).encode())


@pytest.mark.slow
def test_times_are_added_to_the_rows_of_their_programs(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "out")
    times = times_of(folder, {"work/00-baseline": [8.0, 10.0, 12.0], ".": [4.0, 5.0, 6.0]})
    merged = add_times(folder, times)
    baseline, step, artifact = (row["elsewhere"]["a phone"] for row in merged["rows"])
    assert baseline["latency_ms"]["value"] == 10.0
    assert artifact["latency_ms"]["value"] == step["latency_ms"]["value"] == 5.0  # the same program
    assert artifact["over_baseline"]["value"] == 2.0
    assert artifact["over_baseline"]["verdict"] == "faster"
    assert merged["machines"]["a phone"]["system"] == "Android 15"
    assert load_run(folder) == merged
    assert "artifact on a phone: 5.00 ms" in table(merged)
    assert "artifact on a phone: 5.00 ms" in render(merged)
    assert "artifact on a phone" in (folder / "report.html").read_text()
    assert ts.load(folder).runtime == "onnxruntime"  # its files have the hashes that it lists
    again = add_times(folder, times_of(folder, {".": [7.0]}))  # a second time, of the artifact alone
    assert again["rows"][-1]["elsewhere"]["a phone"]["latency_ms"]["value"] == 7.0
    assert "not timed there" in again["rows"][-1]["elsewhere"]["a phone"]["over_baseline"]["not_measured"]


@pytest.mark.slow
def test_times_of_other_programs_are_refused_and_signed_artifacts_need_their_key(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no program of this run"):
        add_times(run, Times.parse(json.dumps(answer()).encode()))
    with pytest.raises(ArtifactError, match="no program of this run"):
        with_times(load_run(run), Times.parse(json.dumps(answer()).encode()), {})
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    folder = shutil.copytree(run, tmp_path / "signed")
    ts.save(ts.load(run), folder, key=key)
    (folder / "run.json").write_bytes((run / "run.json").read_bytes())
    times = times_of(folder, {".": [4.0]})
    with pytest.raises(ArtifactError, match="is signed.*--key"):
        add_times(folder, times)
    add_times(folder, times, key=key)
    assert ts.load(folder, public_key=key.public_key()).runtime == "onnxruntime"


# phones ---------------------------------------------------------------------------------------------------------------

ADB = """#!/bin/sh
# a phone made of folders: runs on this machine what a shell on the phone would
case $1 in
    shell)
        shift
        case $1 in
            getprop) echo "Pixel \\"9\\"; rm" ;;
            mkdir | rm | chmod) command=$1; shift; "$command" $(echo "$@" | sed "s#/data/local/tmp#$PHONE#g") ;;
            *) sh -c "$(echo "$1" | sed "s#/data/local/tmp#$PHONE#g")" ;;
        esac ;;
    push) shift; for last; do :; done
        cp $(echo "$@" | sed "s#/data/local/tmp#$PHONE#g") ;;
esac
"""
RUNNER = """#!/bin/sh
for option; do case $option in
    --model_path=*) model=${option#*=} ;;
    --inputs=*) inputs=${option#*=} ;;
    --num_executions=*) calls=${option#*=} ;;
esac; done
[ -s "$model" ] && [ -s "$inputs" ] || { echo "missing"; exit 1; }
echo "I 00:00:00.000001 executorch:executor_runner.cpp:400] Model executed successfully $calls time(s) in $((calls * 3)).000000 ms."
"""


def phone(tmp_path: Path) -> dict[str, str]:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("adb", ADB), ("executor_runner", RUNNER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "phone").mkdir()
    return {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PHONE": str(tmp_path / "phone")}


def test_a_phone_is_timed_with_adb_and_its_answer_is_read(tmp_path: Path) -> None:
    """With a made-up adb and runner: no phone is at hand."""
    folder = tmp_path / "it's a pack"
    folder.mkdir()
    programs = []
    for number in range(2):
        (folder / f"{number}.pte").write_bytes(b"program")
        (folder / f"{number}-in000.bin").write_bytes(b"input")
        about = {"name": 'out\'s "best"', "program": PROGRAM, "runtime": "executorch", "threads": None, "inputs": [[1]]}
        programs.append(Timed(about=about, file=f"{number}.pte", inputs=(f"{number}-in000.bin",)))
    (folder / "phone.sh").write_bytes(phone_script(programs))
    environment = phone(tmp_path)
    command = ["sh", folder / "phone.sh", tmp_path / "tools" / "executor_runner", "3", "2"]
    subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
    times = Times.parse((folder / "times.json").read_bytes())
    assert times.timings.rounds == {"0": [3.0] * 3, "1": [3.0] * 3}
    assert times.machine["processor"] == "Pixel 9 rm, Pixel 9 rm"
    assert [program["threads"] for program in times.programs] == [2, 2]
    assert times.programs[0]["name"] == 'out\'s "best"'
    assert not list((tmp_path / "phone").iterdir()), "the phone is left as it was"
    (folder / "1-in000.bin").write_bytes(b"")
    done = subprocess.run(command, env=environment, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1.pte did not run on the phone" in done.stderr
    done = subprocess.run([*command[:3], "2; ls"], env=environment, check=False, timeout=60, capture_output=True)
    assert done.returncode == 2


@pytest.mark.slow
def test_a_phone_needs_fixed_sizes() -> None:
    pytest.importorskip("executorch")
    assert "phone.sh" in packed({"a": deployed("executorch")})
    files = packed({"a": deployed("executorch", "batch")})
    assert "phone.sh" not in files
    assert "bench.py" in files
