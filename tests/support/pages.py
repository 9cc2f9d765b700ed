"""HTML pages as tests read them: parsed, and in a browser that is cut off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tests.support.programs import chromium

HOSTILE = "<script>alert(1)</script>"


VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags in order, the text of each element but scripts, and the cells of each table by its id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.rows: dict[str, list[list[dict[str, str]]]] = {}
        self.open: list[str] = []
        self.table = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        found = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        elif tag == "table":
            self.table = found.get("id", found.get("class", ""))
            self.rows[self.table] = []
        elif tag == "tr":
            self.rows[self.table].append([])
        elif tag in ("td", "th"):
            self.rows[self.table][-1].append({**found, "text": ""})

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[self.table][-1][-1]["text"] += data

    def cells(self, name: str) -> list[dict[str, dict[str, str]]]:
        """The body rows of a table: cells by their field."""
        return [
            {cell["data-field"]: cell for cell in row if "data-field" in cell}
            for row in self.rows[name]
            if any("data-field" in cell for cell in row)
        ]

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


@contextmanager
def chrome(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser without a network, with its profile in a folder; the test is skipped where none is installed."""
    binary, chromedriver = chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_argument(f"--user-data-dir={profile}")
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-sync", "--disable-background-networking", "--disable-component-update",
        "--window-size=1280,900",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        driver.get("about:blank")
        driver.get_log("performance")  # the requests of the browser's own first page
        yield driver
    finally:
        driver.quit()


def requests(browser: webdriver.Chrome) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]


def points(browser: webdriver.Chrome, plot: str) -> int:
    return len(browser.find_elements(By.CSS_SELECTOR, f"#{plot} svg .scatterlayer .points path.point"))
