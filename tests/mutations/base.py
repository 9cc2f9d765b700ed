"""Mutations of nested documents, shared by the suite and by `benchmarks/fuzz.py`.

A document is what `tomllib` or `json` give: dictionaries, lists, and leaves. `mutated` changes one to three places of a
good document. A `Kind` says how examples are made and what is done with them; `tests.mutations.KINDS` lists all.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of input that is mutated.

    Attributes:
        group: the kinds that are counted together.
        examples: a strategy of mutated inputs.
        attempt: uses an input. It returns where the input is accepted and raises a `TorchslimError` where it is
            refused; any other exception is a fault.
        shown: an example as short text, for reports.
    """

    name: str
    group: str
    examples: st.SearchStrategy[Any]
    attempt: Callable[[Any], object]
    shown: Callable[[Any], str] = repr


def nested(depth: int, make: Callable[[Any], Any], leaf: Any = 0) -> Any:
    """A leaf inside of so many containers."""
    for _ in range(depth):
        leaf = make(leaf)
    return leaf


NUMBERS: Sequence[Any] = (
    0, -1, 1, 2, 3, -0.0, 0.5, 1.0, 1e-308, 5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf, 10**18, 2**31, 2**63,
    -(2**63), 10**30, 10**400, -(10**400),
)  # fmt: skip
TEXTS: Sequence[str] = (
    "", " ", "\0", "\x1b[31mred\x1b[0m", "\ud800", "é", "a" * 1_000, "b" * 200_000, "*" * 2_000, "[" * 500, "../../etc/passwd",
    "/etc/passwd", "os:system", "os:abort", "sys:exit", "builtins:exec", "builtins:__import__", "subprocess:Popen",
    "torch:nn.Module.__init__.__globals__", "no.such.module:name", ":", "a:", ":b", "a:b:c", "..:x", "tests.support.toy:model",
    "true", "1", "nan", "None", "search", "do", "{}", "%s%s%s%n", "${HOME}", "<script>alert(1)</script>",
)  # fmt: skip
CONTAINERS: Sequence[Any] = (
    [], {}, [[]], [{}], [0] * 10_000, ["x"] * 10_000, [True, False], [0.1, 0.9], ["a", "b"], {"": 0}, {"x": {"y": {}}},
    {f"key{number}": number for number in range(2_000)}, nested(50, lambda inner: [inner]),
    nested(5_000, lambda inner: [inner]), nested(5_000, lambda inner: {"x": inner}),
)  # fmt: skip
OTHERS: Sequence[Any] = (
    True, False, datetime.date(2024, 2, 29), datetime.time(12), datetime.datetime(1, 1, 1),
    datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
)  # fmt: skip


def picked(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of the values; Hypothesis never prints them, as deeply nested ones cannot be."""
    return st.integers(0, len(values) - 1).map(lambda place: values[place])


def absurd(*more: Any) -> st.SearchStrategy[Any]:
    """Values that no field expects, numbers at and beyond their ends, and a few ordinary ones."""
    return st.one_of(
        *(picked(each) for each in (NUMBERS, TEXTS, CONTAINERS, OTHERS, more) if each),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
    )


def places(document: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of what is inside of a document; of large or deep containers, which were put in, only the beginning."""
    if len(path) > 10:
        return
    entries: Any = ()
    if len(path) > 60:  # deep values need not be changed inside, and Python recurses only so far
        return
    if isinstance(document, Mapping):
        entries = document.items()
    elif isinstance(document, list):
        entries = enumerate(document)
    for key, value in islice(entries, 40):
        yield (*path, key)
        yield from places(value, (*path, key))


def at(document: Any, path: Path) -> Any:
    """What stands at a path."""
    for part in path:
        document = document[part]
    return document


def replaced(document: Any, path: Path, change: Callable[[Any, str | int], None]) -> Any:
    """A document whose container at `path[:-1]` was changed; what is beside the path is shared with the original."""
    copied = dict(document) if isinstance(document, Mapping) else list(document)
    if len(path) == 1:
        change(copied, path[0])
    else:
        copied[path[0]] = replaced(copied[path[0]], path[1:], change)  # type: ignore[index]
    return copied


def typo(key: str, place: int) -> str:
    """The key with two neighbors swapped, or a letter more."""
    place %= max(len(key) - 1, 1)
    swapped = key[:place] + key[place : place + 2][::-1] + key[place + 2 :]
    return swapped if swapped != key else key + "x"


@st.composite
def mutated(
    draw: st.DrawFn, documents: Sequence[Any], *, keys: Sequence[str] = (), values: st.SearchStrategy[Any] | None = None
) -> Any:
    """One of the documents with one to three changes.

    Args:
        documents: good ones.
        keys: names that may be put in besides those of the document.
        values: what may be put in; by default `absurd()`.
    """
    document = draw(picked(documents))
    values = absurd() if values is None else values
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        paths = list(places(document))
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        document = replaced(document, path, _change(draw, document, paths, keys, values))
    return document


def _change(
    draw: st.DrawFn, document: Any, paths: Sequence[Path], keys: Sequence[str], values: st.SearchStrategy[Any]
) -> Callable[[Any, str | int], None]:
    """One change of a container at a key."""
    known = [part for path in paths for part in path[-1:] if isinstance(part, str)]
    what = draw(st.sampled_from(("put", "put", "put", "leave out", "rename", "add", "move", "wrap", "repeat")))
    value = at(document, draw(st.sampled_from(paths))) if what == "move" else draw(values)
    name = draw(st.sampled_from([*known, *keys])) if known or keys else "x"
    place = draw(st.integers(0, 10))

    def change(container: Any, key: str | int) -> None:
        if what == "leave out":
            del container[key]
        elif what == "rename" and isinstance(key, str):
            container[typo(key, place)] = container.pop(key)
        elif what == "add":
            if isinstance(container, dict):
                container[name] = value
            else:
                container.insert(place, value)
        elif what == "wrap":
            container[key] = [container[key]] if place % 2 else {name: container[key]}
        elif what == "repeat" and isinstance(container, list):
            container += [container[int(key)]] * place
        else:
            container[key] = value

    return change


@st.composite
def garbled(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> str:
    """Text of which a part is missing, twice there, or replaced."""
    text = draw(texts)
    start, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    part = draw(
        st.sampled_from(("", text[start:end] * 2, "\0", "\ufeff", "[" * 3_000, "'''", "a." * 3_000, "\n", "9" * 5_000))
    )
    return text[:start] + part + text[min(end, start + 20) :]
