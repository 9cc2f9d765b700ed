"""The task of a LightningModule: its loaders, the loss of its training_step and a metric of its validation_step.

The steps run on a copy of the module in which the model's forward is replaced: it returns the outputs of the model that
is trained or measured at the moment, or reads the inputs that a step passes. Lightning itself is not imported:
`lightning` and `pytorch_lightning` have the same methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.adapters.loaders import first_of
from torchslim.core.batches import Batch, Outputs, Predict, batch_size, call, predictor
from torchslim.core.checks import got, shown
from torchslim.core.imports import foreign
from torchslim.core.isolation import duplicate, preserved_globals
from torchslim.core.metrics import METRICS, Metric, TorchMetric
from torchslim.core.task import Task
from torchslim.core.trees import changed, tensors
from torchslim.errors import TaskError

LIBRARIES = ("lightning", "pytorch_lightning", "lightning_fabric")
HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
"""Hooks that change a batch between the loader and a step."""

ERRORS = ("loss", "error")
"""Parts of the names of metrics of which less is better."""

REDUCTIONS: Mapping[Any, Callable[[Tensor, Tensor], Tensor]] = {
    # of the values of all batches, with the batches' sizes
    "mean": lambda values, sizes: (values * sizes).sum() / sizes.sum(),
    "sum": lambda values, sizes: values.sum(),
    "max": lambda values, sizes: values.max(),
    "min": lambda values, sizes: values.min(),
}
FUNCTIONS: Mapping[Any, str] = {torch.mean: "mean", torch.sum: "sum", torch.max: "max", torch.min: "min"}


def task(
    module: nn.Module,
    data: Any = None,
    *,
    metric: Any,
    model: str = "",
    higher_is_better: bool | None = None,
    loss: Callable[[Outputs, Batch], Tensor] | None = None,
    **options: Any,
) -> Task:
    """See `Task.from_lightning`.

    Raises:
        TaskError: no LightningModule, no loaders, or steps that cannot be used; the message says what to give instead.
    """
    if not isinstance(module, nn.Module) or not callable(getattr(module, "training_step", None)):
        raise TaskError(f"module must be a LightningModule, with a training_step, {got(module)}")
    splits = _splits(module, data, {name: options.pop(name, None) for name in ("train", "val", "test")})
    if splits["val"] is None:
        raise TaskError("val is None; give val=loader, or a LightningDataModule with a val_dataloader")
    steps = Steps(module, model)
    if loss is None and splits["train"] is not None:
        _check_training(module, steps, splits["train"], options.get("inputs"))
        loss = steps.loss
    name = metric if isinstance(metric, str) and metric not in METRICS else None
    if name is not None:
        steps.check_hook("validation_step", f"metric={name!r}")
        if higher_is_better is None:
            higher_is_better = not any(part in name.lower() for part in ERRORS)
        metric = Metric(fn=Logged(steps, name), name=name, higher_is_better=higher_is_better)
    elif higher_is_better is not None:
        raise TaskError(f"higher_is_better={higher_is_better} goes with the name of a logged metric, {got(metric)}")
    return Task(**{**splits, "inputs": steps.inputs, **options}, metric=metric, loss=loss)


def _splits(module: nn.Module, data: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The loaders that were given, or else those of the data module or the module."""
    source = module if data is None else data
    if not callable(getattr(source, "val_dataloader", None)):
        raise TaskError(f"data must be a LightningDataModule, {got(data)}; or give train=loader and val=loader")
    for hook in HOOKS:
        if _overridden(source, hook) or _overridden(module, hook):
            raise TaskError(f"{hook} changes batches outside of the loaders; give train= and val= loaders that do so")
    missing = [name for name, loader in given.items() if loader is None and _overridden(source, f"{name}_dataloader")]
    with foreign("the data cannot be prepared", TaskError):
        if missing and data is not None:
            data.prepare_data()
            for stage in ("fit", *(("test",) if "test" in missing else ())):
                data.setup(stage)
        loaders = {name: getattr(source, f"{name}_dataloader")() for name in missing}
    return {**given, **{name: _only(loader, name) for name, loader in loaders.items()}}


