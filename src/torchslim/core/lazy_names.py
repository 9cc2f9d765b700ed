"""Public names of a package that are imported when they are first read, so that `import torchslim` takes no time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of `package`, for the names in `homes` and for its modules.

    Args:
        package: its full name.
        homes: the module that defines each name, relative to `package`. A module's own name stands for the module.

    Source: PEP 562.
    """

    def __getattr__(name: str) -> Any:
        # No value is stored: a test that replaces a function in its module sees it here, and sees it end.
        home = homes.get(name)
        if home is not None and home != name:
            return getattr(import_module(f"{package}.{home}"), name)
        if not name.startswith("_"):
            try:
                return import_module(f"{package}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{package}.{name}":
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)

    def __dir__() -> list[str]:
        values = vars(import_module(package))
        return sorted({*homes, *(name for name in values if name.startswith("__")), *_modules(values)})

    return __getattr__, __dir__


def _modules(values: Mapping[str, Any]) -> list[str]:
    return [name for name, value in values.items() if isinstance(value, ModuleType) and not name.startswith("_")]
