"""Run the ONNX files of all sides in the same way: one thread, the metric on test, interleaved latency."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

import torchslim as ts

Serve = Callable[[Sequence[Tensor]], Sequence[Tensor]]
SAMPLES = 8  # that the latency is measured on, one a call
WARMUP, FEWEST, SECONDS = 3, 20, 30.0  # rounds before the first, at least, and when to stop


class Served:
    """An ONNX file in ONNX Runtime with one thread, called with the inputs of a batch.

    Args:
        path: the file.
        serve: turns the inputs of a batch into those of the file, for sides that need it.
    """

    def __init__(self, path: Path, serve: Serve = lambda inputs: inputs) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = self.session.get_inputs()
        self.serve = serve

    def feed(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """The inputs by the names of the file, in order."""
        served = self.serve(inputs)
        return {entry.name: tensor.numpy() for entry, tensor in zip(self.inputs, served, strict=True)}

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Outputs of a batch; a file with a fixed batch of one takes it sample by sample."""
        single = self.inputs[0].shape[0] == 1
        parts = list(zip(*(tensor.split(1) for tensor in inputs), strict=True)) if single else [inputs]
        outputs = [self.session.run(None, self.feed(part))[0] for part in parts]
        return torch.from_numpy(np.concatenate(outputs))


def listed(task: ts.Task, batch: Any) -> tuple[list[Tensor], Tensor]:
    """Inputs of a batch as a list, in the order of the model's arguments, and its labels."""
    inputs, labels = task.inputs(batch), task.target(batch)
    assert labels is not None
    return list(inputs.values() if isinstance(inputs, Mapping) else inputs), labels


def hits(served: Served, task: ts.Task, batches: Iterable[Any]) -> Tensor:
    """Whether the file tells each sample right, bool (samples,)."""
    pairs = [listed(task, batch) for batch in batches]
    return torch.cat([served(inputs).argmax(1) == labels for inputs, labels in pairs])


def accuracy(told: Tensor) -> float:
    """Per cent of the samples that are told right."""
    return 100 * float(told.double().mean())


def samples(task: ts.Task, count: int = SAMPLES) -> list[list[Tensor]]:
    """The first samples of val, each at its own length where a batch is padded."""
    inputs, _ = listed(task, next(iter(task.val)))
    lengths = _lengths(inputs)
    return [
        [tensor[number : number + 1, : lengths[number]] if tensor.dim() in (2, 3) else tensor[number : number + 1]
         for tensor in inputs]
        for number in range(count)
    ]  # fmt: skip


def _lengths(inputs: Sequence[Tensor]) -> list[int]:
    """Steps of the samples: by a mask, by a vector of lengths, else all."""
    if len(inputs) > 1:
        last = inputs[-1]
        return (last if last.dim() == 1 else last.sum(1)).tolist()
    return [inputs[0].shape[1]] * len(inputs[0])


def latency(sides: Mapping[str, Served], given: Sequence[Sequence[Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one sample by side, a value a round: the mean over the samples; sides take turns in any order.

    The time is that of this thread on its processor: a session with one thread computes in the thread that calls it,
    and time in which the machine runs other work does not count.
    """
    feeds = {name: [side.feed(inputs) for inputs in given] for name, side in sides.items()}
    order = random.Random(0)
    measured: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.thread_time()
    for number in range(WARMUP + rounds):
        if number >= WARMUP + FEWEST and time.thread_time() - begin > SECONDS:
            break
        for name in order.sample(list(sides), len(sides)):
            start = time.thread_time()
            for feed in feeds[name]:
                sides[name].session.run(None, feed)
            if number >= WARMUP:
                measured[name].append((time.thread_time() - start) * 1e3 / len(given))
    return measured
