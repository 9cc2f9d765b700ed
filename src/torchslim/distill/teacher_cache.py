"""Teacher outputs cached on disk by sample, so that later epochs need no forward pass of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from torchslim.core import distributed
from torchslim.core.batches import batch_size
from torchslim.core.files import clean_temporaries, remove, write_bytes
from torchslim.core.isolation import warn
from torchslim.core.seals import key_id, seal
from torchslim.core.trees import tensors
from torchslim.errors import DistillError

SHARD_BYTES = 64 * 2**20
STALE_SECONDS = 3600.0  # other processes may be writing: younger temporary files are kept
INDEX, CHECK = "index", "check"
TOLERANCE = 1e-4  # relative to a sample's norm; rounding changes its projection by far less, an augmentation by more


class TeacherCache:
    """Teacher outputs by sample number, in shards of safetensors.

    Args:
        folder: holds the shards.
        key: digest of everything that the outputs depend on. Shards of other keys are ignored. A shard's file name ends
            with the seal of its content.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key, self.name = folder, key, key_id(key)[:16]
        self.shards: list[dict[str, Tensor]] = []
        self.files: set[str] = set()
        self.place = torch.full((0, 2), -1)  # shard and row of each sample, -1 where there is none
        self.rows: list[dict[str, Tensor]] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the shards that are new in the folder, those of other processes too."""
        for path in sorted(self.folder.glob(f"{self.name}-*.safetensors")):
            if path.name not in self.files:
                self._read(path)
        if distributed.is_first():
            clean_temporaries(self.folder, older_s=STALE_SECONDS)

    def find(self, index: Tensor, check: Tensor) -> dict[str, Tensor] | None:
        """The cached outputs on these samples by name; None unless all samples are cached.

        Raises:
            DistillError: a sample's inputs have changed since its outputs were cached, or its outputs have another
                shape than those of the other samples.
        """
        if not len(index) or not bool(self._has(index).all()):
            return None
        place = self.place[index]
        outputs: dict[str, Tensor] = {}
        for number in place[:, 0].unique().tolist():
            rows = (place[:, 0] == number).nonzero().flatten()
            for name, values in self.shards[number].items():
                if name not in outputs:
                    outputs[name] = values.new_empty(len(index), *values.shape[1:])
                if outputs[name].shape[1:] != values.shape[1:]:
                    raise DistillError(
                        f"the teacher's cached {name} has the shapes {tuple(outputs[name].shape[1:])} and "
                        f"{tuple(values.shape[1:])}, because batches were padded to different lengths; leave out "
                        "cache, or pad all samples to one length"
                    )
                outputs[name][rows] = values[place[rows, 1]]
        self._same(outputs.pop(CHECK), check, index)
        return outputs

    def keep(self, index: Tensor, check: Tensor, answers: Mapping[str, Tensor]) -> None:
        """Keep in memory the outputs on samples that are not cached yet; write them once they fill a shard."""
        new = ~self._has(index)
        row = {INDEX: index, CHECK: check, **{name: tensor.detach().cpu() for name, tensor in answers.items()}}
        self.rows.append({name: tensor[new].contiguous() for name, tensor in row.items()})
        if sum(tensor.numel() * tensor.element_size() for row in self.rows for tensor in row.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the outputs kept in memory, one shard for all rows of the same shapes."""
        groups: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}
        for row in self.rows:
            groups.setdefault(tuple((name, tensor.shape[1:]) for name, tensor in row.items()), []).append(row)
        for rows in groups.values():
            shard = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            if len(shard[INDEX]):
                data = save(shard)
                path = self.folder / f"{self.name}-{int(shard[INDEX].min()):09d}-{self._seal(data)}.safetensors"
                write_bytes(path, data)
                self._read(path)
        self.rows.clear()

    def _read(self, path: Path) -> None:
        """Load a shard. Its tensors are memory-mapped: the system reads them on use and may drop them from memory."""
        self.files.add(path.name)
        try:
            if path.name != f"{path.name.rpartition('-')[0]}-{self._seal(path.read_bytes())}.safetensors":
                raise ValueError("it was truncated or changed since it was written")
            shard = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            if distributed.is_first():
                warn(f"{path} is damaged ({error}); it is deleted and computed again")
                remove(path)
            return
        self._add({name: shard[name] for name in sorted(shard)})

    def _seal(self, data: bytes) -> str:
        return seal(self.key, data)[:32]

    def _add(self, shard: dict[str, Tensor]) -> None:
        index = shard.pop(INDEX)
        self.shards.append(shard)
        more = int(index.max()) + 1 - len(self.place)
        if more > 0:
            self.place = torch.cat([self.place, torch.full((more, 2), -1)])
        self.place[index, 0] = len(self.shards) - 1
        self.place[index, 1] = torch.arange(len(index))

    def _has(self, index: Tensor) -> Tensor:
        cached, inside = torch.zeros(len(index), dtype=torch.bool), index < len(self.place)
        cached[inside] = self.place[index[inside], 0] >= 0
        return cached

    def _same(self, old: Tensor, new: Tensor, index: Tensor) -> None:
        changed = ((old[:, 0] - new[:, 0]).abs() > TOLERANCE * old[:, 1] + 1e-12) | (old[:, 2] != new[:, 2])
        if bool(changed.any()):
            raise DistillError(
                f"sample {int(index[changed][0])} differs from the one whose teacher output was cached: the loader "
                "augments samples, or shuffles them without their indices, or the data have changed; leave out cache, "
                f"or delete {self.folder}"
            )


def checks(inputs: Any) -> Tensor:
    """Numbers that show whether a sample's inputs have changed: (samples, 3).

    They are a projection of the floats on fixed random directions, the norm of the floats, and an exact digest of the
    integers.
    """
    samples = batch_size(inputs)
    total = torch.zeros(samples, 3, dtype=torch.float64)
    for place, tensor in enumerate(tensors(inputs)):
        if tensor.dim() and len(tensor) == samples:
            rows = tensor.detach().reshape(samples, -1)
            generator = torch.Generator().manual_seed(rows.shape[1])
            if not rows.is_floating_point():
                factors = torch.randint(2**62, rows.shape[1:], generator=generator) * 2 + 1  # sums wrap around
                digests = (rows.cpu().long() * factors).sum(1) * (2 * place + 1)
                total[:, 2] += (digests >> 12).double()
                continue
            rows = rows.float()
            direction = torch.randn(rows.shape[1], generator=generator)
            total[:, 0] += (rows @ direction.to(rows.device)).double().cpu()
            total[:, 1] += rows.norm(dim=1).double().cpu()
    return total


def write_all(caches: Sequence[TeacherCache]) -> None:
    """Write the caches at the end of an epoch: every process writes, then reads the shards of the others."""
    for cache in caches:
        cache.flush()
    distributed.wait()
    for cache in caches:
        cache.refresh()
