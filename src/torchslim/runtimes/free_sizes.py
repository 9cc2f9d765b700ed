"""Free sizes: tried where a converter may fix them silently, and fixed where a runtime cannot keep them free."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchslim.errors import DeployError, RuntimeUnavailable, TorchslimError
from torchslim.graph.dynamic_sizes import fixed_sizes, pick_samples
from torchslim.graph.export import Captured, capture_bound, module_of
from torchslim.graph.io_structure import flatten
from torchslim.graph.size_guards import readable_sizes, shape_fits

if TYPE_CHECKING:
    from torchslim.runtimes.spec import Session, Spec

WRONG = 0.3  # relative difference of an output; integer kernels stay below a tenth
SAMPLES = 3  # batch size of the trial; programs are captured with 2


def compiled(
    make: Callable[[Captured], tuple[Spec, Session, bytes | None]],
    captured: Captured,
    source: nn.Module,
    *,
    trial: bool,
) -> tuple[Captured, Spec, Session, bytes | None]:
    """Compiled program, and the result of `make` for it; free sizes are fixed where they do not work.

    Args:
        make: compiles a program.
        captured: the program.
        source: the model that `captured` was made from; it is captured again to fix sizes.
        trial: run another batch size once, for runtimes whose converter may fix a size silently.

    Raises:
        TorchslimError: the program cannot be compiled with fixed sizes either, or the caller named the free sizes; in
            that case the message suggests `dynamic_shapes=None`.
    """
    # read before `make`: an exporter may fix a size in the program itself
    any_free = any(None in sizes for sizes in captured.input_sizes.sizes)
    axis = captured.batch_axis
    batched = captured.batched
    symbols = {
        str(value.shape[axis])
        for value, is_batched in zip(captured.inputs_of_program(), batched, strict=True)
        if is_batched
    }
    try:
        result = make(captured)
        if trial and axis is not None:
            _try_batch(captured, axis, batched, symbols, result[1])
        if captured.variants:
            _try_variants(captured, result[1])
        return captured, *result
    except (RuntimeUnavailable, AssertionError):
        raise
    except Exception as error:
        failure = error if isinstance(error, TorchslimError) else _refused(error)
        if not any_free:
            raise failure from error
        if captured.variants and (freed := _with_free_batch(make, captured, source, failure, trial)) is not None:
            return freed
        fixed = capture_bound(source, captured.given, None)
        try:
            result = make(fixed)
        except Exception:  # noqa: BLE001 - the sizes are not the cause, so the first error says more
            raise failure from error
        if axis is None:
            raise type(failure)(f"{failure}; it can be compiled with all sizes fixed: dynamic_shapes=None") from error
        batched_leaves = zip(batched, flatten(captured.inputs, captured.given), strict=True)
        size = next(leaf.shape[axis] for is_batched, leaf in batched_leaves if is_batched)
        reason = str(failure).partition("; ")[0]
        note = f"the runtime needs a fixed batch size ({reason}): captured with batch size {size}"
        result[0].notes[:0] = [*captured.notes, note]
        return replace(fixed, notes=tuple(result[0].notes)), *result


def _with_free_batch(
    make: Callable[[Captured], tuple[Spec, Session, bytes | None]],
    captured: Captured,
    source: nn.Module,
    failure: Exception,
    trial: bool,
) -> tuple[Captured, Spec, Session, bytes | None] | None:
    """The program with the batch alone free, where further sizes do not work; None where that fails, too."""
    try:
        result = compiled(make, capture_bound(source, captured.given, "batch"), source, trial=trial)
    except (RuntimeUnavailable, AssertionError):
        raise
    except Exception:  # noqa: BLE001 - the first error says more
        return None
    reason = str(failure).partition("; ")[0]
    result[1].notes[:0] = [f"the runtime needs fixed sizes ({reason}): only the batch is free"]
    return replace(result[0], notes=tuple(result[1].notes)), *result[1:]


def _try_variants(captured: Captured, session: Session) -> None:
    """Run the smallest and the largest further example; raise DeployError if that fails or the answers are wrong.

    Right answers are those of PyTorch; integer kernels may differ from a quantized program by some steps.
    """
    module = module_of(captured.program)
    by_size = sorted(captured.variants, key=lambda leaves: sum(leaf.numel() for leaf in leaves))
    for leaves in by_size[:1] + by_size[1:][-1:]:
        try:
            answers = list(session([leaf.contiguous() for leaf in leaves]))
        except Exception as error:
            raise DeployError(f"an example of the sizes {_shapes(leaves)} fails: {_first(error)}") from error
        with torch.no_grad():
            expected = list(module(*leaves))
        for answer, right in zip(answers, expected, strict=True):
            if answer.shape != right.shape or _apart(right, answer) > WRONG:
                raise DeployError(f"an example of the sizes {_shapes(leaves)} is computed wrongly")


def _shapes(leaves: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(leaf.shape)) for leaf in leaves)


def _apart(right: Tensor, answer: Tensor) -> float:
    """Norm of the difference over the norm of the right answer; 0 for values that are no floats or not finite."""
    if not right.is_floating_point() or not right.numel() or not bool(torch.isfinite(right).all()):
        return 0.0
    one, two = right.double(), answer.double()
    return float((one - two).norm() / (one.norm() + 1e-12))


def _try_batch(
    captured: Captured, axis: int, batched: Sequence[bool], symbols: Collection[str], session: Session
) -> None:
    """Run another batch size; raise DeployError if that fails or the outputs have other sizes than the program's."""
    leaves = [
        pick_samples(leaf, axis, SAMPLES) if is_batched else leaf
        for leaf, is_batched in zip(flatten(captured.inputs, captured.example), batched, strict=True)
    ]
    try:
        outputs = list(session([leaf.contiguous() for leaf in leaves]))
    except Exception as error:
        raise DeployError(f"a batch of {SAMPLES} fails where one of 2 was captured: {_first(error)}") from error
    output_node = next(node for node in reversed(captured.program.graph.nodes) if node.op == "output")
    for node, output in zip(output_node.args[0], outputs, strict=True):
        value: Any = getattr(node, "meta", {}).get("val")
        if not isinstance(value, Tensor):
            continue
        pairs = zip(value.shape, fixed_sizes(value), strict=True)
        sizes = [SAMPLES if str(symbol) in symbols else size for symbol, size in pairs]
        if not shape_fits(sizes, output.shape):
            raise DeployError(
                f"output {node} has the shape {tuple(output.shape)} for a batch of {SAMPLES}, where the model gives "
                f"{readable_sizes(sizes)}"
            )


def _refused(error: Exception) -> DeployError:
    return DeployError(f"the runtime cannot compile the model: {_first(error)}; use another one, or report this")


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
