"""The bench that a runner gives to its steps: deploys and times models on the target, finished as the recipe ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from torchslim.artifact.assembled import AnyDeployed, DeployedParts
from torchslim.artifact.deployment import deploy_programs, verified
from torchslim.artifact.latency import ROUND_SECONDS, Timings, compare, resized
from torchslim.artifact.latency_cache import SECONDS, LatencyTable
from torchslim.artifact.remote import TimingWorker
from torchslim.artifact.shipped import as_saved
from torchslim.core.checks import check_fields
from torchslim.core.files import digest
from torchslim.core.fingerprint import canonical
from torchslim.core.measurement import Measurement, Speedup
from torchslim.core.parts import part_views
from torchslim.core.step import Inputs, Makers, Step, Target
from torchslim.core.task import Task
from torchslim.core.tensor_objects import of_structure
from torchslim.errors import RecipeError
from torchslim.graph.export import capture
from torchslim.graph.layers import structure_of
from torchslim.quantize import Quantize, QuantizedModule, convert, prepare
from torchslim.runtimes import Deployed, find_runtime
from torchslim.runtimes.kernel_times import kernel_times
from torchslim.training.calibration import CalibrationData

ROUNDS = 100  # at most, for each program of a latency table; slow programs get as many as their time limit allows
VERDICT = 300  # for a measurement that decides


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A `Workbench` for one run.

    Args:
        example_inputs: inputs of the timed calls; one sample a call where the batch is free.
        target: the runtime and its threads.
        task: source of calibration data where the recipe ends with integers; None: the example inputs.
        steps: steps of the recipe; the last `Quantize` sets the scheme of every timed model.
        examples: further inputs, whose sizes span those of later calls, for `dynamic_shapes="auto"`.
        dynamic_shapes: as for `torchslim.deploy`.
        parts: examples of the parts that are deployed, by path; empty: the whole model is deployed.
        worker: times programs, in place of this machine.
    """

    example_inputs: Inputs
    target: Target = field(default_factory=Target)
    task: Task | None = None
    steps: Sequence[Step] = ()
    examples: Sequence[Inputs] = ()
    dynamic_shapes: Any = "auto"
    parts: Mapping[str, Sequence[Inputs]] = field(default_factory=dict)
    worker: TimingWorker | None = None

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "Bench: ")

    def within(self, path: str) -> Bench:
        """The bench of a part: its calibration data are its example inputs, since only the speed counts."""
        examples = of_structure(self.parts[path], self.parts[path][0])
        return replace(self, example_inputs=examples[0], examples=examples, task=None, parts={})

    def deploy(self, model: nn.Module, *, saved: bool = False) -> AnyDeployed:
        """Compile the model for the target and check it; quantized layers that the target gets wrong stay in float.

        With `saved`, the model is checked as it is after it was saved and loaded again.
        """
        if not self.parts:
            return self.deploy_whole(model, saved)
        views = part_views(model, self.parts)
        parts = deploy_programs(views, self.parts, lambda name, view: self.within(name).deploy_whole(view, saved))
        return DeployedParts(model, parts, self.example_inputs, self.parts)

    def deploy_whole(self, model: nn.Module, saved: bool = False) -> Deployed:
        """`deploy` for a bench without parts."""
        return verified(model, self.compile, reload=as_saved(self.compile) if saved else None)

    def compile(self, model: nn.Module) -> Deployed:
        """Compile the model for the target, unchecked."""
        examples = list(self.examples) or self.example_inputs
        return find_runtime(self.target.runtime).compile(model, examples, self.dynamic_shapes, self.target.threads)

    def latency(self, models: Makers, reference: nn.Module, *, again: bool = False) -> Mapping[str, float]:
        """Return each model's time over the reference's, both finished as the recipe ends; see `Workbench.latency`."""
        table = self.latency_table()
        first = self.about(reference)["structure"]
        timings = {} if again else table.known(first)  # looked up by name: making a program takes seconds
        to_time = {
            name: model for name, make in models.items() if name not in timings and (model := make()) is not None
        }
        if to_time:
            deployed = {name: self.deploy(self.ended(model)) for name, model in to_time.items()}
            measured = table.measure(
                deployed, self.deploy(self.ended(reference)), again=again, rounds=VERDICT if again else ROUNDS
            )
            timings |= measured
            if not again:
                table.add(first, measured)
        return {name: timings[name].ratio.value for name in models if name in timings}

    @property
    def timer(self) -> Callable[..., Timings]:
        """Times programs, here or on the worker; as `artifact.latency.compare`."""
        return compare if self.worker is None else self.worker.compare

    def latency_table(self) -> LatencyTable:
        """The cache of latencies of the machine that times."""
        return LatencyTable(self.target.runtime, self.target.threads, worker=self.worker)

    def other_machines(self) -> dict[str, dict[str, Any]]:
        """Description of the worker's machine, by its name in measurements; empty without one."""
        machine = {} if self.worker is None else self.worker.machine()
        return {str(machine["processor"]): machine} if machine else {}

    def compare(self, deployed: Mapping[str, Any], reference: str) -> dict[str, tuple[Measurement, Speedup]]:
        """Latency and speed-up of deployed models; see `Workbench.compare`."""
        timings = self.timer(deployed, rounds=ROUNDS, seconds=SECONDS)
        return {name: (timings.latency(name), timings.speedup(name, reference)) for name in deployed}

    def layer_times(self, deployed: Any) -> dict[str, float] | None:
        """Milliseconds of the layers of a deployed model; see `Workbench.layer_times`."""
        if not isinstance(deployed, Deployed) or self.worker is not None:
            return None  # a worker has no profiler
        kernels = kernel_times(deployed, resized(deployed))
        if kernels is None:
            return None
        layers: dict[str, float] = {}
        for kernel in kernels:
            layer = kernel.node.rpartition("/")[0]
            layers[layer] = layers.get(layer, 0.0) + kernel.ms
        return layers

    def seconds_by_program(self, model: nn.Module) -> float:
        """About how long it takes to make and time one program of a latency table: of the model, as the recipe ends."""
        start = time.perf_counter()
        deployed = self.deploy(self.ended(model))
        made = time.perf_counter() - start
        call = self.timer({"program": deployed}, rounds=1).latency("program").value / 1e3
        return made + min(ROUNDS * max(call, ROUND_SECONDS), SECONDS)

    def about(self, reference: nn.Module) -> dict[str, Any]:
        """Return the key of times over `reference`; see `Workbench.about`."""
        program = capture(reference, self.example_inputs, self.dynamic_shapes).program
        last = self._ending()
        ending = {} if last is None else {"scheme": last.scheme, "layers": canonical(last.layers)}
        return {
            "runtime": self.target.runtime,
            "threads": self.target.threads,
            "ends": ending.get("scheme", "float"),
            "structure": digest(structure_of(program), ending),
        }

    def _ending(self) -> Quantize | None:
        return next((step for step in reversed(self.steps) if isinstance(step, Quantize)), None)

    def ended(self, model: nn.Module) -> nn.Module:
        """Quantize the model as the recipe ends; one calibration batch is enough, since only the speed counts."""
        last = self._ending()
        if last is None or isinstance(model, QuantizedModule):
            return model
        settings = replace(last, observer="min-max")
        layers = settings.layers if isinstance(settings.layers, Mapping) else {}
        prepared = prepare(
            model,
            list(self.examples) or self.example_inputs,
            runtime=self.target.runtime,
            scheme=settings.scheme,
            layers=layers,
            observer=settings.observer,
            dynamic_shapes=self.dynamic_shapes,
        )
        if settings.calibrates():
            task = self.task
            prepared.calibrate([self.example_inputs] if task is None else CalibrationData(task, 0).first(1))
        return convert(prepared, checks=None)
