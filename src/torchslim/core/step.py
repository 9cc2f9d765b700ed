"""The central abstraction: a step takes a model and returns a model, with evidence of its changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from torchslim.core.checks import Seed, Threads, check_fields
from torchslim.core.measurement import Measurement, Speedup
from torchslim.core.program_names import first_programs
from torchslim.core.task import Task
from torchslim.core.tensor_objects import of_structure
from torchslim.errors import RecipeError

Inputs = tuple[Any, ...] | dict[str, Any]
"""Example inputs: a tuple of positional arguments or a dict of keyword arguments."""

LOGGER = logging.getLogger("torchslim")
REHEARSAL, FORECAST = "rehearsal", "forecast"  # `Event.step` of a run before its first step
SECONDS_LEFT, TRAINING_LEFT = "seconds_left", "training_seconds_left"  # in `Event.values`: of a run, of its trainings


class Form(Enum):
    """Form of a model, which decides what steps can still do with it."""

    MODULE = "module"  # an ordinary nn.Module: editable, trainable
    QUANTIZED = "quantized"  # weights fixed; it can only be deployed, saved and measured


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """Effect of one step on one layer, or the reason why the step left the layer unchanged."""

    version: ClassVar[int] = 1

    layer: str
    action: Literal["pruned", "quantized", "trained", "refused"]
    reason: str = ""
    sparsity: float | None = None  # fraction of this layer's weights that are removed or fixed at zero
    weight_bits: int | None = None
    activation_bits: int | None = None
    sqnr_db: float | None = None  # of its output against float; includes errors of the layers before it
    kernel: str = ""  # kernel that computes the layer on the target runtime
    integer: bool | None = None  # whether that kernel computes on integers

    def __post_init__(self) -> None:
        check_fields(
            self,
            RecipeError,
            "LayerRecord: ",
            only=[field_.name for field_ in fields(self) if field_.name != "sqnr_db"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Model that a step returns, with its evidence.

    `masks` maps parameter names to boolean tensors of the parameter's shape, True where the weight is kept.
    `history` holds one row per trained epoch.
    """

    model: nn.Module
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    layers: Sequence[LayerRecord] = ()
    warnings: Sequence[str] = ()
    history: Sequence[Mapping[str, float]] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)  # further findings, as JSON, for the report

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "Outcome: ", only=("model", "masks", "layers", "warnings"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Runtime and threads for deployment. With `threads` None the runtime chooses."""

    runtime: str = "onnxruntime"
    threads: Threads | None = None

    def __post_init__(self) -> None:
        check_fields(self, RecipeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Devices on which training runs; the names are Lightning Fabric's.

    If several processes train (torchrun), `strategy` "ddp" gives every process a copy of the model, and "fsdp" shards
    weights, gradients and the optimizer's state over the processes.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    strategy: str = "auto"
    precision: str | None = None  # None: full precision on CPU, bf16 mixed if the device supports it

    def __post_init__(self) -> None:
        check_fields(self, RecipeError)
        if isinstance(self.devices, int) and self.devices < 1 and self.devices != -1:
            raise RecipeError(f"devices must be at least 1, or -1 for all, got {self.devices}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress of a step: `phase` has reached `current` of `total` (None: unknown)."""

    step: str
    phase: str
    current: int = 0
    total: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "Event: ", only=("step", "phase", "current", "total"))


def log_progress(event: Event) -> None:
    """Log phases at level INFO and progress within a phase at DEBUG, to "torchslim"; the default progress callback.

    Nothing is shown unless the program has set up logging.
    """
    level = logging.DEBUG if event.total is not None else logging.INFO
    if LOGGER.isEnabledFor(level):
        counted = "" if event.total is None else f" {event.current}/{event.total}"
        values = "".join(f"  {key} {value:.4g}" for key, value in event.values.items())
        LOGGER.log(level, "%s: %s%s%s", event.step, event.phase, counted, values)


def ignore_progress(event: Event) -> None:
    """Progress callback of all processes except the first: does nothing."""


Makers = Mapping[str, Callable[[], nn.Module | None]]
"""Factories of models by name; a factory returns None if it cannot make the model."""


class Workbench(Protocol):
    """Service of a runner for its steps: deploys and times models on the target, as they will ship."""

    def deploy(self, model: nn.Module) -> Callable[..., Any]:
        """Deploy `model` on the target runtime; the result is called like the model."""
        ...

    def latency(self, models: Makers, reference: nn.Module, *, again: bool = False) -> Mapping[str, float]:
        """Time of each model over the reference's, both finished as the recipe ends, from paired rounds.

        A model is made only when it is timed; if its maker returns None, it is left out. A name that was timed before
        on this machine, for a reference of the same structure, is not timed again unless `again` is set.
        """
        ...

    def compare(
        self, deployed: Mapping[str, Callable[..., Any]], reference: str
    ) -> Mapping[str, tuple[Measurement, Speedup]]:
        """Milliseconds of deployed models, and their speed-up over one of them, from paired rounds."""
        ...

    def layer_times(self, deployed: Callable[..., Any]) -> Mapping[str, float] | None:
        """Milliseconds of the layers of a deployed model, by path, from the runtime's profiler; None without one."""
        ...

    def about(self, reference: nn.Module) -> Mapping[str, Any]:
        """Key of times over `reference`, the same on every machine: runtime, threads, and structure."""
        ...

    def within(self, path: str) -> Workbench:
        """The same service for a part of the model, called as the whole model calls it."""
        ...


