"""Import objects that a recipe or a command line names as "package.module:name"."""

from __future__ import annotations

import importlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchslim.core.checks import TEXT, shown
from torchslim.core.terminal import printable
from torchslim.errors import RecipeError, TorchslimError

PART = r"[^\W\d]\w*"
NAMED = re.compile(rf"({PART}(?:\.{PART})*):({PART}(?:\.{PART})*)")
OURS = str(Path(__file__).parents[1])
TORCH = str(Path(torch.__file__).parent)
STANDARD = sysconfig.get_path("stdlib")
INSTALLED = "site-packages"


def resolve(spec: Any, what: str, error: type[TorchslimError] = RecipeError) -> Any:
    """Object that "package.module:name" names; imports its module, and does not call the object.

    Args:
        spec: the name; after the colon it may have several parts, "package.module:Class.method".
        what: description of the object in messages.
        error: the type of the error.

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
        resolved: Any = importlib.import_module(module_name)
    module = resolved
    for part in attribute.split("."):
        with foreign(f"{what} {spec!r} cannot be read", error):
            try:
                resolved = getattr(resolved, part)
            except AttributeError as missing:
                hint = _elsewhere(module)
                raise error(f"{what} {spec!r}: module {module_name!r} has no {attribute!r}{hint}") from missing
    return resolved


@contextmanager
def foreign(what: str, error: type[TorchslimError]) -> Iterator[None]:
    """Turn exceptions of the user's own code, and `SystemExit`, into `error` with the line that failed.

    `KeyboardInterrupt` and every `TorchslimError` pass unchanged.
    """
    try:
        yield
    except TorchslimError:
        raise
    except (Exception, SystemExit) as cause:
        text = " ".join(str(cause).split())[:300]
        message = f"{type(cause).__name__}: {text}" if text else type(cause).__name__
        raise error(f"{what}: {printable(message)}{_line(cause)}") from cause


def own_line(cause: BaseException) -> str:
    """File and line of the user's code in which an exception arose, as "FILE, line N"; empty where there is none.

    Code of torchslim, PyTorch and Python is not the user's. Of the rest, code outside of installed packages comes
    first, and the innermost line.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(cause.__traceback__)
        if not frame.filename.startswith((OURS, TORCH, "<")) and (INSTALLED in frame.filename or not _is_python(frame))
    ]
    chosen = [frame for frame in frames if INSTALLED not in frame.filename] or frames
    return f"{chosen[-1].filename}, line {chosen[-1].lineno}" if chosen else ""


def _is_python(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(STANDARD)


def _line(cause: BaseException) -> str:
    """File and line where the user's code failed: the innermost outside of torchslim and Python's import system."""
    if isinstance(cause, SyntaxError) and cause.filename:
        return f" ({cause.filename}, line {cause.lineno})"
    own = (OURS, "<frozen importlib", importlib.__file__)
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if not frame.filename.startswith(own)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _elsewhere(module: ModuleType) -> str:
    """Hint for the case that an installed module hides one of the same name in the current folder; else empty."""
    name = module.__name__.partition(".")[0]
    origin = getattr(sys.modules.get(name), "__file__", None)
    folder = Path.cwd()
    if origin is None or folder in Path(origin).parents:
        return ""
    if not ((folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()):
        return ""
    return f"; it was taken from {origin}, which comes before {name!r} in the current folder: rename yours"
