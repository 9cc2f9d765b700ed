"""torchslim: a trained PyTorch model, smaller and faster, and proven so.

import torchslim as ts

result = ts.compress(model, task, steps=[ts.Prune(sparsity=0.5), ts.Distill(epochs=3), ts.Quantize("int8")])
print(result)
result.save("out/")
"""

from torchslim._version import __version__  # noqa: F401 - public
from torchslim.core import search_path as _search_path

if _search_path.started_as_module():  # before anything else is imported
    _search_path.current_folder_last()

from typing import TYPE_CHECKING

from torchslim.core.lazy_names import lazy_names

if TYPE_CHECKING:
    from torchslim import distill, prune, quantize
    from torchslim.analysis.result import Sensitivity
    from torchslim.analysis.sensitivity import sensitivity
    from torchslim.artifact.assembled import DeployedParts
    from torchslim.artifact.deployment import deploy
    from torchslim.artifact.loading import load, load_module
    from torchslim.artifact.remote import TimingWorker
    from torchslim.artifact.storage import save
    from torchslim.core.budget import Budget
    from torchslim.core.metrics import Metric
    from torchslim.core.step import Context, Engine, Event, Form, LayerRecord, Outcome, Step, Target
    from torchslim.core.task import Task
    from torchslim.distill.losses.response import DIST, DKD, KD
    from torchslim.distill.step import Distill
    from torchslim.errors import TorchslimError
    from torchslim.facade import compress
    from torchslim.pipeline.result import Result
    from torchslim.pipeline.target_bench import Bench
    from torchslim.prune.step import Prune
    from torchslim.prune.structured.record import surgery
    from torchslim.quantize.step import Quantize
    from torchslim.runtimes.base import Deployed
    from torchslim.training.finetune import Finetune
    from torchslim.training.loop import fit
    from torchslim.tuning.result import SearchResult
    from torchslim.tuning.search_loop import search
    from torchslim.tuning.suggest import Suggestion, suggest

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "Bench",
    "Budget",
    "Context",
    "Deployed",
    "DeployedParts",
    "Distill",
    "Engine",
    "Event",
    "Finetune",
    "Form",
    "LayerRecord",
    "Metric",
    "Outcome",
    "Prune",
    "Quantize",
    "Result",
    "SearchResult",
    "Sensitivity",
    "Step",
    "Suggestion",
    "Target",
    "Task",
    "TimingWorker",
    "TorchslimError",
    "compress",
    "deploy",
    "distill",
    "fit",
    "load",
    "load_module",
    "prune",
    "quantize",
    "save",
    "search",
    "sensitivity",
    "suggest",
    "surgery",
]

_HOMES = {
    "DIST": "distill.losses.response",
    "DKD": "distill.losses.response",
    "KD": "distill.losses.response",
    "Bench": "pipeline.target_bench",
    "Budget": "core.budget",
    "Context": "core.step",
    "Deployed": "runtimes.base",
    "DeployedParts": "artifact.assembled",
    "Distill": "distill.step",
    "Engine": "core.step",
    "Event": "core.step",
    "Finetune": "training.finetune",
    "Form": "core.step",
    "LayerRecord": "core.step",
    "Metric": "core.metrics",
    "Outcome": "core.step",
    "Prune": "prune.step",
    "Quantize": "quantize.step",
    "Result": "pipeline.result",
    "SearchResult": "tuning.result",
    "Sensitivity": "analysis.result",
    "Step": "core.step",
    "Suggestion": "tuning.suggest",
    "Target": "core.step",
    "Task": "core.task",
    "TimingWorker": "artifact.remote",
    "TorchslimError": "errors",
    "compress": "facade",
    "deploy": "artifact.deployment",
    "distill": "distill",
    "fit": "training.loop",
    "load": "artifact.loading",
    "load_module": "artifact.loading",
    "prune": "prune",
    "quantize": "quantize",
    "save": "artifact.storage",
    "search": "tuning.search_loop",
    "sensitivity": "analysis.sensitivity",
    "suggest": "tuning.suggest",
    "surgery": "prune.structured.record",
}
if not TYPE_CHECKING:  # type checkers know the names from the imports above
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
