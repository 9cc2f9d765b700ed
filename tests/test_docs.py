"""Every Python block of the README and the docs runs, in order, page by page; every docstring example too."""

from __future__ import annotations

import doctest
import importlib.util
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import torchslim
from tests.support import rehearsals

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if "```python" in page.read_text()
]
MODULES = sorted(module.name for module in pkgutil.walk_packages(torchslim.__path__, "torchslim."))
SOURCES = {name: Path(importlib.util.find_spec(name).origin).read_text() for name in MODULES}  # type: ignore[union-attr, arg-type]


def test_there_are_pages_to_run() -> None:
    assert ROOT / "README.md" in PAGES


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_blocks_of_a_page_run(page: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, or where the page says so in one that `torchslim init` has filled."""
    for needs in re.findall(r"<!-- needs: (.*) -->", page.read_text()):
        for library in needs.split(", "):
            pytest.importorskip(library)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "task", raising=False)
    if page.name == "rehearsal.md":
        rehearsals.restore(monkeypatch)
    if "from task import" in page.read_text():
        assert call("init").code == 0
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), scope)


def test_the_readme_in_chinese_has_the_same_commands_links_and_figures() -> None:
    blocks, links, numbers = [], [], []
    for name, other in (("README.md", "README.zh-CN.md"), ("README.zh-CN.md", "README.md")):
        text = (ROOT / name).read_text(encoding="utf-8")
        fenced = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
        prose = fenced.sub("", text)
        targets = re.findall(r"\]\(([^)]+)\)", prose)
        assert targets[0] == other
        blocks.append(fenced.findall(text))
        links.append(set(targets) - {other})
        numbers.append(set(re.findall(r"\d+(?:[.,]\d+)*", prose)))
    assert blocks[0] == blocks[1]
    assert links[0] == links[1]
    assert numbers[0] == numbers[1]
    assert ROOT / "README.zh-CN.md" not in PAGES


@pytest.mark.slow
def test_the_readme_shows_what_inspect_prints(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs 2 s: the starter trains its model."""
    found = re.search(r"```console\n\$ torchslim (inspect .*)\n((?:.*\n)*?)```", (ROOT / "README.md").read_text())
    assert found is not None
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "task", raising=False)
    assert call("init").code == 0
    assert call(*found[1].split()).out == found[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if ">>> " in source])
def test_docstring_examples_hold(name: str) -> None:
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted
    assert not done.failed


@pytest.mark.slow
def test_the_drawing_of_the_rooms_is_of_this_code() -> None:
    pytest.importorskip("grimp")
    from docs import house

    def arrows(text: str) -> list[str]:
        return [line for line in text.splitlines() if " --> " in line]

    text = house.PAGE.read_text()
    assert arrows(house.page(text)) == arrows(text), "run python -m docs.house"


@pytest.mark.parametrize(
    "name", ["torchslim", "torchslim.prune", "torchslim.distill", "torchslim.quantize", "torchslim.runtimes"]
)
def test_the_reference_lists_every_public_name(name: str) -> None:
    page = (ROOT / "docs" / "reference" / f"{name.rpartition('.')[2]}.md").read_text()
    listed = re.search(r"members: \[(.*)\]", page)
    assert listed is not None
    elsewhere = {"distill", "prune", "quantize", "TorchslimError"}  # have pages of their own
    assert {each.strip() for each in listed.group(1).split(",")} | elsewhere == {
        *importlib.import_module(name).__all__
    } | elsewhere


def test_the_notebook_is_that_of_the_tutorial() -> None:
    from docs import notebook

    made = json.loads(notebook.NOTEBOOK.read_text())["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in made] == [
        *notebook.cells(notebook.PAGE.read_text())
    ], "run python -m docs.notebook"
    assert sum(bool(cell.get("outputs")) for cell in made) >= 4, "it shows what its cells print"
