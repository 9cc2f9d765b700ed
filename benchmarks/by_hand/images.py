"""Images by hand: Torch-Pruning, finetuning with torchdistill's loss, static int8 by ONNX Runtime.

Sources: README and reproduce/ of Torch-Pruning (LAMP, global, pruned step by step until a speed-up; SGD of 0.01
and momentum, lowered tenfold at 60 and 80 % of the epochs); torchdistill's KDLoss; ONNX Runtime's page on quantization
(preprocess, QDQ, one scale a channel, weights of 7 bits on processors without VNNI, whose sums of products saturate).
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torchdistill.losses.mid_level import KDLoss

Batches = Iterable[tuple[Tensor, Tensor]]


class Calibration(CalibrationDataReader):
    """Batches of images, as ONNX Runtime reads them."""

    def __init__(self, batches: Batches) -> None:
        self.feeds = iter([{"images": images.numpy()} for images, _ in batches])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None at the end."""
        return next(self.feeds, None)


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Per cent of the images that the model tells right."""
    model.eval()
    with torch.no_grad():
        hits = [(model(images).argmax(1) == labels).float() for images, labels in batches]
    return 100 * float(torch.cat(hits).mean())


def prune(model: nn.Module, example: Tensor, speed_up: float) -> None:
    """Remove channels step by step until the model computes `speed_up` times less."""
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.LAMPImportance(p=2),  # of five, the best on val right after pruning
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=400,
        ignored_layers=[model.head],
    )
    before, _ = tp.utils.count_ops_and_params(model, example)
    after = before
    while before / after < speed_up:
        pruner.step()
        after, _ = tp.utils.count_ops_and_params(model, example)


def finetune(model: nn.Module, teacher: nn.Module, train: Batches, val: Batches, epochs: int) -> nn.Module:
    """Train with the teacher's logits; returns the epoch that is best on val."""
    criterion = KDLoss("logits", "output", "logits", "output", temperature=4.0, alpha=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    milestones = [round(0.6 * epochs), round(0.8 * epochs)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    best, best_accuracy = deepcopy(model), -1.0
    for _ in range(epochs):
        model.train()
        for images, labels in train:
            with torch.no_grad():
                expected = teacher(images)
            outputs = {"logits": {"output": model(images)}}
            loss = criterion(outputs, {"logits": {"output": expected}}, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        if (reached := accuracy(model, val)) > best_accuracy:
            best, best_accuracy = deepcopy(model), reached
    return best.eval()


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, epochs: int, folder: Path) -> Path:
    """The path of the quantized model."""
    teacher = deepcopy(model).eval()
    student = deepcopy(model).eval()
    example = next(iter(val))[0][:1]
    prune(student, example, speed_up=2.0)
    student = finetune(student, teacher, train, val, epochs)
    exported, prepared, quantized = (str(folder / f"{name}.onnx") for name in ("float", "prepared", "int8"))
    torch.onnx.export(
        student,
        (example,),
        exported,
        input_names=["images"],
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
    )
    quant_pre_process(exported, prepared)
    quantize_static(
        prepared,
        quantized,
        Calibration(calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range="vnni" not in Path("/proc/cpuinfo").read_text(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return Path(quantized)
