"""What a search of a step has measured, kept in the work folder, so that an interrupted search resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchslim.core import distributed
from torchslim.core.files import present
from torchslim.core.isolation import warn
from torchslim.core.seals import read_sealed, write_sealed
from torchslim.core.step import Context
from torchslim.errors import StorageError


@dataclass
class StoredRows:
    """Values by key, as JSON in a sealed file of `ctx.state`; in memory alone where that is None.

    Args:
        ctx: of the step.
        name: of the file.
    """

    ctx: Context
    name: str
    rows: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = None if self.ctx.state is None else self.ctx.state / self.name
        if self.path is not None and present(self.path):
            try:
                self.rows = json.loads(read_sealed(self.path, self.ctx.key))
            except StorageError as error:
                if distributed.is_first():
                    warn(f"{error}; the choices of layers are measured again")

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> Any:
        return self.rows[key]

    def known(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of a key, measured where it is not stored yet."""
        if key not in self.rows:
            self.keep({key: measure()})
        return self.rows[key]

    def keep(self, rows: Mapping[str, Any]) -> None:
        """Store values."""
        self.rows |= rows
        if self.path is not None and distributed.is_first():
            write_sealed(self.path, json.dumps(self.rows, allow_nan=False).encode(), self.ctx.key)
