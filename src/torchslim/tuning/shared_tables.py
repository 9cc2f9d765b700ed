"""Share what a solved search measures through its storage: one worker measures, all others read.

Workers of one folder also find measurements on disk; workers with separate folders have the storage alone.
With the same tables they propose the same recipes. Only numbers cross: every worker derives the decisions from its own
model, and what it reads must have their shape.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from torchslim.allocation.problem import Decision, Floats, Problem, Term
from torchslim.analysis.damage import AdditionLaw, DamageTable
from torchslim.core.files import digest
from torchslim.core.isolation import warn
from torchslim.core.schema import MIB, Limits, parse_json
from torchslim.errors import AllocationError, RecipeError, StorageError
from torchslim.tuning.shared import LARGEST
from torchslim.tuning.solved_costs import Costs
from torchslim.tuning.storage import consulting
from torchslim.tuning.study import BEAT_SECONDS, Design, Ledger
from torchslim.tuning.worker import WAIT_SECONDS

COSTS, DAMAGE = 0, 1
"""Numbers under which the two measurements are claimed."""

PART, PARTS = 32_000, 128  # characters of a stored text, which databases limit, and number of texts at most
LIMITS = Limits(size_bytes=64 * MIB, values=4_000_000, depth=6)

Json = dict[str, Any]
Value = TypeVar("Value")


class SharedTables:
    """The measurements of a search in its storage.

    Args:
        storage: as `open_storage` returns it.
        name, key: of the study.
        beat: seconds between signs of life of the worker that measures.

    Raises:
        RecipeError: the study belongs to another search.
    """

    def __init__(self, storage: Any, name: str, key: str, beat: float = BEAT_SECONDS) -> None:
        self.ledger = Ledger(storage, f"{name}/tables", key, Design(trials=10**9, objectives=1), beat=beat)

    def agree(self, decisions: Sequence[Decision]) -> None:
        """Raise RecipeError if the workers that began the study have other decisions: choices are stored by index."""
        own = digest([[decision.name, list(decision.options)] for decision in decisions])
        stored = self._attributes().get("decisions")
        if stored is None:
            self._set("decisions", own)
        elif stored != own:
            raise RecipeError(
                f"the study {self.ledger.name!r} was begun where layers may take other widths or schemes than here, as "
                "on another kind of processor or with other versions of the runtime; take machines of one kind, or "
                "choose another study with --study"
            )

    def once(
        self, number: int, measure: Callable[[], Value], write: Callable[[Value], Json], read: Callable[[Json], Value]
    ) -> Value:
        """What the first worker has measured.

        Args:
            number: of the measurement.
            measure: measures it, in one worker; in others if what is stored cannot be used.
            write, read: to JSON and back; `read` raises StorageError for what does not fit.
        """
        while True:
            claims = self.ledger.claims()
            if claims.get(number) is not None:
                try:
                    return read(self._stored(number))
                except StorageError as error:
                    warn(f"{error}; this worker measures its own tables")
                    return measure()
            if number not in claims and (claim := self.ledger.claim({"trial": number})) is not None:
                break
            time.sleep(WAIT_SECONDS)  # if the worker that measures dies, this one takes its place
        try:
            with self.ledger.beating(claim):
                value = measure()
                self._store(number, write(value))
        except BaseException:
            self.ledger.give_back(claim)
            raise
        self.ledger.tell(claim, {"state": "candidate"}, [0.0])
        return value

    def _store(self, number: int, content: Json) -> None:
        packed = zlib.compress(json.dumps(content, allow_nan=False).encode())
        text = base64.b64encode(packed).decode()
        parts = [text[start : start + PART] for start in range(0, len(text), PART)]
        if len(parts) > PARTS:  # others then find nothing, and measure themselves
            warn(f"the tables are too large to be shared ({len(text):,} characters); every worker measures its own")
            return
        for place, part in enumerate(parts):
            self._set(f"{number}.{place}", part)
        self._set(f"{number}", len(parts))

    def _stored(self, number: int) -> Json:
        attributes = self._attributes()
        count = attributes.get(f"{number}")
        if type(count) is not int or not 0 < count <= PARTS:
            raise StorageError(f"the study {self.ledger.name!r} holds no tables")
        parts = [attributes.get(f"{number}.{place}") for place in range(count)]
        texts = [part for part in parts if isinstance(part, str) and len(part) <= PART]
        what = f"a table of the study {self.ledger.name!r}"
        if len(texts) < count:
            raise StorageError(f"{what} is damaged: a part of it is missing")
        unpacking = zlib.decompressobj()
        try:
            data = unpacking.decompress(base64.b64decode("".join(texts), validate=True), LIMITS.size_bytes)
        except (ValueError, zlib.error) as error:
            raise StorageError(f"{what} is damaged: {error}") from error
        if not unpacking.eof:
            raise StorageError(f"{what} is damaged: it does not end within {LIMITS.size_bytes:,} bytes")
        return _table(parse_json(data, what, StorageError, limits=LIMITS), what)

    def _attributes(self) -> Mapping[str, Any]:
        with consulting(self.ledger.name):
            found: Mapping[str, Any] = self.ledger.study.user_attrs
        return found

    def _set(self, name: str, value: Any) -> None:
        with consulting(self.ledger.name):
            self.ledger.study.set_user_attr(name, value)


def costs_to_json(costs: Costs) -> Json:
    """The numbers of costs."""
    return {
        "spread": costs.spread,
        "costs": {
            name: [{"over": list(term.decisions), "values": term.values.ravel().tolist()} for term in terms]
            for name, terms in costs.costs.items()
        },
    }


def costs_from_json(content: Json, own: Costs, names: Sequence[str]) -> Costs:
    """Costs of a worker's own decisions with the numbers of another worker.

    Args:
        content: what `costs_to_json` returned.
        own: the decisions, without costs.
        names: of the costs.

    Raises:
        StorageError: the numbers do not fit the decisions.
    """
    stored = _table(content.get("costs"), "costs")
    if set(stored) != set(names):
        raise StorageError(f"stored costs are {', '.join(sorted(stored))[:200]}, but {', '.join(names)} are needed")
    costs = {name: tuple(_term(term, own.decisions) for term in _list(stored[name], name)) for name in names}
    try:
        Problem(decisions=own.decisions, damage=(), costs=costs)
    except AllocationError as error:
        raise StorageError(f"stored costs do not fit: {error}") from error
    spread = _numbers([content.get("spread")], 1, "spread")[0]
    if not 1.0 <= spread <= 100.0:
        raise StorageError(f"the stored spread of the costs must be between 1 and 100, got {spread}")
    return replace(own, costs=costs, spread=float(spread))


def damage_to_json(damage: tuple[DamageTable, AdditionLaw]) -> Json:
    """The numbers of single damages and of the law by which they add up."""
    table, law = damage
    return {
        "singles": [single.tolist() for single in table.singles],
        "law": [law.power, law.outer, law.error, law.count, *law.weights],
    }


def damage_from_json(content: Json, decisions: Sequence[Decision]) -> tuple[DamageTable, AdditionLaw]:
    """Single damages of a worker's own decisions, and their law, with the numbers of another worker.

    Raises:
        StorageError: the numbers do not fit the decisions.
    """
    stored = _list(content.get("singles"), "damages")
    if len(stored) != len(decisions):
        raise StorageError(f"damages of {len(stored)} decisions are stored, but there are {len(decisions)}")
    singles = [_numbers(own, len(decision.options), "damages") for own, decision in zip(stored, decisions, strict=True)]
    table = DamageTable(decisions=tuple(decisions), singles=tuple(singles))
    power, outer, error, count, *weights = _numbers(content.get("law"), 4 + len(table.kinds), "law").tolist()
    if min(power, outer) <= 0 or min(*weights, *(single.min() for single in singles)) < 0 or any(s[0] for s in singles):
        raise StorageError("stored damages and their weights must be at least 0, and those of first options 0")
    return table, AdditionLaw(power=power, weights=tuple(weights), outer=outer, error=error, count=int(count))


def _term(stored: Any, decisions: Sequence[Decision]) -> Term:
    entry = _table(stored, "term")
    over = _list(entry.get("over"), "decisions of a term")
    if not all(type(place) is int and 0 <= place < len(decisions) for place in over) or len(set(over)) < len(over):
        raise StorageError("a stored term is about decisions that do not exist")
    shape = tuple(len(decisions[place].options) for place in over)
    values = _numbers(entry.get("values"), int(np.prod(shape)), "values of a term")
    return Term(decisions=tuple(over), values=values.reshape(shape))


def _table(value: Any, what: str) -> Json:
    if not isinstance(value, Mapping):
        raise StorageError(f"{what}: stored is a {type(value).__name__} in place of a table")
    return dict(value)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise StorageError(f"{what}: stored is a {type(value).__name__} in place of a list")
    return value


def _numbers(value: Any, count: int, what: str) -> Floats:
    """Finite numbers: (count,)."""
    stored = _list(value, what)
    if len(stored) != count:
        raise StorageError(f"{what}: {len(stored)} numbers are stored in place of {count}")
    if not all(type(each) in (int, float) and -LARGEST <= each <= LARGEST for each in stored):
        raise StorageError(f"{what}: a stored value is no finite number")
    return np.array(stored, dtype=np.float64)
