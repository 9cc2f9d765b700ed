"""The browser that the pages are looked at in: one for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    from tests.support.pages import chrome

    with chrome(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver
