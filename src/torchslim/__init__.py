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

from torchslim import distill, prune, quantize
from torchslim.analysis.result import Sensitivity
from torchslim.analysis.sensitivity import sensitivity
from torchslim.artifact.assembled import DeployedParts
from torchslim.artifact.deployment import deploy
from torchslim.artifact.loading import load, load_module
from torchslim.artifact.storage import save
from torchslim.core.budget import Budget
from torchslim.core.metrics import Metric
from torchslim.core.step import Context, Engine, Event, Form, LayerRecord, Outcome, Step, Target
from torchslim.core.task import Task
from torchslim.distill import DIST, DKD, KD, Distill
from torchslim.errors import TorchslimError
from torchslim.facade import compress
from torchslim.pipeline.result import Result
from torchslim.pipeline.target_bench import Bench
from torchslim.prune import Prune, surgery
from torchslim.quantize import Quantize
from torchslim.runtimes import Deployed
from torchslim.training.finetune import Finetune
from torchslim.training.loop import fit
from torchslim.tuning import SearchResult, search
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
