"""One model pruned by both sides in turn, timed, or the memory that takes: used by benchmarks.speed."""

from __future__ import annotations

import copy
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import torchslim as ts
from benchmarks.one_model import OURS, TimeLimit, _limit, _peak, _reset_peak, words
from benchmarks.peer import output_layers, prepare_peer, ways
from benchmarks.zoo import Entry, Inputs
from torchslim.prune.structured.plan import analyze

THREADS = 2
PEER_LIMIT = 60.0
Row = dict[str, Any]


def pairs(entry: Entry, count: int) -> list[Row]:
    """Both sides in turn, `count` times after a warm-up: the analysis, then the whole call.

    The side that begins alternates. The peer prunes in place, so it gets a fresh copy each time, made before its clock
    starts; its output layers, which its users write down, are found before as well. Ours copies inside its clock.
    """
    model, inputs = _start(entry)
    way, reason = ways(model)[0], {"analysis": "", "whole": ""}
    rows = []
    for number in range(count + 1):
        for thing, ours in (("analysis", _analysis), ("whole", _whole)):
            row: Row = {"model": entry.name, "what": "pair", "thing": thing, "load": os.getloadavg()[0]}
            sides = ("ours", "peer") if number % 2 else ("peer", "ours")
            for side in sides:
                if side == "ours":
                    row |= ours(model, inputs)
                elif not reason[thing]:
                    found, reason[thing] = _peer(model, inputs, way, thing)
                    row |= found
            rows += [row | {"reason": reason[thing]}] * bool(number)
    with _passes(type(model)) as passes:
        _whole(model, inputs)
    return [*rows, {"model": entry.name, "what": "passes", "passes": len(passes)}]


def _start(entry: Entry) -> tuple[nn.Module, Inputs]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    return entry.build()


def _clock(run: Callable[[], Any]) -> tuple[Any, float]:
    gc.collect()
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def _analysis(model: nn.Module, inputs: Inputs) -> Row:
    plan, record = _clock(lambda: analyze(model, inputs))
    _, after = _clock(plan.coupling)
    return {"ours": record + after, "record": record, "after": after, "nodes": len(plan.trace.operations)}


def _whole(model: nn.Module, inputs: Inputs) -> Row:
    _, seconds = _clock(lambda: ts.prune.channels(model, inputs, **OURS))
    return {"ours": seconds}


def _peer(model: nn.Module, inputs: Inputs, way: str, thing: str) -> tuple[Row, str]:
    """Seconds, or none and why; for the analysis those of listing the groups as well, which come on top."""
    fresh = copy.deepcopy(model)
    ignored = output_layers(fresh, inputs, way)
    try:
        with _limit(PEER_LIMIT):
            if thing == "whole":
                return {"peer": _clock(lambda: prepare_peer(fresh, inputs, way, ignored).prune())[1]}, ""
            prepared, seconds = _clock(lambda: prepare_peer(fresh, inputs, way, ignored))
            kinds = prepared.pruner.root_module_types
            listed = _clock(lambda: list(prepared.pruner.DG.get_all_groups(ignored, root_module_types=kinds)))
            return {"peer": seconds, "groups": listed[1]}, ""
    except TimeLimit:
        return {}, f"past {PEER_LIMIT:.0f} s"
    except Exception as error:  # noqa: BLE001 - the row says what it was
        return {}, words(error)


@contextmanager
def _passes(kind: type[nn.Module]) -> Iterator[list[None]]:
    """Counts the runs of every module of a class, of copies too."""
    seen: list[None] = []
    hook = register_module_forward_pre_hook(lambda module, _: seen.append(None) if type(module) is kind else None)
    try:
        yield seen
    finally:
        hook.remove()


def memory(entry: Entry, thing: str) -> list[Row]:
    """The peak of the whole call, or of a plain forward pass, above what was in memory before it."""
    model, inputs = _start(entry)
    gc.collect()
    base = _reset_peak()
    if thing == "forward":
        with torch.no_grad():
            model(*inputs)
    else:
        _whole(model, inputs)
    peak = max(0, _peak() - base)
    weights = {id(parameter): parameter.nbytes for parameter in (*model.parameters(), *model.buffers())}
    return [{"model": entry.name, "what": thing, "peak": peak, "weights": sum(weights.values())}]
