"""The exception tree: errors that the user can fix are TorchslimErrors; any other exception is a bug in torchslim."""


class TorchslimError(Exception):
    """Base of all errors that the user can fix; the message says what is wrong, which value was passed, and the fix."""


class TaskError(TorchslimError):
    """The data, the labels or the metric cannot be used."""


class ModelError(TorchslimError):
    """The model cannot be used, because it cannot be copied."""


class RecipeError(TorchslimError):
    """The recipe or the order of its steps is wrong."""


class SelectError(TorchslimError):
    """A pattern names no layer of this model."""


class TrainError(TorchslimError):
    """Training cannot start or continue."""


class PruneError(TorchslimError):
    """Pruning was asked for something impossible."""


class DistillError(TorchslimError):
    """Distillation was asked for something impossible."""


class QuantizeError(TorchslimError):
    """Quantization was asked for something impossible."""


class AllocationError(TorchslimError):
    """An allocation problem is not well formed, or no choice of options keeps its limits."""


class SensitivityError(TorchslimError):
    """Sensitivity was asked for something impossible, or a file is not a sensitivity analysis."""


class ExportError(TorchslimError):
    """The model cannot be captured as a graph; the message names the user's line."""


class DeployError(TorchslimError):
    """The deployed model was called or saved in a way that it does not support."""


class RuntimeUnavailable(TorchslimError):
    """A runtime's package or compiler is missing; the message says how to install it."""


class WorkerError(TorchslimError):
    """A worker that times programs cannot be reached, refused a job, or gave an answer that is not its own."""


class ArtifactError(TorchslimError):
    """A saved artifact cannot be trusted or read."""


class StorageError(TorchslimError):
    """A file cannot be written or read."""
