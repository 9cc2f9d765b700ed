"""torchslim: a trained PyTorch model, smaller and faster, and proven so.

import torchslim as ts

result = ts.compress(model, task, steps=[ts.Prune(sparsity=0.5), ts.Distill(epochs=3), ts.Quantize("int8")])
print(result)
result.save("out/")
"""

__version__ = "0.1.0"

from torchslim import _path

if _path.started_as_module():  # before anything else is imported
    _path.current_folder_last()

from torchslim import distill, prune, quantize
from torchslim.artifact import load, load_module, save
from torchslim.budget import Budget
from torchslim.compress import Result, compress
from torchslim.distill import DIST, DKD, KD, Distill
from torchslim.errors import TorchslimError
from torchslim.finetune import Finetune
from torchslim.prune import Prune, surgery
from torchslim.quantize import Quantize
from torchslim.runtimes import Deployed
from torchslim.search import SearchResult, search
from torchslim.sensitivity import Sensitivity, sensitivity
from torchslim.steps import Context, Engine, Event, Form, LayerRecord, Outcome, Step, Target
from torchslim.suggest import Suggestion, suggest
from torchslim.task import Metric, Task
from torchslim.training import fit
from torchslim.verify import deploy
from torchslim.workbench import Bench

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "Bench",
    "Budget",
    "Context",
    "Deployed",
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
