"""Open an artifact on disk: every file that is read is checked against its hash in the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.artifact.manifest import LIMITS, PARTS, parse_manifest
from torchslim.artifact.manifest import SURGERY as SURGERY_SCHEMA
from torchslim.artifact.signing import Key, verify
from torchslim.artifact.state import restore
from torchslim.artifact.writing import MANIFEST, is_file, within
from torchslim.core.archives import read_arrays, read_masks
from torchslim.core.files import sha256
from torchslim.core.schema import read_file
from torchslim.errors import ArtifactError

WEIGHTS, MASKS = "weights.safetensors", "masks.safetensors"
SURGERY = "surgery.json"
LARGEST = "largest_"  # begins the names of the largest example in example.npz
MANIFEST_BYTES = LIMITS.size_bytes
FILE_BYTES = 2**42


@dataclass(frozen=True, slots=True)
class Opened:
    """A checked artifact; `signed` if its signature was verified with a given key.

    `read` returns a file of `ahead` from memory once, and then reads it from the folder.
    """

    folder: Path
    manifest: dict[str, Any]
    ahead: dict[str, bytes] = field(default_factory=dict)
    signed: bool = False

    def read(self, name: str) -> bytes:
        """Bytes of a file, hashed again, so that exactly the checked bytes are used."""
        if name not in self.manifest["files"]:
            raise ArtifactError(f"{self.folder} has no {name}: the artifact was saved without it")
        if name in self.ahead:
            return self.ahead.pop(name)
        if not within(self.folder, name):
            raise ArtifactError(f"{self.folder / name} lies behind a link; copy the files themselves")
        data = read_file(self.folder / name, ArtifactError, size_bytes=FILE_BYTES, links=False)
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][name]:
            raise ArtifactError(f"{self.folder / name} was changed since the artifact was opened; load it again")
        return data

    def read_ahead(self, *names: str) -> None:
        """Read files into memory, as far as the artifact has them."""
        self.ahead.update({name: self.read(name) for name in names if name in self.manifest["files"]})

    def part(self, path: str) -> Opened:
        """The artifact of a part, which is checked as the files of this one are.

        Raises:
            ArtifactError: there is no such part.
        """
        parts = self.manifest.get("parts", {})
        if path not in parts:
            listed = f"its parts are {', '.join(map(repr, parts))}" if parts else "it holds a whole model"
            raise ArtifactError(f"{self.folder} has no part {path!r}; {listed}")
        place = f"{PARTS}/{parts[path]}"
        what = f"{self.folder}/{place}/{MANIFEST}"
        manifest = parse_manifest(self.read(f"{place}/{MANIFEST}"), what)
        listed_files = {f"{place}/{name}": value for name, value in manifest["files"].items()}
        if any(self.manifest["files"].get(name) != value for name, value in listed_files.items()):
            raise ArtifactError(f"{what} lists other files than the artifact around it; save it again")
        ahead = {name[len(place) + 1 :]: data for name, data in self.ahead.items() if name.startswith(f"{place}/")}
        return Opened(self.folder / place, dict(manifest), ahead, self.signed)

    def programs(self) -> dict[str, Opened]:
        """The artifacts of the programs by the name of their part; of a whole model this one, under ""."""
        names = () if "buckets" in self.manifest else self.manifest.get("parts", ())
        return {name: self.part(name) for name in names} or {"": self}

    def sizes(self) -> list[Opened]:
        """The artifacts of the programs for listed sizes; this one alone where it holds one program."""
        return [self.part(name) for name in self.manifest["parts"]] if "buckets" in self.manifest else [self]

    def into(self, module: nn.Module) -> nn.Module:
        """The saved module, restored in a module of its kind; see `load_module`."""
        if WEIGHTS not in self.manifest["files"]:
            raise ArtifactError(f"{self.folder} holds no weights, only a program; use ts.load(folder)")
        record = None
        if SURGERY in self.manifest["files"]:
            record = SURGERY_SCHEMA.parse(self.read(SURGERY), str(self.folder / SURGERY))
        return restore(module, self.read(WEIGHTS), self.manifest, record)

    def examples(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """The example inputs, and the largest ones where sizes vary, with the types and sizes of the spec."""
        what = f"{self.folder}/example.npz"
        arrays = read_arrays(self.read("example.npz"), what)
        varies = any(name.startswith(LARGEST) for name in arrays)
        return self._example(arrays, what, ""), self._example(arrays, what, LARGEST) if varies else None

    def _example(self, arrays: Mapping[str, Any], what: str, prefix: str) -> list[Tensor]:
        """The inputs whose names in `arrays` begin with `prefix`."""
        spec, tensors = self.manifest["spec"], []
        for index, (dtype, sizes) in enumerate(zip(spec["dtypes"], spec["sizes"], strict=True)):
            array = arrays.get(f"{prefix}in{index:03d}")
            if (
                array is None
                or len(array.shape) != len(sizes)
                or any(size not in (None, own) for size, own in zip(sizes, array.shape, strict=True))
            ):
                raise ArtifactError(f"{what} cannot be read: it does not fit the sizes of the model's inputs")
            try:
                tensors.append(torch.from_numpy(array).to(getattr(torch, dtype)))
            except (TypeError, RuntimeError, AttributeError) as error:
                raise ArtifactError(f"{what} cannot be read: {error}; save it again") from error
        return tensors

    def masks(self) -> dict[str, Tensor]:
        """The masks, by parameter name."""
        if MASKS not in self.manifest["files"]:
            return {}
        return read_masks(self.read(MASKS), self.manifest["mask_shapes"], f"{self.folder}/{MASKS}")


def open_artifact(folder: str | Path, *, public_key: Key | None = None) -> Opened:
    """The artifact in a folder, after a check of its manifest, its signature if a key is given, and all its files."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a torchslim artifact: it has no {MANIFEST}")
    manifest = parse_manifest(read_file(path, ArtifactError, size_bytes=MANIFEST_BYTES, links=False), str(path))
    if public_key is not None:
        verify(manifest["digest"], manifest.get("signature"), public_key, str(folder))
    for name, expected in manifest["files"].items():
        inside = folder / name
        if inside.is_symlink() or not within(folder, name):
            raise ArtifactError(f"{path} names a file outside its folder: {name!r} is a link; copy the file itself")
        if not is_file(inside):
            raise ArtifactError(f"{folder} is incomplete: {name} is missing; copy it again")
        if sha256(inside) != expected:
            raise ArtifactError(f"{folder / name} was truncated or changed since it was saved; copy it again")
    return Opened(folder, dict(manifest), signed=public_key is not None)
