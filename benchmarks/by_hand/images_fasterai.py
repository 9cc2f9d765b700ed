"""Images with fasterai: pruning and distillation as callbacks, batch norm folded, static int8 as it is exported.

Sources: fasterai's tutorials on pruning, distillation and the export to ONNX, whose pipeline this is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fasterai.core.criteria import large_final
from fasterai.core.schedule import one_cycle
from fasterai.distill.all import KnowledgeDistillationCallback, SoftTarget
from fasterai.export.all import export_onnx
from fasterai.misc.all import BN_Folder
from fasterai.prune.all import PruneCallback
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor]]


class Reread(torch.utils.data.IterableDataset):
    """Batches of a loader, as fastai reads them."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def loader(batches: Batches) -> DataLoader:
    """fastai's loader of batches that are made already."""
    made = DataLoader(Reread(batches), bs=None)
    made.n = len(batches)
    return made


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, epochs: int, folder: Path) -> Path:
    """The path of the quantized model."""
    teacher = deepcopy(model).eval()
    example = next(iter(val))[0][:1]
    learn = Learner(
        DataLoaders(loader(train), loader(val), device="cpu"),
        deepcopy(model),
        loss_func=CrossEntropyLossFlat(),
        metrics=accuracy,
        path=folder,
    )
    pruning = PruneCallback(
        0.3, one_cycle, "global", large_final, example_inputs=example, ignored_layers=[learn.model.head]
    )
    distilling = KnowledgeDistillationCallback(teacher, SoftTarget, weight=0.9)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 1e-3, cbs=[pruning, distilling])
    folded = BN_Folder().fold(learn.model).eval()
    single = [(image[None],) for images, _ in calibration for image in images]
    return export_onnx(
        folded, example, folder / "model.onnx", quantize=True, quantize_mode="static", calibration_data=single
    )
