"""One model of the zoo pruned by one side, measured in a process of its own: used by benchmarks.coverage."""

from __future__ import annotations

import copy
import gc
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchslim as ts
from benchmarks.outputs import main_outputs, repeated, shapes
from benchmarks.zoo import Entry, Inputs
from torchslim.artifact.model_size import macs, parameters
from torchslim.core.batches import call

OURS = {
    "sparsity": 0.5, "of": "channels", "scope": "layer", "criterion": "l2", "round_to": 1, "min_channels": 1
}  # fmt: skip
SMALLER = 1.5  # times fewer parameters before a model counts
BATCH = 3


class TimeLimit(BaseException):
    """The call took too long; no `except Exception` of a library swallows it."""


def measure(entry: Entry, side: str, seconds: float) -> dict[str, Any]:
    """The row of one model and side.

    Args:
        entry: of the zoo.
        side: "ours" or "peer".
        seconds: how long the call that prunes may take.
    """
    warnings.simplefilter("ignore")
    model, inputs = entry.build()
    row: dict[str, Any] = {"parameters_before": parameters(model), "macs_before": _macs(model, inputs)}
    with torch.no_grad():
        expected = shapes(call(model, inputs))
        three = repeated(inputs, BATCH)
        try:
            expected_three = shapes(call(model, three))
        except Exception:  # noqa: BLE001 - whatever a model says to another batch, its batch is fixed
            expected_three = None
    attempts = _ours if side == "ours" else _peer
    rows = []
    for pruned, found in attempts(entry, model, inputs, seconds):
        one = row | {"verified": None, "reasons": [], "runs": None} | found
        if pruned is not None:
            one["parameters_after"] = parameters(pruned)
            one["ratio"] = one["parameters_before"] / max(1, one["parameters_after"])
            one["runs"], failure = check(pruned, inputs, expected, expected_three and three, expected_three)
            one["macs_after"] = _macs(pruned, inputs) if one["runs"]["batch 1"] else None
            one["reason"] = one["reason"] or failure
            if side == "peer":
                one["verified"] = one["runs"]["batch 1"] and one["runs"]["shapes"]
        rows.append(one | {"counts": counts(one)})
        if rows[-1]["counts"]:
            break
    return max(rows, key=lambda one: (one["counts"], bool(one["verified"]), bool(one["runs"])))  # the first of equals


def counts(row: dict[str, Any]) -> bool:
    """Is the model verified, does it run, and has it got smaller?"""
    runs = row.get("runs") or {"none": False}
    return bool(row.get("verified")) and all(runs.values()) and row.get("ratio", 0) >= SMALLER


def check(
    pruned: nn.Module, inputs: Inputs, expected: list[Any], three: Inputs | None, expected_three: list[Any] | None
) -> tuple[dict[str, Any], str]:
    """What of the pruned model runs: batch 1, batch 3 ("fixed" where the original takes none), shapes, backward.

    Returns the answers, and the first failure in words.
    """
    runs: dict[str, Any] = {"batch 1": False, f"batch {BATCH}": False, "shapes": False, "backward": False}
    failure = ""
    pruned.eval()
    try:
        output = call(pruned, inputs)
        runs["batch 1"], runs["shapes"] = True, shapes(output) == expected
        if not runs["shapes"]:
            failure = f"shapes {shapes(output)[:3]} instead of {expected[:3]}"
        runs["backward"] = _backward(pruned, output)
        if not runs["backward"]:
            failure = failure or "no finite gradients"
        del output
        if three is None:
            runs[f"batch {BATCH}"] = "fixed"
        else:
            with torch.no_grad():
                got = shapes(call(pruned, three))
            runs[f"batch {BATCH}"] = got == expected_three
            if got != expected_three:
                failure = failure or f"shapes {got[:3]} instead of {(expected_three or [])[:3]} at batch {BATCH}"
    except Exception as error:  # noqa: BLE001 - the row says what it was
        failure = failure or f"result does not run: {words(error)}"
    return runs, failure


