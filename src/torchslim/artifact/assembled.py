"""A model in Python whose parts run on a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torchslim.core.batches import call, predictor
from torchslim.core.files import digest
from torchslim.core.isolation import copy_model
from torchslim.core.parts import mounted, under
from torchslim.core.step import Inputs, LayerRecord
from torchslim.core.trees import to_device
from torchslim.runtimes import Deployed
from torchslim.runtimes.eager import on_eager


class DeployedParts:
    """A whole model with deployed parts. It is called like the model, and has the model's other methods.

    Attributes:
        model: the whole model, with the parts mounted that were deployed.
        parts: the deployed programs of the parts, by name: a part may have several, for several structures of calls.
        example: inputs of a call of the whole model; None where no example is known.
        part_examples: inputs of calls of each program as the whole model makes them; empty where they are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, Deployed],
        example: Inputs | None = None,
        part_examples: Mapping[str, Sequence[Inputs]] | None = None,
    ) -> None:
        self.model, self.parts, self.example = model, dict(parts), example
        self.part_examples = dict(part_examples or {})
        copied, _ = copy_model(model)
        self._predict = predictor(mounted(copied.eval(), dict(parts)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._predict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._predict, name)

    @property
    def _first(self) -> Deployed:
        return next(iter(self.parts.values()))

    @property
    def runtime(self) -> str:
        """The runtime's name."""
        return self._first.runtime

    @property
    def threads(self) -> int | None:
        """How many threads compute, None for the runtime's own choice."""
        return self._first.threads

    @property
    def quantized(self) -> bool:
        """Whether a part holds quantized values."""
        return any(part.quantized for part in self.parts.values())

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the runtime's files of all parts; None where it has no file format."""
        sizes = [part.size_bytes for part in self.parts.values()]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def records(self) -> list[LayerRecord]:
        """What the quantization did to each layer, by its name in the whole model."""
        return [
            replace(record, layer=under(path, record.layer))
            for path, part in self.parts.items()
            for record in part.records
        ]

    @property
    def made_from(self) -> nn.Module | None:
        """The model that was deployed in place of the given one, where layers of a part went back to float."""
        changed = {path: part.made_from for path, part in self.parts.items() if part.made_from is not None}
        return mounted(copy_model(self.model)[0], changed) if changed else None

    @property
    def notes(self) -> list[str]:
        """Notes on the captures of all parts."""
        return [f"{path}: {note}" for path, part in self.parts.items() for note in part.spec.notes]

    @property
    def takes_single_samples(self) -> bool:
        """False: the whole model is called on its example as it is."""
        return False

    @property
    def structure(self) -> str:
        """Digest of the programs without their numbers."""
        return digest([[path, part.spec.structure] for path, part in self.parts.items()])

    def caller(self) -> Callable[[], Any]:
        """A function that calls the whole model on its example, for timing."""
        assert self.example is not None, "a whole model that is timed has an example"
        inputs = to_device(self.example, "cpu")
        return lambda: call(self._predict, inputs)

    def on_eager(self, threads: int | None) -> DeployedParts:
        """The same model with its parts in PyTorch."""
        parts = {path: on_eager(part, threads) for path, part in self.parts.items()}
        return DeployedParts(self.model, parts, self.example, self.part_examples)

    def __repr__(self) -> str:
        parts = ", ".join(f"{path!r}: {part!r}" for path, part in self.parts.items())
        return f"DeployedParts({parts})"


AnyDeployed = Deployed | DeployedParts


def pieces(deployed: AnyDeployed) -> dict[str, Deployed]:
    """The deployed programs by the path of their part; "" for a whole model."""
    return deployed.parts if isinstance(deployed, DeployedParts) else {"": deployed}
