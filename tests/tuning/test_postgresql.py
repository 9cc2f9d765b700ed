"""The database that the tests start is a real one: a study in it is shared, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from tests.support.postgres import database


@pytest.mark.slow
def test_two_workers_share_a_study_and_the_server_is_gone_afterwards() -> None:
    with database() as url:
        folder = Path(url.partition("host=")[2])
        first = optuna.create_study(study_name="shared", storage=optuna.storages.RDBStorage(url))
        second = optuna.load_study(study_name="shared", storage=optuna.storages.RDBStorage(url))
        first.tell(first.ask(), 2.0)
        second.tell(second.ask(), 1.0)
        assert [trial.value for trial in first.trials] == [2.0, 1.0]
        assert first.best_value == second.best_value == 1.0
        assert folder.exists()
    assert not folder.exists()
