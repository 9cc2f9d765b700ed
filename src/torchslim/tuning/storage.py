"""Open the storage that the workers of a search share, and use it with clear errors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchslim.core.checks import shown
from torchslim.core.isolation import Shared
from torchslim.errors import StorageError, TorchslimError


@Shared
@contextmanager
def hushed() -> Iterator[None]:
    """Silence Optuna's messages and all warnings, such as those about experimental features, in the block."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


@contextmanager
def consulting(name: str) -> Iterator[None]:
    """Turn errors of the storage's own code in the block, as over a damaged journal, into one clear StorageError."""
    with hushed():
        try:
            yield
        except TorchslimError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:200] or "no message"
            raise StorageError(
                f"the study {name!r} cannot be read or written: {type(error).__name__}: {shown(text)[1:-1]}; check the "
                "storage, or choose another with --storage or --study"
            ) from error


def open_storage(storage: str | Path) -> Any:
    """Optuna's storage at the URL of a database or the path of a journal file.

    Raises:
        StorageError: the storage cannot be reached, or a package for it is missing.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise StorageError("a search needs Optuna: pip install 'torchslim[search]'") from error
    with hushed():
        if "://" not in str(storage):
            path = Path(storage)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    with path.open("rb") as file:
                        first = file.readline()
                    if first.endswith(b"\n"):  # Optuna skips a last line that a killed worker has cut off
                        json.loads(first)
                journal = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
                journal.get_all_studies()  # reads the file, so that damage shows now
                return journal
            except Exception as error:  # lines that are no journal raise errors of many kinds
                text = shown(" ".join(str(error).split())[:200] or type(error).__name__)[1:-1]
                raise StorageError(f"the study {path} cannot be opened: {text}; name another storage") from error
        try:
            return optuna.storages.RDBStorage(str(storage))
        except ImportError as error:
            raise StorageError(
                f"the driver of {_without_password(str(storage))} is missing: {error}; for PostgreSQL, pip install "
                "'torchslim[postgresql]'"
            ) from error
        except Exception as error:  # databases raise errors of their own kinds
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StorageError(
                f"the storage {_without_password(str(storage))} cannot be reached: {text}; check the URL and that its "
                "server runs"
            ) from error


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{host}"
