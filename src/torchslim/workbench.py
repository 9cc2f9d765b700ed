"""What a runner lends to its steps: models on the target, ended as the recipe ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from torchslim.export import capture
from torchslim.latency_table import LatencyTable
from torchslim.quantize import Quantize, QuantizedModule, convert, prepare
from torchslim.runtimes import Deployed, find_runtime
from torchslim.steps import Inputs, Step, Target
from torchslim.task import Task


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A `Workbench` for one run.

    Args:
        task: calibrates where the recipe ends with integers.
        steps: of the recipe; the last `Quantize` says how it ends.
    """

    task: Task
    example_inputs: Inputs
    target: Target
    steps: Sequence[Step] = ()
    dynamic_shapes: Any = "batch"

    def deploy(self, model: nn.Module) -> Deployed:
        """The model on the target, as it is."""
        captured = capture(model, self.example_inputs, self.dynamic_shapes)
        return find_runtime(self.target.runtime).compile(captured, threads=self.target.threads, source=model)

    def latency(self, models: Mapping[str, nn.Module], reference: nn.Module) -> Mapping[str, float]:
        """Time of each model over the reference's, both ended as the recipe ends; see `steps.Workbench`."""
        table = LatencyTable(self.target.runtime, self.target.threads)
        deployed = {name: self.deploy(self.ended(each)) for name, each in models.items()}
        return {name: each.ratio for name, each in table.measure(deployed, self.deploy(self.ended(reference))).items()}

    def ended(self, model: nn.Module) -> nn.Module:
        """The model in the numbers that the recipe ends with, calibrated on one batch: fast is not yet good."""
        last = next((each for each in reversed(self.steps) if isinstance(each, Quantize)), None)
        if last is None or isinstance(model, QuantizedModule):
            return model
        quick = replace(last, observer="min-max")
        prepared = prepare(
            model, self.example_inputs, runtime=self.target.runtime, scheme=quick.scheme,
            layers=quick.layers, observer=quick.observer, dynamic_shapes=self.dynamic_shapes,
        )  # fmt: skip
        if quick.calibrates():
            prepared.calibrate(self.task.calibration_batches(1)[:1])
        return convert(prepared)
