"""The command `torchslim` in the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Finished:
    """The exit code of a command and its output."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Call the command with arguments; torchslim's command line is imported at the first call."""

    def run(*arguments: object) -> Finished:
        from torchslim.cli import main

        monkeypatch.setattr("sys.argv", ["torchslim", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return run