def _backward(model: nn.Module, output: Any) -> bool:
    leaves = [leaf for leaf in main_outputs(output) if leaf.requires_grad and leaf.numel()]
    if not leaves:
        return False
    torch.stack([leaf.float().square().mean() for leaf in leaves]).sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    finite = bool(grads) and all(bool(grad.isfinite().all()) for grad in grads)
    model.zero_grad()
    return finite


def surgery_record(pruned: nn.Module) -> tuple[bool, list[str]]:
    """Whether torchslim vouches for its result, and why it froze what it froze."""
    record = ts.surgery(pruned)
    assert record is not None
    about = record["rounds"][-1]["about"]
    return bool(about["verified"]), sorted(set(about["stayed"].values()))


def _ours(entry: Entry, model: nn.Module, inputs: Inputs, seconds: float) -> Iterator[tuple[nn.Module | None, Any]]:
    pruned, found = timed(lambda: ts.prune.channels(model, inputs, **OURS), seconds)
    if pruned is not None:
        found["verified"], found["reasons"] = surgery_record(pruned)
    yield pruned, found


def _peer(entry: Entry, model: nn.Module, inputs: Inputs, seconds: float) -> Iterator[tuple[nn.Module | None, Any]]:
    """Its results in each way that fits the model, the likeliest first."""
    from benchmarks.peer import Removed, prune_with_peer, ways

    for number, way in enumerate(ways(model)):
        if number:
            model, inputs = entry.build()
        removed = Removed(model)
        original = copy.deepcopy(model)
        pruned, found = timed(lambda: prune_with_peer(model, inputs, way, removed), seconds)  # noqa: B023
        found["way"] = way
        if pruned is not None and removed.comparable:
            found["same_as_zeroed"] = _same(pruned, original, removed, inputs)
        yield pruned, found


def _same(pruned: nn.Module, original: nn.Module, removed: Any, inputs: Inputs) -> bool | None:
    """Does the result compute what the original does without the channels that were removed?"""
    try:
        with torch.no_grad():
            zeroed = removed.zeroed(original).double()
            wide = _double(inputs)
            want = main_outputs(call(zeroed, wide))
            got = main_outputs(call(copy.deepcopy(pruned).double(), wide))
    except Exception:  # noqa: BLE001 - no comparison, which the row shows as such
        return None
    if [each.shape for each in want] != [each.shape for each in got]:
        return False
    return all(
        bool((a - b).abs().max() <= 1e-6 * a.abs().max().clamp_min(1e-12)) for a, b in zip(want, got, strict=True)
    )


def _double(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, inputs
    )


def timed(prune: Callable[[], nn.Module], seconds: float) -> tuple[nn.Module | None, dict[str, Any]]:
    """The result or None, with seconds, peak memory and the reason of a failure."""
    gc.collect()
    base = _reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    pruned, reason = None, ""
    try:
        with _limit(seconds):
            pruned = prune()
    except TimeLimit:
        reason = f"time limit of {seconds:.0f} s"
    except Exception as error:  # noqa: BLE001 - the row says what it was
        reason = words(error)
    found = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return pruned, found | {"peak_bytes": max(0, _peak() - base), "reason": reason}


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _macs(model: nn.Module, inputs: Inputs) -> int | None:
    try:
        return macs(model, inputs).total
    except Exception:  # noqa: BLE001 - shown as not measured
        return None


def words(error: Exception) -> str:
    """What an error says, in a line; of files in packages the path inside these, whatever machine it was."""
    lines = str(error).strip().splitlines()
    return re.sub(r"\S*/site-packages/", "", f"{type(error).__name__}: {lines[0] if lines else ''}")[:300]


def _reset_peak() -> int:
    """Bytes in memory now; the peak is counted from here where the system can."""
    control = Path("/proc/self/clear_refs")
    if control.exists():
        control.write_text("5")
        return _status("VmRSS")
    return _peak()


def _peak() -> int:
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
