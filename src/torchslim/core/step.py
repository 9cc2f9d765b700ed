"""The one abstraction: a step takes a model and returns a model, with the evidence of what it did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from torchslim.core.checks import Seed, Threads, check_fields
from torchslim.core.task import Task
from torchslim.errors import RecipeError

Inputs = tuple[Any, ...] | dict[str, Any]
"""Example inputs: a tuple of positional arguments or a dict of keyword arguments."""

LOGGER = logging.getLogger("torchslim")


class Form(Enum):
    """What can still be done with a model."""

    MODULE = "module"  # an ordinary nn.Module: editable, trainable
    QUANTIZED = "quantized"  # numbers fixed; only deploy, save and measure remain


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What one step did to one layer, or why it left the layer alone."""

    version: ClassVar[int] = 1

    layer: str
    action: Literal["pruned", "quantized", "trained", "refused"]
    reason: str = ""
    sparsity: float | None = None  # fraction of this layer's weights that are gone, or held at zero
    weight_bits: int | None = None
    activation_bits: int | None = None
    sqnr_db: float | None = None  # of its output against float, errors of the layers before it included
    kernel: str = ""  # what the target runtime computes it with
    integer: bool | None = None  # does that kernel compute on integers?

    def __post_init__(self) -> None:
        check_fields(
            self,
            RecipeError,
            "LayerRecord: ",
            only=[field_.name for field_ in fields(self) if field_.name != "sqnr_db"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A step's model and its evidence.

    `masks` maps parameter names to boolean tensors of the parameter's shape, True where the weight is kept.
    `history` holds one row per trained epoch.
    """

    model: nn.Module
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    layers: Sequence[LayerRecord] = ()
    warnings: Sequence[str] = ()
    history: Sequence[Mapping[str, float]] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)  # whatever else was found out, as JSON, for the report

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "Outcome: ", only=("model", "masks", "layers", "warnings"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the model will run. `threads` None leaves the choice to the runtime."""

    runtime: str = "onnxruntime"
    threads: Threads | None = None

    def __post_init__(self) -> None:
        check_fields(self, RecipeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """On which devices training runs; the names are Lightning Fabric's.

    Where several processes train (torchrun), `strategy` "ddp" gives each a copy of the model, and "fsdp" spreads
    weights, gradients and the optimizer's state over them.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    strategy: str = "auto"
    precision: str | None = None  # None: full precision on CPU, bf16 mixed where the device has it

    def __post_init__(self) -> None:
        check_fields(self, RecipeError)
        if isinstance(self.devices, int) and self.devices < 1 and self.devices != -1:
            raise RecipeError(f"devices must be at least 1, or -1 for all, got {self.devices}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress: `phase` of the step runs at `current` of `total` (None: unknown)."""

    step: str
    phase: str
    current: int = 0
    total: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "Event: ", only=("step", "phase", "current", "total"))


def log_progress(event: Event) -> None:
    """The default progress callback: log phases at level INFO and what happens within one at DEBUG, to "torchslim".

    Nothing is shown where the program has not set up logging.
    """
    level = logging.DEBUG if event.total is not None else logging.INFO
    if LOGGER.isEnabledFor(level):
        counted = "" if event.total is None else f" {event.current}/{event.total}"
        values = "".join(f"  {key} {value:.4g}" for key, value in event.values.items())
        LOGGER.log(level, "%s: %s%s%s", event.step, event.phase, counted, values)


def ignore_progress(event: Event) -> None:
    """For processes that are not the first: they say nothing."""


Makers = Mapping[str, Callable[[], nn.Module | None]]
"""What makes models, by their names; None: it cannot be made."""


class Workbench(Protocol):
    """What a runner lends to its steps: models on the target, as they will ship."""

    def deploy(self, model: nn.Module) -> Callable[..., Any]:
        """The model on the target runtime, called like the model."""
        ...

    def latency(self, models: Makers, reference: nn.Module, *, again: bool = False) -> Mapping[str, float]:
        """Time of each model over the reference's, both ended as the recipe ends, from paired rounds.

        What a name stands for is made only when it is timed; where that gives None, it is left out. What was timed
        before on this machine, under this name and for a reference of this structure, is not timed `again` unasked.
        """
        ...

    def about(self, reference: nn.Module) -> Mapping[str, Any]:
        """What times over a reference are times of, wherever they are taken: runtime, threads, and structure."""
        ...


CHECKED = ("task", "teacher", "example_inputs", "model", "target", "engine", "seed", "progress", "name", "state", "key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """All that a step may look at besides the model."""

    task: Task
    teacher: nn.Module
    example_inputs: Inputs
    model: nn.Module | None = None  # what the run starts from, for `check`; None: the teacher has its architecture
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    target: Target = field(default_factory=Target)
    engine: Engine = field(default_factory=Engine)
    seed: Seed = 0
    progress: Callable[[Event], None] = log_progress
    name: str = "step"
    state: Path | None = None  # folder for checkpoints inside the step; None: nothing to resume from
    key: str = ""  # of the run up to this step: what it keeps in `state` is sealed with it
    workbench: Workbench | None = None  # None outside of a run: then nothing can be measured on the target
    priors: Mapping[str, float] = field(default_factory=dict)  # by layer, how much its changes are known to hurt
    calibration: object = None  # of the step, as `torchslim.training.calibration.calibration_of` gives it

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "Context: ", only=CHECKED)


@runtime_checkable
class Step(Protocol):
    """Implemented by frozen dataclasses, at once config, recipe schema and code.

    A step may change the model that it is handed: the runner owns a copy.
    """

    accepts: ClassVar[Form]
    produces: ClassVar[Form]

    def check(self, ctx: Context) -> None:
        """Raise for all that can be known before any work."""
        ...

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome: ...


@runtime_checkable
class MakesModel(Protocol):
    """A step that may train another network than the one that it is handed."""

    def initial_model(self, model: nn.Module, seed: int) -> nn.Module:
        """What the step starts from: the model, or a network of its own, alike for equal seeds."""
        ...


@runtime_checkable
class Trains(Protocol):
    """A step that may train the model."""

    def trainings(self) -> Sequence[int]:
        """The epochs of each training, in the order in which they run."""
        ...


@runtime_checkable
class DependsOnMore(Protocol):
    """A step whose result depends on more than its own fields."""

    def cache_inputs(self, steps: Sequence[Step]) -> Sequence[Any]:
        """What else a kept result depends on, of the whole recipe and of files; each as `digest` takes it."""
        ...


def step_name(step: object) -> str:
    """The name of a step in reports and messages: its class, in lower case."""
    return type(step).__name__.lower()


def check_order(steps: Sequence[Step]) -> None:
    """Raise RecipeError when a step gets a model in a form that it does not accept."""
    form, producer = Form.MODULE, None
    for index, step in enumerate(steps, 1):
        if isinstance(step, type):
            raise RecipeError(f"step {index} is the class {step.__name__}; make one: {step.__name__}(...)")
        for attribute in ("accepts", "produces", "check"):
            if not hasattr(step, attribute):
                raise RecipeError(
                    f"step {index} ({step_name(step)!r}) has no {attribute!r}; a step is a dataclass with "
                    "accepts, produces, check(ctx) and __call__(model, ctx)"
                )
        if step.accepts is not form:
            raise RecipeError(
                f"step {index} ({step_name(step)!r}) needs a model in the form {step.accepts.value!r}, but step "
                f"{producer} ({step_name(steps[producer - 1])!r}) leaves it {form.value!r}; move step {index} "
                f"before step {producer}"
                if producer
                else f"step 1 ({step_name(step)!r}) accepts only a {step.accepts.value!r} model, but a run starts "
                f"from a {form.value!r} one; put the step that makes it before"
            )
        if step.produces is not form:
            form, producer = step.produces, index
