"""What can be captured: structures of the calls of parts, and parts of a model that itself cannot be."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchslim.core.batches import EXAMPLES, call, predictor, spanning
from torchslim.core.isolation import quiet
from torchslim.core.part_calls import examples_of_part, recorded_calls
from torchslim.core.parts import Mounted, Program, part_view
from torchslim.core.program_names import numbered
from torchslim.core.step import Inputs
from torchslim.core.tensor_objects import by_structure, of_structure, unpacked
from torchslim.errors import ExportError, TaskError, TorchslimError
from torchslim.graph.calling import examples_of
from torchslim.graph.export import capture

LEAST_SHARE = 0.05  # of the multiply-accumulates: smaller parts are not worth a capture
TRIES, SECONDS = 8, 60.0  # captures, and the time after which none begins
DEPTH = 4
MOST_PROGRAMS = 4  # of one part: each takes a capture, a compilation and a place in the artifact
LEAST_CALLS = 1 / 512  # share of a part's calls: the first step of a generation is one of many


def examples_of_programs(model: nn.Module, calls: Mapping[str, Sequence[Inputs]]) -> dict[str, list[Inputs]]:
    """Examples of the programs of parts, by name: one program for each frequent structure of a part's calls.

    The first program of a part is that of the most frequent structure; its examples are `examples_of_part`, and its
    capture may fail later. Of the others, up to `MOST_PROGRAMS` in all have a numbered program, if at least
    `LEAST_CALLS` of the part's calls have them and they can be captured: the rest of the calls runs in Python. Of a
    quantized part, the programs are those of its graphs.

    Args:
        model: the whole model.
        calls: of each part, by path.

    Raises:
        TaskError: no call has the structure of a quantized graph.
    """
    examples: dict[str, list[Inputs]] = {}
    for path, own in calls.items():
        module = model.get_submodule(path)
        if isinstance(module, Mounted):
            examples |= _of_graphs(module, path, own)
            continue
        examples[path] = examples_of_part(own)
        number = 1
        for group in by_structure(own)[1:]:
            if number == MOST_PROGRAMS or len(group) < LEAST_CALLS * len(own):
                break
            name, spanned = numbered(path, number + 1), spanning(group, EXAMPLES, unpacked)
            if _captured(model, name, spanned):
                examples[name], number = spanned, number + 1
    return examples


def _of_graphs(module: Mounted, path: str, calls: Sequence[Inputs]) -> dict[str, list[Inputs]]:
    """Examples of the graphs of a quantized part that calls have the structures of."""
    rest, examples = list(calls), dict[str, list[Inputs]]()
    for number, graph in module.programs.items():
        own = [inputs for inputs in rest if _takes(graph, inputs)]
        rest = [inputs for inputs in rest if not _takes(graph, inputs)]
        if own:
            examples[numbered(path, number)] = spanning(own, EXAMPLES, unpacked)
    if path not in examples:
        raise TaskError(
            f"part {path!r} was quantized for calls of another structure than those on the example inputs; give "
            "examples like those that it was quantized with"
        )
    examples[path] += [group[0] for group in by_structure(rest)]
    return examples


def _takes(graph: Program, inputs: Inputs) -> bool:
    """Whether a recorded call has the structure of a graph."""
    args, kwargs = ((), unpacked(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    return graph.fitted(args, kwargs) is not None


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
        calls = recorded_calls(model, [path], [inputs])[path]
    except (TorchslimError, RuntimeError, TypeError, ValueError):
        return False
    return _captured(model, path, examples_of_part(calls))


def _captured(model: nn.Module, name: str, examples: Sequence[Inputs]) -> bool:
    """Whether a program of a part can be captured for calls of the structure of the first example."""
    try:
        capture(part_view(model, name, examples[0]), of_structure(examples, examples[0])[:EXAMPLES])
    except (TorchslimError, RuntimeError, TypeError, ValueError):
        return False
    return True