def _only(loaders: Any, name: str) -> Any:
    """The only one of several loaders."""
    if not isinstance(loaders, (list, tuple)):
        return loaders
    if len(loaders) != 1:
        raise TaskError(f"{name}_dataloader gives {len(loaders)} loaders; give {name}= one of them")
    return loaders[0]


def _overridden(owner: Any, name: str) -> bool:
    """Whether the user's class defines a method that Lightning's classes only declare."""
    method = getattr(type(owner), name, None)
    return method is not None and str(getattr(method, "__module__", "")).partition(".")[0] not in LIBRARIES


class _Passed(Exception):
    """Ends a step at its call of the model."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments_ = args, kwargs


@dataclass
class _Log:
    """Values that steps logged under one name."""

    reduction: Any = "mean"
    values: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def total(self, name: str) -> float:
        """One number of all values, as a Trainer shows it."""
        last = self.values[-1]
        if isinstance(last, TorchMetric):
            return float(last.compute())
        reduction = FUNCTIONS.get(self.reduction, self.reduction)
        if reduction not in REDUCTIONS:
            raise TaskError(f"{name!r} is logged with reduce_fx={shown(reduction)}; one of {', '.join(REDUCTIONS)}")
        values = torch.tensor([float(value) for value in self.values], dtype=torch.float64)
        return float(REDUCTIONS[reduction](values, torch.tensor(self.sizes, dtype=torch.float64)))


class Steps:
    """The steps of a copy of a LightningModule, with any model in place of the module's own."""

    def __init__(self, module: nn.Module, path: str) -> None:
        if getattr(module, "automatic_optimization", True) is False:
            raise TaskError("training_step optimizes by itself (automatic_optimization=False); give loss=function")
        self.module, self.path = duplicate(module), path
        try:
            self.model = self.module.get_submodule(path)
        except AttributeError as error:
            names = ", ".join(name for name, _ in module.named_children()) or "none"
            raise TaskError(f"model={path!r} is no part of {type(module).__name__}; its parts: {names}") from error
        self.signature = inspect.signature(self.model.forward)
        self.logs: dict[str, _Log] = {}
        self.size = 1
        vars(self.module).update(log=self._log, log_dict=self._log_all)

    def check_hook(self, name: str, needed: str) -> None:
        """Raise TaskError unless the user's class has a step."""
        if not _overridden(self.module, name):
            raise TaskError(f"{needed} needs a {name} in {type(self.module).__name__}; give a function as the metric")

    def inputs(self, batch: Batch) -> tuple[Any, ...] | dict[str, Any]:
        """What training_step passes to the model."""

        def stop(*args: Any, **kwargs: Any) -> None:
            raise _Passed(args, kwargs)

        try:
            self.run("training_step", batch, stop)
        except _Passed as passed:
            args, kwargs = passed.arguments_
            if not kwargs:
                return args
            return dict(self.signature.bind(*args, **kwargs).arguments) if args else kwargs
        what = f"the attribute {self.path!r}" if self.path else "the module itself"
        raise TaskError(f"training_step never calls {what}; name the part that it calls: model='net'")

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The loss that training_step computes from these outputs."""
        calls = []

        def given(*args: Any, **kwargs: Any) -> Outputs:
            calls.append(args)
            return outputs

        returned = self.run("training_step", batch, given, like=outputs)
        if len(calls) != 1:
            raise TaskError(
                f"training_step calls the model {len(calls)} times; give loss=function(outputs, batch) and "
                "inputs=function(batch)"
            )
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if not isinstance(loss, Tensor):
            raise TaskError(f"training_step must return a loss, {got(loss)}; give loss=function(outputs, batch)")
        return loss

    def run(self, step: str, batch: Batch, model: Callable[..., Outputs], *, like: Any = None, index: int = 0) -> Any:
        """What a step returns for a batch, with `model` in place of the module's."""
        self.module.train(step == "training_step")
        leaves = tensors(like if like is not None else batch)
        if leaves and any(tensor.device != leaves[0].device for tensor in self.module.parameters()):
            self.module.to(leaves[0].device)
        method = getattr(self.module, step)
        with self.replaced(model):
            return method(batch, index) if len(inspect.signature(method).parameters) > 1 else method(batch)

    @contextmanager
    def replaced(self, model: Callable[..., Outputs]) -> Iterator[None]:
        """Let calls of the module's model call `model`."""
        vars(self.model)["forward"] = model
        try:
            yield
        finally:
            del vars(self.model)["forward"]

    def _log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        log = self.logs.setdefault(name, _Log(options.get("reduce_fx", "mean")))
        log.values.append(value.detach() if isinstance(value, Tensor) else value)
        log.sizes.append(options.get("batch_size") or self.size)

    def _log_all(self, values: Mapping[str, Any], *args: Any, **options: Any) -> None:
        for name, value in values.items():
            self._log(name, value, **options)


