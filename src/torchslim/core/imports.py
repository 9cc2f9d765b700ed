"""Objects that a recipe or a command line names: "package.module:name", imported because the user named them."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torchslim.core.checks import TEXT, shown
from torchslim.core.terminal import printable
from torchslim.errors import RecipeError, TorchslimError

PART = r"[^\W\d]\w*"
NAMED = re.compile(rf"({PART}(?:\.{PART})*):({PART}(?:\.{PART})*)")
OURS = str(Path(__file__).parents[1])


def resolve(spec: Any, what: str, error: type[TorchslimError] = RecipeError) -> Any:
    """The object that "package.module:name" names; its module is imported, and the object is not called.

    Args:
        spec: the name; below the module it may have several parts, "package.module:Class.method".
        what: says in messages what is named.
        error: the type of what is raised.

    Raises:
        TorchslimError: of the type `error`: no such name, or the module's own code failed or tried to exit.
    """
    if not isinstance(spec, str) or len(spec) > TEXT or not (match := NAMED.fullmatch(spec)):
        raise error(f"{what} must be written 'package.module:name', got {shown(spec)}")
    module_name, attribute = match.groups()
    hidden = next((part for part in attribute.split(".") if part.startswith("__")), None)
    if hidden:
        raise error(f"{what} {spec!r}: {hidden!r} is internal to Python; name a class, a function or an object")
    with foreign(f"{what} {spec!r} cannot be imported", error):
        found: Any = importlib.import_module(module_name)
    module = found
    for part in attribute.split("."):
        with foreign(f"{what} {spec!r} cannot be read", error):
            try:
                found = getattr(found, part)
            except AttributeError as missing:
                hint = _elsewhere(module)
                raise error(f"{what} {spec!r}: module {module_name!r} has no {attribute!r}{hint}") from missing
    return found


@contextmanager
def foreign(what: str, error: type[TorchslimError]) -> Iterator[None]:
    """Around the user's own code: its exceptions, and `SystemExit`, become one error with the line that failed.

    `KeyboardInterrupt` passes, and so does what is a `TorchslimError` already.
    """
    try:
        yield
    except TorchslimError:
        raise
    except (Exception, SystemExit) as cause:
        said = " ".join(str(cause).split())[:300]
        told = f"{type(cause).__name__}: {said}" if said else type(cause).__name__
        raise error(f"{what}: {printable(told)}{_line(cause)}") from cause


def _line(cause: BaseException) -> str:
    """Where the user's code failed: the innermost line that is neither ours nor of Python's import system."""
    if isinstance(cause, SyntaxError) and cause.filename:
        return f" ({cause.filename}, line {cause.lineno})"
    own = (OURS, "<frozen importlib", importlib.__file__)
    frames = [each for each in traceback.extract_tb(cause.__traceback__) if not each.filename.startswith(own)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _elsewhere(module: ModuleType) -> str:
    """A hint where the current folder has a module of the same name, which an installed one comes before."""
    name = module.__name__.partition(".")[0]
    origin = getattr(sys.modules.get(name), "__file__", None)
    here = Path.cwd()
    if origin is None or here in Path(origin).parents:
        return ""
    if not ((here / f"{name}.py").is_file() or (here / name / "__init__.py").is_file()):
        return ""
    return f"; it was taken from {origin}, which comes before {name!r} in the current folder: rename yours"
