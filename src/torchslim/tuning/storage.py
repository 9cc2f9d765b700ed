"""The storage that the workers of a search share, by its address."""

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
    """Optuna tells nothing, and warns of nothing that is experimental."""
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
    """Around the use of a storage: what its own code raises, as over a damaged journal, is one clear error."""
    with hushed():
        try:
            yield
        except TorchslimError:
            raise
        except Exception as error:
            what = " ".join(str(error).split())[:200] or "no message"
            raise StorageError(
                f"the study {name!r} cannot be read or written: {type(error).__name__}: {shown(what)[1:-1]}; check the "
                "storage, or choose another with --storage or --study"
            ) from error


def open_storage(storage: str | Path) -> Any:
    """An Optuna storage: a URL of a database, or the path of a journal file.

    Raises:
        StorageError: it cannot be reached, or a package for it is missing.
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
                    if first.endswith(b"\n"):  # Optuna forgives a last line, which a killed worker may have cut off
                        json.loads(first)
                journal = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
                journal.get_all_studies()  # reads what is there
                return journal
            except Exception as error:  # of lines that are no journal, each in its own way
                what = shown(" ".join(str(error).split())[:200] or type(error).__name__)[1:-1]
                raise StorageError(f"the study {path} cannot be opened: {what}; name another storage") from error
        try:
            return optuna.storages.RDBStorage(str(storage))
        except ImportError as error:
            raise StorageError(
                f"the driver of {_without_password(str(storage))} is missing: {error}; for PostgreSQL, pip install "
                "'torchslim[postgresql]'"
            ) from error
        except Exception as error:  # of the database's own kinds
            what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StorageError(
                f"the storage {_without_password(str(storage))} cannot be reached: {what}; check the URL and that its "
                "server runs"
            ) from error


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{host}"