@dataclass(frozen=True)
class Logged:
    """A metric: the value that validation_step, or the end of its epoch, logs or returns under a name."""

    steps: Steps
    name: str

    def __call__(self, predict: Predict, batches: Iterable[Batch]) -> float:
        steps = self.steps
        steps.logs.clear()
        for part in steps.module.modules():
            if isinstance(part, TorchMetric):
                part.reset()
        with torch.no_grad():
            self._hook("on_validation_epoch_start")
            for index, batch in enumerate(batches):
                steps.size = batch_size(batch)
                returned = steps.run("validation_step", batch, predict, index=index)
                if isinstance(returned, Mapping) and self.name in returned and self.name not in steps.logs:
                    returned = {self.name: returned[self.name]}
                    steps.module.log_dict(returned)  # type: ignore[operator]
            self._hook("on_validation_epoch_end")
        if self.name not in steps.logs:
            names = ", ".join(steps.logs) or "nothing"
            raise TaskError(f"validation_step logs no {self.name!r}; it logs {names}; give metric= one of them")
        return steps.logs[self.name].total(self.name)

    def _hook(self, name: str) -> None:
        if _overridden(self.steps.module, name):
            getattr(self.steps.module, name)()


def _check_training(module: nn.Module, steps: Steps, train: Iterable[Batch], inputs: Any) -> None:
    """Raise TaskError unless the loss of training_step can be computed from outputs of the model alone."""
    batch = first_of(train, "train")
    mend = "give loss=function(outputs, batch)"
    with preserved_globals(), torch.enable_grad(), foreign(f"training_step cannot be used; {mend}", TaskError):
        passed = inputs(batch) if inputs is not None else steps.inputs(batch)
        if inputs is None and not _equal(passed, steps.inputs(batch)):
            raise TaskError(
                "training_step passes other inputs to the model at every call, such as augmented ones; augment in the "
                f"data set, or {mend} and inputs=function(batch)"
            )
        outputs = call(predictor(module.get_submodule(steps.path)), passed)
        outputs = changed(outputs, lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()))
        loss = steps.loss(outputs, batch)
        if loss.numel() != 1 or not loss.requires_grad:
            raise TaskError(f"training_step must return one number that depends on the model's outputs; {mend}")
        weights = [weight for weight in steps.model.parameters() if weight.requires_grad]
        used = torch.autograd.grad(loss, weights, allow_unused=True) if weights else ()
        if any(gradient is not None for gradient in used):
            raise TaskError(f"training_step reads weights of the model besides its outputs, as a penalty does; {mend}")
    steps.module.requires_grad_(False)


def _equal(first: Any, second: Any) -> bool:
    ones, others = tensors(first), tensors(second)
    return len(ones) == len(others) and all(map(torch.equal, ones, others))
