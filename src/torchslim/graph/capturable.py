"""Parts of a model that can be captured, where the whole model cannot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchslim.core.batches import EXAMPLES, call, predictor
from torchslim.core.isolation import quiet
from torchslim.core.part_calls import examples_of_part, recorded_calls
from torchslim.core.parts import part_view
from torchslim.core.step import Inputs
from torchslim.core.tensor_objects import of_structure
from torchslim.errors import ExportError, TorchslimError
from torchslim.graph.calling import examples_of
from torchslim.graph.export import capture

LEAST_SHARE = 0.05  # of the multiply-accumulates: smaller parts are not worth a capture
TRIES, SECONDS = 8, 60.0  # captures, and the time after which none begins
DEPTH = 4


@contextmanager
def parts_named(model: nn.Module, example_inputs: Inputs | list[Inputs]) -> Iterator[None]:
    """Add to an ExportError in the block the parts of the model that can be captured, with their share of the MACs."""
    try:
        yield
    except ExportError as error:
        parts = capturable_parts(model, examples_of(example_inputs)[0])
        if not parts:
            raise
        shares = ", ".join(f"part={path!r} holds {100 * share:.0f} %" for path, share in parts.items())
        raise ExportError(
            f"{error}; of the multiply-accumulates {shares} and can be captured: the code around it stays in Python"
        ) from error


def capturable_parts(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Outermost submodules that can be captured, and their share of the multiply-accumulates, the largest first.

    Empty where none can be, or where the model fails on the inputs.
    """
    try:
        shares = _shares(model, inputs)
    except Exception:  # noqa: BLE001 - this only looks for a hint: the caller's own error is raised
        return {}
    captured: dict[str, float] = {}
    candidates = {path: share for path, share in shares.items() if "." not in path}
    until, tries = time.monotonic() + SECONDS, TRIES
    while candidates and tries and time.monotonic() < until:
        path = max(candidates, key=lambda name: candidates[name])
        share = candidates.pop(path)
        if share < LEAST_SHARE:
            break
        tries -= 1
        if _can_be_captured(model, path, inputs):
            captured[path] = share
        elif path.count(".") + 1 < DEPTH:
            inner = {name: own for name, own in shares.items() if name.rpartition(".")[0] == path}
            candidates |= inner
    return captured


def _shares(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Share of each submodule of the multiply-accumulates of one call, by path."""
    counter = FlopCounterMode(display=False, depth=DEPTH)
    with quiet(), sdpa_kernel(SDPBackend.MATH), counter:
        call(predictor(model), inputs)
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    total = counts.get("Global", 0)
    if not total:
        return {}
    shares: dict[str, float] = {}
    for path, _ in model.named_modules():
        # the counter names modules by the class of the outermost one and the path inside of it
        count = counts.get(f"{type(model).__name__}.{path}", counts.get(path, 0))
        if path and count:
            shares[path] = count / total
    return shares


def _can_be_captured(model: nn.Module, path: str, inputs: Inputs) -> bool:
    try:
        examples = examples_of_part(recorded_calls(model, [path], [inputs])[path])
        capture(part_view(model, path, examples[0]), of_structure(examples, examples[0])[:EXAMPLES])
    except (TorchslimError, RuntimeError, TypeError, ValueError):
        return False
    return True
