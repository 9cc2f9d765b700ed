"""Teachers: one model or several, the student's own moving average, or cached outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchslim.core.arguments import check_weights
from torchslim.core.batches import Batch, call, take_first
from torchslim.core.checks import shown
from torchslim.core.distributed import whole
from torchslim.core.files import digest
from torchslim.core.fingerprint import canonical, fingerprint
from torchslim.core.imports import foreign, resolve
from torchslim.core.isolation import copy_model, preserved_globals
from torchslim.core.task import Task
from torchslim.core.trees import device_of, dtype_of, to_device, to_dtype
from torchslim.core.usable import usable
from torchslim.distill.features.taps import Tap, Watch, watched
from torchslim.distill.teacher_cache import TeacherCache, checks, write_all
from torchslim.errors import DistillError
from torchslim.training.loaders import seeded
from torchslim.training.loop import Hook, Loop


@dataclass(frozen=True, slots=True)
class Answer:
    """Outputs of teachers on a batch: the logits of every teacher, and the features of the first."""

    logits: Sequence[Tensor]
    features: Sequence[Tensor]

    def named(self) -> dict[str, Tensor]:
        """Logits and features by name."""
        logits = {f"logits_{number}": tensor for number, tensor in enumerate(self.logits)}
        return logits | {f"feature_{number}": tensor for number, tensor in enumerate(self.features)}

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Answer:
        """Answer from the tensors that `named` gives."""
        kinds = [
            [named[f"{kind}_{n}"] for n in range(len(named)) if f"{kind}_{n}" in named]
            for kind in ("logits", "feature")
        ]
        return cls(*kinds)


class Teacher(Protocol):
    """Gives the outputs on a batch; `index` holds the numbers of its samples, or is None where they have none."""

    def __call__(self, batch: Batch, index: Tensor | None, device: torch.device) -> Answer: ...


def answer(task: Task, model: nn.Module, batch: Batch) -> Any:
    """Outputs of a model on a batch, which may be on any device."""
    return call(model, to_dtype(task.inputs(to_device(batch, device_of(model))), dtype_of(model)))


class Teachers:
    """Runs modules in eval mode without gradients; the first is watched at the taps, after a rehearsal on a batch."""

    def __init__(
        self, task: Task, modules: Sequence[nn.Module], taps: Sequence[Tap], stack: ExitStack, batch: Batch
    ) -> None:
        self.task, self.modules, self.taps = task, modules, taps
        self.watch = Watch(tap.path for tap in taps)
        if taps:
            stack.enter_context(watched(modules[0], self.watch.keep, self.watch.outputs))
            self.watch.rehearse(modules[0], lambda: answer(task, modules[0], batch))

    def __call__(self, batch: Batch, index: Tensor | None, device: torch.device) -> Answer:
        logits = []
        self.watch.clear()
        for module in self.modules:
            if device_of(module) != device:
                module.to(device)
            inputs = to_dtype(self.task.inputs(batch), dtype_of(module))  # may be in half, unlike the student
            with torch.no_grad():
                logits.append(_single(self.task.logits(call(module, inputs))))
        features = [feature if feature is None else _single(feature) for feature in self.watch.features(self.taps)]
        missing = next((tap.name for tap, feature in zip(self.taps, features, strict=True) if feature is None), None)
        if missing is not None:
            raise DistillError(f"the teacher's {missing!r} did not run on a batch; tap a module that runs on all")
        return Answer(logits, [feature for feature in features if feature is not None])


def _single(tensor: Tensor) -> Tensor:
    """The tensor, as float32 if it is in half precision: user functions may not take two types."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Remembering:
    """Teachers that run once on each sample; later outputs on it are read from the cache."""

    def __init__(self, inner: Teachers, folder: Path) -> None:
        weights = [fingerprint(module.state_dict()) for module in inner.modules]
        accessors = [canonical(function) for function in (inner.task.inputs, inner.task.logits)]
        # equal weights may be used by other code, or with another configuration: outputs on a batch show it
        with preserved_globals(0), seeded(inner.task.val, 0, 0):
            batch = take_first(inner.task.val, "val")
        outputs = inner(to_device(batch, device_of(inner.modules[0])), None, device_of(inner.modules[0]))
        figures = {
            name: [list(tensor.shape), f"{float(tensor.double().norm()):.3g}", f"{float(tensor.double().mean()):.3g}"]
            for name, tensor in outputs.named().items()
        }
        classes = [f"{type(module).__module__}.{type(module).__qualname__} {module}" for module in inner.modules]
        key = digest(weights, classes, [(tap.name, list(tap.shape)) for tap in inner.taps], accessors, figures)
        self.inner, self.cache = inner, TeacherCache(folder, key)

    def __call__(self, batch: Batch, index: Tensor | None, device: torch.device) -> Answer:
        assert index is not None
        index, check = index.cpu(), checks(self.inner.task.inputs(batch))
        cached = self.cache.find(index, check)
        if cached is not None:
            return Answer.of({name: value.to(device) for name, value in cached.items()})
        outputs = self.inner(batch, index, device)
        for name, rows in outputs.named().items():
            if not rows.dim() or len(rows) != len(index):
                raise DistillError(
                    f"the teacher's {name} has shape {tuple(rows.shape)} for {len(index)} samples; a cache needs a row "
                    "for each sample: leave it out"
                )
        self.cache.keep(index, check, outputs.named())
        return outputs


class WriteCache(Hook):
    """Writes the cache at the end of every epoch, before the epoch's checkpoint."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def on_epoch(self, loop: Loop) -> None:
        """Write the cache, and read the shards that other processes wrote."""
        write_all([self.cache])


class Average(Hook):
    """Moving average of the student from its first step on, a teacher of the same architecture.

    After n steps the newest has weight max(1 - decay, 1 / (n + 1)): at first all steps count alike, then the last ones
    most. Buffers are copied from the student.

    Source: Tarvainen & Valpola 2017, arXiv:1703.01780, section 2.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay = copy_model(model)[0].eval().requires_grad_(False), decay

    @torch.no_grad()
    def on_step(self, loop: Loop) -> None:
        """Move the average towards the student."""
        weight = max(1 - self.decay, 1 / (loop.step + 1))
        ours, theirs = dict(self.module.named_parameters()), dict(loop.model.named_parameters())
        for name, average in ours.items():
            average.lerp_(whole(theirs[name]).to(average), weight)
        buffers = dict(loop.model.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])


def find_module(spec: Any, what: str) -> nn.Module:
    """Copy of a module, or the module that "package.module:callable" gives.

    Raises:
        DistillError: `spec` cannot be imported, gives no module, or one that cannot be used: TorchScript, parameters
            without values, or NaN among them.
    """
    module = resolve(spec, what, DistillError) if isinstance(spec, str) else spec
    is_module = isinstance(module, nn.Module)
    if not is_module:
        with foreign(f"{what} {shown(spec)} cannot be made", DistillError):
            module = module() if callable(module) else module
        if not isinstance(module, nn.Module):
            raise DistillError(f"{what} {shown(spec)} must be a module or give one, got {shown(module)}")
    usable(module, DistillError, f"the {what}")  # a compiled module stays compiled
    check_weights(module, DistillError, what)
    return copy_model(module)[0] if is_module else module
