"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747; MIT), split 55,000 / 5,000 / 10,000."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILES = {  # SHA-256 of what is inside: who packs the files decides the bytes of the .gz, not of the images
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
CACHE = Path(__file__).parents[2] / ".data" / "fashion-mnist"
VALIDATION = 5_000  # the last ones of the published training set
PADDING = 2

Split = tuple[Tensor, Tensor]


class Batches:
    """Batches `(images, labels)` from memory, re-iterable; images (batch, 1, h, w) float32 in about [-1, 2].

    With `augment`, the order is shuffled and each image is shifted by up to two pixels and flipped at random, by
    torch's global generator.
    """

    def __init__(self, split: Split, batch_size: int, *, augment: bool = False) -> None:
        self.images, self.labels = split
        self.batch_size, self.augment = batch_size, augment

    def __len__(self) -> int:
        return (len(self.labels) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[Split]:
        count = len(self.labels)
        order = torch.randperm(count) if self.augment else torch.arange(count)
        for index in order.split(self.batch_size):
            images = self.images[index]
            if self.augment:
                images = shifted(images)
            yield (
                (images.float() / 255 - 0.286) / 0.353,
                self.labels[index],
            )  # the training set's mean and deviation


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to two pixels (zeros come in) and mirrored with probability one half."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [PADDING] * 4)
    rows = torch.randint(2 * PADDING + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * PADDING + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def splits() -> dict[str, Split]:
    """train, val and test as (uint8 images (n, 1, h, w), int64 labels); digits where there is no Fashion-MNIST."""
    folder = locate()
    if folder is None:
        print("Fashion-MNIST cannot be had here: running on scikit-learn's digits instead", file=sys.stderr)
        return digits()
    images, labels = _read(folder, "train")
    return {
        "train": (images[:-VALIDATION], labels[:-VALIDATION]),
        "val": (images[-VALIDATION:], labels[-VALIDATION:]),
        "test": _read(folder, "t10k"),
    }


@cache
def locate() -> Path | None:
    """The folder of the four files: $TORCHSLIM_DATA, the Debian package, its download, torchvision's download."""
    given = os.environ.get("TORCHSLIM_DATA")
    for folder in (
        Path(given) if given else None,
        Path(given) / "fashion-mnist" if given else None,
        INSTALLED,
        CACHE,
    ):
        if folder is not None and complete(folder):
            return folder
    for download in (_from_debian, _from_torchvision):
        try:
            download(CACHE)
        except (OSError, subprocess.SubprocessError, RuntimeError, ImportError) as error:
            print(f"{download.__name__.removeprefix('_from_')}: {error}", file=sys.stderr)
        if complete(CACHE):
            return CACHE
    return None


def complete(folder: Path) -> bool:
    """Are all four files there? A file with another checksum is an error, not a reason to go on looking."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    for name, expected in FILES.items():
        found = hashlib.sha256(gzip.decompress((folder / name).read_bytes())).hexdigest()
        if found != expected:
            raise ValueError(f"{folder / name} is damaged: SHA-256 {found}, expected {expected}; delete it, run again")
    return True


def _from_debian(folder: Path) -> None:
    """Unpack Debian's package, as an ordinary user."""
    with tempfile.TemporaryDirectory() as scratch:
        quiet = {"cwd": scratch, "capture_output": True, "timeout": 300}
        subprocess.run(["apt-get", "download", PACKAGE], check=True, **quiet)
        subprocess.run(["dpkg", "-x", str(next(Path(scratch).glob("*.deb"))), scratch], check=True, **quiet)
        _adopt(Path(scratch) / INSTALLED.relative_to("/"), folder)


def _from_torchvision(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as scratch:
        FashionMNIST(scratch, download=True)
        _adopt(Path(scratch) / "FashionMNIST" / "raw", folder)


def _adopt(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        partial = folder / f".{name}.partial"
        shutil.copyfile(source / name, partial)
        partial.replace(folder / name)


def _read(folder: Path, part: str) -> Split:
    """IDX files: big-endian header (magic, count[, height, width]), then bytes."""
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    count, height, width = np.frombuffer(pixels, ">i4", count=3, offset=4)
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(count, 1, height, width)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def digits() -> dict[str, Split]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged to 28 x 28."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images).float().unsqueeze(1) * (255 / 16)
    images = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(data.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[:1_197], "val": order[1_197:1_497], "test": order[1_497:]}
    return {name: (images[index], labels[index]) for name, index in parts.items()}


if __name__ == "__main__":
    print(locate() or "not to be had")
