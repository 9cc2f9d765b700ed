"""Sizes that are free: tried where a converter may fix them in silence, and fixed where a runtime needs them so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchslim.errors import DeployError, RuntimeUnavailable, TorchslimError
from torchslim.graph.export import Captured, capture_bound
from torchslim.graph.io_structure import flatten

if TYPE_CHECKING:
    from torchslim.runtimes.spec import Session, Spec

SAMPLES = 3  # of the trial; programs are captured with two


def compiled(
    make: Callable[[Captured], tuple[Spec, Session, bytes | None]],
    captured: Captured,
    source: nn.Module,
    *,
    trial: bool,
) -> tuple[Captured, Spec, Session, bytes | None]:
    """The program that was compiled, and what `make` gives for it; free sizes are fixed where they do not work.

    Args:
        make: compiles a program.
        captured: the program.
        source: the model that it was captured from, which is captured again.
        trial: run another batch size once, for runtimes whose converter may fix a size in silence.

    Raises:
        TorchslimError: the program cannot be compiled with fixed sizes either, or the caller has named the free sizes;
            then the message says that `dynamic_shapes=None` would do.
    """
    # looked at before: an exporter may fix a size in the program itself
    free = [[_is_free(size) for size in input_.shape] for input_ in captured.inputs_of_program()]
    axis = captured.batch_axis
    batched = [axis is not None and len(each) > axis and each[axis] for each in free]
    symbols = {
        str(value.shape[axis]) for value, each in zip(captured.inputs_of_program(), batched, strict=True) if each
    }
    try:
        made = make(captured)
        if trial and axis is not None:
            _try_batch(captured, axis, batched, symbols, made[1])
        return captured, *made
    except (RuntimeUnavailable, AssertionError):
        raise
    except Exception as error:
        told = error if isinstance(error, TorchslimError) else _refused(error)
        if not any(map(any, free)):
            raise told from error
        fixed = capture_bound(source, captured.given, None)
        try:
            made = make(fixed)
        except Exception:  # noqa: BLE001 - the sizes are not the reason, so the first error tells more
            raise told from error
        if axis is None:
            raise type(told)(f"{told}; it can be compiled with all sizes fixed: dynamic_shapes=None") from error
        given = zip(batched, flatten(captured.inputs, captured.given), strict=True)
        size = next(leaf.shape[axis] for each, leaf in given if each)
        reason = str(told).partition("; ")[0]
        note = f"the runtime needs a fixed batch size ({reason}): captured with batch size {size}"
        made[0].notes[:0] = [*captured.notes, note]
        return replace(fixed, notes=tuple(made[0].notes)), *made


def _try_batch(
    captured: Captured, axis: int, batched: Sequence[bool], symbols: Collection[str], session: Session
) -> None:
    """Run another batch size. Raises DeployError where that fails, or gives outputs of other sizes than the program."""
    leaves = [
        leaf.index_select(axis, torch.arange(SAMPLES) % leaf.shape[axis]) if each else leaf
        for leaf, each in zip(flatten(captured.inputs, captured.example), batched, strict=True)
    ]
    try:
        answers = list(session([leaf.contiguous() for leaf in leaves]))
    except Exception as error:
        raise DeployError(f"a batch of {SAMPLES} fails where one of 2 was captured: {_first(error)}") from error
    output = next(node for node in reversed(captured.program.graph.nodes) if node.op == "output")
    for node, answer in zip(output.args[0], answers, strict=True):
        value: Any = getattr(node, "meta", {}).get("val")
        if not isinstance(value, Tensor):
            continue
        sizes = [SAMPLES if str(size) in symbols else None if _is_free(size) else int(size) for size in value.shape]
        if len(sizes) != answer.dim() or any(a not in (None, b) for a, b in zip(sizes, answer.shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            raise DeployError(
                f"output {node} has the shape {tuple(answer.shape)} for a batch of {SAMPLES}, where the model gives "
                f"({wanted})"
            )


def _is_free(size: Any) -> bool:
    return not (isinstance(size, int) or str(size).isdigit())


def _refused(error: Exception) -> DeployError:
    return DeployError(f"the runtime cannot compile the model: {_first(error)}; use another one, or report this")


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
