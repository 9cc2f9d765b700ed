"""What a runner lends to its steps: models on the target, ended as the recipe ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from torchslim.artifact.deployment import verified
from torchslim.artifact.latency_cache import LatencyTable
from torchslim.core.checks import check_fields
from torchslim.core.files import digest
from torchslim.core.fingerprint import canonical
from torchslim.core.step import Inputs, Makers, Step, Target
from torchslim.core.task import Task
from torchslim.errors import RecipeError
from torchslim.graph.export import capture
from torchslim.graph.layers import structure_of
from torchslim.quantize import Quantize, QuantizedModule, convert, prepare
from torchslim.runtimes import Deployed, find_runtime
from torchslim.training.calibration import CalibrationData

ROUNDS = 100  # of each program of a table, at most: of what is slow, as many as its time allows
VERDICT = 300  # of one that decides


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A `Workbench` for one run.

    Args:
        example_inputs: what is timed; one sample a call where the batch is free.
        target: the runtime, and its threads.
        task: calibrates where the recipe ends with integers; without one the example inputs do.
        steps: of the recipe; the last `Quantize` says how it ends.
    """

    example_inputs: Inputs
    target: Target = field(default_factory=Target)
    task: Task | None = None
    steps: Sequence[Step] = ()
    dynamic_shapes: Any = "batch"

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "Bench: ")

    def deploy(self, model: nn.Module) -> Deployed:
        """The model on the target, verified: where it is quantized, layers that the target gets wrong are in float."""
        return verified(model, self.compile)

    def compile(self, model: nn.Module) -> Deployed:
        """The model on the target, as it is."""
        captured = capture(model, self.example_inputs, self.dynamic_shapes)
        return find_runtime(self.target.runtime).compile(captured, threads=self.target.threads, source=model)

    def latency(self, models: Makers, reference: nn.Module, *, again: bool = False) -> Mapping[str, float]:
        """Time of each model over the reference's, both ended as the recipe ends; see `steps.Workbench`."""
        table = LatencyTable(self.target.runtime, self.target.threads)
        first = self.about(reference)["structure"]
        known = {} if again else table.known(first)  # by name: to make a program takes seconds
        made = {name: model for name, make in models.items() if name not in known and (model := make()) is not None}
        if made:
            deployed = {name: self.deploy(self.ended(each)) for name, each in made.items()}
            timed = table.measure(
                deployed, self.deploy(self.ended(reference)), again=again, rounds=VERDICT if again else ROUNDS
            )
            known |= timed
            if not again:
                table.add(first, timed)
        return {name: known[name].ratio.value for name in models if name in known}

    def about(self, reference: nn.Module) -> dict[str, Any]:
        """What times over a reference are times of; see `steps.Workbench`."""
        program = capture(reference, self.example_inputs, self.dynamic_shapes).program
        last = self._ending()
        ends = {} if last is None else {"scheme": last.scheme, "layers": canonical(last.layers)}
        return {
            "runtime": self.target.runtime,
            "threads": self.target.threads,
            "ends": ends.get("scheme", "float"),
            "structure": digest(structure_of(program), ends),
        }

    def _ending(self) -> Quantize | None:
        return next((step for step in reversed(self.steps) if isinstance(step, Quantize)), None)

    def ended(self, model: nn.Module) -> nn.Module:
        """The model in the numbers that the recipe ends with, calibrated on one batch: fast is not yet good."""
        last = self._ending()
        if last is None or isinstance(model, QuantizedModule):
            return model
        quick = replace(last, observer="min-max")
        layers = quick.layers if isinstance(quick.layers, Mapping) else {}
        prepared = prepare(
            model,
            self.example_inputs,
            runtime=self.target.runtime,
            scheme=quick.scheme,
            layers=layers,
            observer=quick.observer,
            dynamic_shapes=self.dynamic_shapes,
        )
        if quick.calibrates():
            task = self.task
            prepared.calibrate([self.example_inputs] if task is None else CalibrationData(task, 0).first(1))
        return convert(prepared, checks=None)
