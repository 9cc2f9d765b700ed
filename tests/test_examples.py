"""The demo's data and baseline: where it is looked for, how it is split, what is refused."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import fashion_mnist
from examples.fashion_mnist import data
from examples.fashion_mnist.model import ResNet
from torchslim.core.batches import predictor
from torchslim.distill import Distill
from torchslim.pipeline.recipe import load_recipe


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    data.locate.cache_clear()
    yield
    data.locate.cache_clear()


def write(folder: Path, counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four files in the IDX format, small, and their checksums in the place of the real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    sums = {}
    for part, count in zip(("train", "t10k"), counts, strict=True):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        head = np.array([2051, count, 28, 28], ">i4").tobytes()
        contents = {"images-idx3": head + images.tobytes(), "labels-idx1": head[:8] + labels.tobytes()}
        for kind, content in contents.items():
            name = f"{part}-{kind}-ubyte.gz"
            (folder / name).write_bytes(gzip.compress(content))
            sums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "FILES", sums)


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(data, "_from_debian", refused)
    monkeypatch.setattr(data, "_from_torchvision", refused)
    refused.__name__ = "_from_nowhere"


def test_the_users_folder_comes_first_and_is_split_as_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, (120, 30), monkeypatch)
    monkeypatch.setattr(data, "VALIDATION", 20)
    monkeypatch.setenv("TORCHSLIM_DATA", str(tmp_path))
    assert data.locate() == tmp_path
    parts = data.splits()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {"train": 100, "val": 20, "test": 30}
    assert parts["train"][0].shape == (100, 1, 28, 28)
    assert parts["train"][0].dtype == torch.uint8


def test_a_damaged_file_is_an_error_and_not_another_place_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, (12, 3), monkeypatch)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    monkeypatch.setenv("TORCHSLIM_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="damaged.*SHA-256"):
        data.locate()


def test_debians_package_is_unpacked_as_an_ordinary_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "source", (12, 3), monkeypatch)
    monkeypatch.delenv("TORCHSLIM_DATA", raising=False)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "INSTALLED", Path("/nowhere/share/datasets/fashion-mnist"))
    commands = []

    def run(command: list[str], cwd: str, **options: object) -> None:
        commands.append(command[0])
        if command[0] == "apt-get":
            (Path(cwd) / "dataset.deb").touch()
        else:
            target = Path(cwd) / "nowhere/share/datasets/fashion-mnist"
            target.parent.mkdir(parents=True)
            (tmp_path / "source").rename(target)

    monkeypatch.setattr(subprocess, "run", run)
    assert data.locate() == tmp_path / "cache"
    assert commands == ["apt-get", "dpkg"]


@pytest.mark.slow
def test_without_any_data_the_demo_runs_on_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_network(monkeypatch)
    monkeypatch.delenv("TORCHSLIM_DATA", raising=False)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "INSTALLED", tmp_path)
    task = fashion_mnist.task()
    assert "running on scikit-learn's digits" in capsys.readouterr().err
    assert task.evaluate(predictor(fashion_mnist.resnet()), "test") > 90


def test_batches_shuffle_and_augment_only_where_asked() -> None:
    images, labels = (
        torch.arange(64, dtype=torch.uint8).view(16, 1, 2, 2).repeat(1, 1, 4, 4),
        torch.arange(16),
    )
    plain = data.Batches((images, labels), 5)
    assert len(plain) == len(list(plain)) == 4
    assert torch.equal(torch.cat([y for _, y in plain]), labels)
    assert torch.equal(torch.cat([x for x, _ in plain]), torch.cat([x for x, _ in plain]))
    torch.manual_seed(1)
    mixed = torch.cat([y for _, y in data.Batches((images, labels), 5, augment=True)])
    assert sorted(mixed.tolist()) == labels.tolist()
    assert not torch.equal(mixed, labels)


def test_the_shipped_baseline_fits_the_model_and_the_recipe_is_valid() -> None:
    from safetensors.torch import load_file

    ResNet().load_state_dict(load_file(fashion_mnist.WEIGHTS))
    assert fashion_mnist.WEIGHTS.stat().st_size < 5_000_000
    prune, distill, quantize = load_recipe(Path(data.__file__).parent / "recipe.toml").steps
    assert (prune.pattern, prune.of, prune.sparsity) == ("channel", "macs", 0.5)
    assert isinstance(distill, Distill)
    assert (quantize.scheme, quantize.mode) == ("int8", "qat")
    assert isinstance(quantize.train, Distill), "the float model teaches it"