CHECKED = (
    "task",
    "teacher",
    "example_inputs",
    "examples",
    "parts",
    "model",
    "target",
    "engine",
    "seed",
    "progress",
    "name",
    "state",
    "key",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything that a step may use besides the model."""

    task: Task
    teacher: nn.Module
    example_inputs: Inputs
    model: nn.Module | None = None  # the run's first model, for `check`; None: the teacher has its architecture
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    target: Target = field(default_factory=Target)
    engine: Engine = field(default_factory=Engine)
    seed: Seed = 0
    progress: Callable[[Event], None] = log_progress
    name: str = "step"
    state: Path | None = None  # folder for checkpoints inside the step; None: nothing to resume from
    key: str = ""  # of the run up to this step; seals the step's files in `state`
    workbench: Workbench | None = None  # None outside of a run: models cannot be measured on the target
    priors: Mapping[str, float] = field(default_factory=dict)  # relative damage, by channel group and layer
    examples: Sequence[Inputs] = ()  # inputs whose sizes span those of later calls, for `dynamic_shapes="auto"`
    dynamic_shapes: Any = "auto"  # which sizes captured programs leave free, as for `torchslim.deploy`
    parts: Mapping[str, Sequence[Inputs]] = field(default_factory=dict)  # examples of the parts; empty: no parts
    calibration: object = None  # as `torchslim.training.calibration.calibration_of` returns it

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "Context: ", only=CHECKED)

    @property
    def captured_with(self) -> Inputs | list[Inputs]:
        """The inputs to capture a model with: all examples, or else the example inputs."""
        return list(self.examples) or self.example_inputs

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the parts that steps change; `("",)` for the whole model."""
        return first_programs(self.parts) or ("",)

    def within(self, path: str) -> Context:
        """The context as a part sees it: its example inputs, and a workbench that deploys and times the part alone."""
        if not path:
            return self
        examples = of_structure(self.parts[path], self.parts[path][0])
        bench = None if self.workbench is None else self.workbench.within(path)
        return replace(self, example_inputs=examples[0], examples=examples, workbench=bench, parts={})


@runtime_checkable
class Step(Protocol):
    """A step of a recipe: a frozen dataclass that is config, recipe schema and code at once.

    A step may change the model that it receives, because the runner passes a copy.
    """

    accepts: ClassVar[Form]
    produces: ClassVar[Form]

    def check(self, ctx: Context) -> None:
        """Raise for every error that can be detected before the step runs."""
        ...

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome: ...


@runtime_checkable
class MakesModel(Protocol):
    """A step that may train a network other than the one that it receives."""

    def initial_model(self, model: nn.Module, seed: int) -> nn.Module:
        """Model that the step starts from: `model`, or a network of its own, the same for equal seeds."""
        ...


@runtime_checkable
class Trains(Protocol):
    """A step that may train the model."""

    def trainings(self) -> Sequence[int]:
        """Number of epochs of each training, in the order in which they run."""
        ...


CHOICE_SECONDS = "choice_seconds"
"""Key of an event's values: seconds of a choice that was tried; `total` of the event is how many a run may try."""


@runtime_checkable
class Times(Protocol):
    """A step that times programs on the target, which its form for a rehearsal leaves out."""

    def timed_programs(self, model: nn.Module, ctx: Context) -> Mapping[str, int]:
        """Number of programs that the step makes and times for a model, at most, by the path of the part."""
        ...


@runtime_checkable
class Rehearses(Protocol):
    """A step that has a cheaper form for the rehearsal of a run, which judges that things run and not their quality."""

    def rehearsed(self, folder: Path) -> Step:
        """Return the same work at least effort: one epoch, one round, bounds on quality that always hold.

        Args:
            folder: for files that the step would otherwise leave elsewhere; deleted after the rehearsal.
        """
        ...


@runtime_checkable
class DependsOnMore(Protocol):
    """A step whose result depends on more than its own fields."""

    def cache_inputs(self, steps: Sequence[Step]) -> Sequence[Any]:
        """Further inputs of the cached result, from the whole recipe and from files, as values for `digest`."""
        ...


def step_name(step: object) -> str:
    """Name of a step in reports and messages: its class name in lower case."""
    return type(step).__name__.lower()


def check_order(steps: Sequence[Step]) -> None:
    """Raise RecipeError if a step would get a model in a form that it does not accept."""
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
                f"from a {form.value!r} one; put a step that produces it first"
            )
        if step.produces is not form:
            form, producer = step.produces, index
