"""A program that is missing skips a test with what to install, and fails the test where CI is set."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from tests.support import programs


@pytest.mark.parametrize("missing", ["chromium", "chromedriver"])
@pytest.mark.parametrize("ci", [False, True])
def test_a_missing_program_is_named_with_its_package(missing: str, ci: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"chromium", "chromedriver"} - {missing}
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in names else None)
    stops(programs.chromium, "apt-get install chromium chromium-driver", ci, monkeypatch)


@pytest.mark.parametrize("ci", [False, True])
def test_a_missing_server_is_named_with_its_package(ci: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(programs.Path, "glob", lambda folder, pattern: iter(()))
    stops(programs.postgresql, "apt-get install postgresql", ci, monkeypatch)


def stops(look: Callable[[], object], hint: str, ci: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    if ci:
        monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception if ci else pytest.skip.Exception, match=hint):
        look()


def test_programs_that_are_there_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    assert programs.chromium() == ("/opt/chromium", "/opt/chromedriver")
