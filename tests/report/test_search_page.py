"""The pages and tables of a search and of a sensitivity analysis say what their files say, in a browser that is cut off."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.support.pages import HOSTILE, Page, points, requests
from tests.support.run_records import number
from torchslim.errors import ArtifactError
from torchslim.report import (
    REPORTS,
    kind_of,
    load_search,
    load_sensitivity,
    numbers,
    render_search,
    render_sensitivity,
    search_table,
    sensitivity_table,
)
from torchslim.report.search_page import FIGURES
from torchslim.report.sensitivity_page import HARMLESS_DB

MACHINES = {"this": {"processor": "Made-up 9000", "cores": 2, "versions": {"torch": "2.14.1"}}}


def parameters(sparsity: float, *, skip: bool = False, scheme: str = "int8") -> dict[str, Any]:
    return {"1-prune.sparsity": sparsity, "1-prune.skip": skip, "2-quantize.scheme": scheme}


def trial(place: int, drop: float, latency: float, size: float, **more: Any) -> dict[str, Any]:
    figures = {"metric_drop": drop, "latency": latency, "size": size, "metric": 93.0 - drop}
    return {
        "number": place, "parameters": parameters(0.1 * place), "state": "candidate", "stage": "short", "reason": "",
        "figures": figures, "within": drop <= 1, "seconds": 2.5,
    } | more  # fmt: skip


def member(place: int, drop: float, latency: float, size: float) -> dict[str, Any]:
    return {
        "trial": place,
        "parameters": parameters(0.1 * place),
        "recipe": f"front/{place:03d}/recipe.toml",
        "folder": f"front/{place:03d}",
        "metric": {"val": number(93.0 - drop, "%"), "test": number(92.5 - drop, "%")},
        "figures": {
            "metric_drop": number(drop, "%"),
            "latency": number(latency, "ms", spread=0.1),
            "size": number(size, "MB"),
            "macs": number(9_170_000, "MACs"),
            "params": number(318_000, "parameters"),
        },
        "within": drop <= 1 and latency <= 0.3,
    }


def make_search() -> dict[str, Any]:
    """Four trials, of which one failed and one was given up; two on the front, one within the budget."""
    return {
        "format": 1,
        "kind": "search",
        "torchslim": "0.1.0",
        "recipe": {"model": "pkg.net:model", "task": "pkg.net:task"},
        "space": [
            {"name": "1-prune.sparsity", "kind": "float", "low": 0.2, "high": 0.8},
            {"name": "1-prune.skip", "kind": "choice", "choices": [False, True]},
            {"name": "2-quantize.scheme", "kind": "choice", "choices": ["int8", "int8-weights"]},
        ],
        "budget": {"metric_drop": 1.0, "latency_ms": 0.3, "minimize": ["metric_drop", "latency", "size"], "trials": 4},
        "objectives": ["metric_drop", "latency", "size"],
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True},
        "target": {"runtime": "onnxruntime", "threads": 2},
        "baseline": {
            "metric": {"val": number(93.0, "%"), "test": {"not_measured": "the task has no test batches"}},
            "figures": {
                "metric_drop": number(0.0, ""),
                "latency": number(0.4, "ms", spread=0.1),
                "size": number(3.3, "MB"),
            },
        },
        "trials": [
            trial(0, 0.5, 0.25, 0.34),
            trial(1, 2.0, 0.2, 0.3),
            trial(2, 9.0, 0.5, 3.0, state="stopped", stage="cheap", reason="latency 0.5 ms of at most 0.3 ms"),
            trial(3, 0, 0, 0, state="failed", reason="cannot be captured", figures={}, within=False),
        ],
        "failed": [{"trial": 2, "reason": "the disk is full"}],
        "front": [member(0, 0.25, 0.171, 0.34), member(1, 1.75, 0.15, 0.3)],
        "verdict": {"met": True, "text": "1 of 2 measured artifacts within the budget", "nearest": 0, "binding": []},
        "machines": MACHINES,
    }


def unmet_search() -> dict[str, Any]:
    search = make_search()
    search["front"] = search["front"][1:]
    search["verdict"] = {
        "met": False, "text": "the budget cannot be met", "nearest": 1, "binding": ["metric_drop"]
    }  # fmt: skip
    return search


def point(
    name: str, change: str, value: float | None, refused: str = "", amount: float | None = None
) -> dict[str, Any]:
    kind = "layer" if amount is None else "channels"
    return {
        "name": name, "kind": kind, "change": change, "amount": amount, "value": value, "refused": refused, "groups": []
    }  # fmt: skip


def make_sensitivity(*, measure: str = "sqnr") -> dict[str, Any]:
    unit, reference = {"sqnr": ("dB", None), "kl": ("nats", None), "metric": ("%", 93.5)}[measure]
    return {
        "format": 1, "kind": "sensitivity", "torchslim": "0.1.0", "model": "Net", "measure": measure, "unit": unit,
        "higher_is_better": measure != "kl", "reference": reference, "runtime": "onnxruntime", "notes": ["a note"],
        "points": [
            point("conv1.weight[0]", "25 %", 12.5, amount=0.25),
            point("table[1]", "25 %", 20.0, amount=0.25),
            point("conv1.weight[0]", "50 %", 3.25, amount=0.5),
            point("table[1]", "50 %", None, "its rows are looked up", amount=0.5),
            point("conv1", "int8", 45.5),
            point("head", "int8", None, "there is no kernel"),
        ],
        "machines": MACHINES,
    }  # fmt: skip


def hostile(value: Any) -> Any:
    """Every text with markup in it, but keys and what the schema closes."""
    if isinstance(value, dict):
        kept = ("kind", "measure", "state", "objectives", "minimize", "unit", "binding")
        return {key: each if key in kept else hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return f'{value}"><img src=x onerror=alert(1)>{HOSTILE}' if isinstance(value, str) else value


# ---------------------------------------------------------------------------------------------- search


def test_the_front_holds_every_number_exactly() -> None:
    search = make_search()
    rows = Page(render_search(search)).cells("front")
    assert len(rows) == 3
    for cells, row in zip(rows, [search["baseline"], *search["front"]], strict=True):
        for split, entry in row["metric"].items():
            assert cells[f"metric.{split}"].get("data-value") == (
                json.dumps(entry["value"]) if "value" in entry else None
            )
        for name, entry in row["figures"].items():
            assert json.loads(cells[name]["data-value"]) == entry["value"]
            if "low" in entry:
                assert [json.loads(cells[name][key]) for key in ("data-low", "data-high")] == [
                    entry["low"],
                    entry["high"],
                ]
    assert "the task has no test batches" in rows[0]["metric.test"]["title"]


def test_the_verdict_stands_first_and_says_what_binds() -> None:
    met, unmet = " ".join(Page(render_search(make_search())).text), " ".join(Page(render_search(unmet_search())).text)
    assert "The budget is met" in met
    assert "The budget is not met" in unmet
    assert "accuracy lost: 1.75 %, at most 1.00 % was asked for" in unmet
    assert "front/001/recipe.toml" in unmet
    assert "Trial 2 was chosen to be measured and failed: the disk is full" in met
    free = make_search()
    free["budget"] = {"trials": 4}
    assert "2 recipes that no other beats" in " ".join(Page(render_search(free)).text)


def test_a_search_without_an_artifact_has_a_page() -> None:
    search = make_search()
    search["front"], search["trials"] = [], search["trials"][3:]
    search["verdict"] = {"met": False, "text": "no candidate could be measured", "nearest": None, "binding": []}
    assert "Nothing was measured" in " ".join(Page(render_search(search)).text)
    assert "1 trials: 1 failed; 0 on the front" in search_table(search)


def test_the_table_has_the_verdict_the_front_and_what_each_member_is() -> None:
    table = search_table(make_search())
    assert table.startswith("1 of 2 measured artifacts within the budget")
    row = next(line for line in table.splitlines() if line.endswith("front/000/recipe.toml"))
    for text in ("trial 0", "92.75", "92.25", "0.25 %", "0.171 [0.154-0.188] ms", "0.340 MB", "9.17M", "318k", "kept"):
        assert text in row
    assert "trial 1: 1-prune.sparsity = 0.1, 2-quantize.scheme = int8" in table
    assert "not measured (-): accuracy on test of the original: the task has no test batches" in table
    assert "4 trials: 2 tried, 1 stopped early, 1 failed; 2 on the front" in table


def test_a_step_that_is_left_out_says_nothing_of_its_values() -> None:
    search = make_search()
    search["front"][0]["parameters"] = parameters(0.5, skip=True)
    assert "trial 0: 1-prune skipped, 2-quantize.scheme = int8\n" in search_table(search)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(TEXTS, TEXTS, st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
def test_any_number_is_kept_and_any_name_is_text(name: str, reason: str, figures: list[float]) -> None:
    search = make_search()
    search["metric"]["name"] = search["verdict"]["text"] = search["trials"][2]["reason"] = name + reason
    for place, value in zip(("metric_drop", "latency", "size"), figures, strict=True):
        search["front"][0]["figures"][place] = number(value, "x")
    page = Page(render_search(search))
    assert page.tags.count("script") == 3
    for place, value in zip(("metric_drop", "latency", "size"), figures, strict=True):
        assert json.loads(page.cells("front")[1][place]["data-value"]) == value
    assert all(char.isprintable() or char == "\n" for char in search_table(search))


# ----------------------------------------------------------------------------------------- sensitivity


def test_a_row_holds_a_layer_and_the_group_of_its_channels() -> None:
    page = Page(render_sensitivity(make_sensitivity()))
    head, *rows = page.rows["heat"]
    assert [cell["text"].split()[0] for cell in head] == ["Layer", "25", "50", "int8"]
    found = [[row[0]["text"], *(cell["data-value"] for cell in row[1:])] for row in rows]
    assert found == [
        ["conv1", "12.5", "3.25", "45.5"],
        ["table[1]", "20.0", "null", "null"],
        ["head", "null", "null", "null"],
    ]
    assert rows[1][2]["class"] == rows[2][3]["class"] == "number refused"
    assert "its rows are looked up" in rows[1][2]["title"]
    assert "there is no kernel" in " ".join(page.text)


@pytest.mark.parametrize("measure", ["sqnr", "kl", "metric"])
def test_what_hurts_more_is_deeper(measure: str) -> None:
    data = make_sensitivity(measure=measure)
    data["points"] = [point("layer", f"change {place}", value) for place, value in enumerate((0.5, 5.0, 30.0, 60.0))]
    (row,) = Page(render_sensitivity(data)).rows["heat"][1:]
    heats = [float(re.findall(r"[\d.]+", cell["style"])[0]) for cell in row[1:]]
    assert heats == sorted(heats, reverse=measure != "kl")
    assert max(heats) == pytest.approx(100, abs=2)
    assert (min(heats) == 0) == (measure == "sqnr")
    assert HARMLESS_DB < 60


def test_a_sensitivity_has_a_table() -> None:
    lines = sensitivity_table(make_sensitivity(measure="metric")).splitlines()
    assert "unchanged: 93.50 %" in lines[0]
    assert next(line.split() for line in lines if line.startswith("conv1")) == ["conv1", "12.50", "3.25", "45.50"]
    assert "refused: head: there is no kernel" in lines
    assert lines[-1] == "a note"


def test_a_sensitivity_runs_no_script() -> None:
    html = render_sensitivity(make_sensitivity())
    assert "script" not in Page(html).tags
    assert "default-src 'none'; script-src 'none';" in unescape(html)


# ------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize(("render", "make", "scripts"), [
    (render_search, make_search, 3), (render_search, unmet_search, 3), (render_sensitivity, make_sensitivity, 0),
])  # fmt: skip
def test_no_name_becomes_markup(render: Any, make: Any, scripts: int) -> None:
    data = make()
    before = copy.deepcopy(data)
    assert render(data) == render(data)
    assert data == before, "rendering changes nothing"
    page = Page(render(hostile(data)))
    assert page.tags.count("script") == scripts
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert addresses == ["data:,"]


@pytest.mark.parametrize(("kind", "load", "make"), [
    ("search", load_search, make_search), ("sensitivity", load_sensitivity, make_sensitivity),
])  # fmt: skip
def test_load_takes_what_was_written_and_refuses_what_is_damaged(
    kind: str, load: Any, make: Any, tmp_path: Path
) -> None:
    path = tmp_path / f"{kind}.json"
    with pytest.raises(ArtifactError, match=rf"no {kind}\.json.*folder"):
        load(tmp_path)
    path.write_text(json.dumps(make()))
    assert load(tmp_path) == load(path) == make()
    assert kind_of(tmp_path) == kind_of(path) == kind
    for key in set(make()) - {"format", "kind", "target", "failed", "notes"}:
        damaged = make()
        del damaged[key]
        path.write_text(json.dumps(damaged))
        with pytest.raises(ArtifactError, match=rf"is damaged: {key}: Field required; run again"):
            load(tmp_path)
    path.write_text(json.dumps(make() | {"kind": "other"}))
    with pytest.raises(ArtifactError, match=rf'is no {kind} but a "other"'):
        load(tmp_path)
    path.write_text(json.dumps(make() | {"format": 2}))
    with pytest.raises(ArtifactError, match="has format 2"):
        load(tmp_path)
    path.write_text("[1]")
    assert kind_of(path) == "run"


@pytest.mark.parametrize(("make", "load", "parent", "key", "value"), [
    (make_search, load_search, "trials", "figures", {"latency": "fast"}),
    (make_search, load_search, "trials", "within", 1),
    (make_search, load_search, "front", "figures", {"latency": {"value": 1.0}}),
    (make_search, load_search, "front", "recipe", None),
    (make_search, load_search, "trials", "number", -1),
    (make_search, load_search, "space", "name", 3),
    (make_sensitivity, load_sensitivity, "points", "value", "3"),
    (make_sensitivity, load_sensitivity, "points", "kind", "other"),
])  # fmt: skip
def test_load_names_a_damaged_row(make: Any, load: Any, parent: str, key: str, value: Any, tmp_path: Path) -> None:
    data = make()
    data[parent][1][key] = value
    path = tmp_path / "data.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=rf"is damaged: {parent}\.1\.(\w+\.)?{key}\S*: "):
        load(path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda data: data["verdict"].update(binding=["macs"]), r"verdict\.binding names \['macs'\]"),
    (lambda data: data.update(objectives=["speed"]), r"objectives\.0: "),
    (lambda data: data["budget"].update(latency_ms="fast"), r"budget\.latency_ms\S*: "),
    (lambda data: data.update(failed=[{"trial": 1}]), r"failed\.0\.reason: Field required"),
    (lambda data: data["front"][0]["figures"]["latency"].pop("low"), r"front\[0\]\.figures\.latency needs both low and"),
])  # fmt: skip
def test_load_refuses_what_the_page_could_not_show(change: Any, message: str, tmp_path: Path) -> None:
    data = make_search()
    change(data)
    (tmp_path / "search.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=f"is damaged: {message}"):
        load_search(tmp_path)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every table and list inside of a value with each of its keys or indices."""
    if not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


ODD = [None, True, -1, 0, 10**18, 1.5, 1e39, "", "latency", "x" * 200, [], [1], {}, {"latency": 1}, {"value": 1}]


@settings(max_examples=200)
@pytest.mark.parametrize("kind", ["search", "sensitivity"])
@given(data=st.data())
def test_what_load_accepts_is_shown(kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Costs 6 s: any change of a file is refused as damaged, or the page and the table can show it."""
    load, render, table = REPORTS[kind]
    value = copy.deepcopy(make_search() if kind == "search" else make_sensitivity())
    for _ in range(data.draw(st.integers(1, 2))):
        parent, key = data.draw(st.sampled_from(places(value)))
        if data.draw(st.booleans()):
            parent[key] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        else:
            del parent[key]
    path = tmp_path_factory.mktemp("file") / f"{kind}.json"
    path.write_text(json.dumps(value))
    try:
        checked = load(path)
    except ArtifactError:
        return
    assert render(checked)
    assert table(checked)


@pytest.mark.slow
def test_making_the_pages_loads_no_torch() -> None:
    """The package's own `__init__` imports torch, so a bare stand-in takes its place."""
    code = (
        "import sys, types; bare = types.ModuleType('torchslim'); bare.__path__ = [sys.argv[1]]; "
        "sys.modules['torchslim'] = bare; import json, torchslim.report as report; "
        "search, sensitivity = json.load(sys.stdin); report.render_search(search); "
        "report.render_sensitivity(sensitivity); assert 'torch' not in sys.modules"
    )
    package, given = str(Path(numbers.__file__).parents[1]), json.dumps([make_search(), make_sensitivity()])
    subprocess.run([sys.executable, "-c", code, package], input=given, text=True, check=True)


@pytest.mark.parametrize(("kind", "make"), [("search", make_search), ("sensitivity", make_sensitivity)])
def test_report_makes_the_page_again(
    kind: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchslim.cli import main

    (tmp_path / f"{kind}.json").write_text(json.dumps(make()))
    monkeypatch.setattr("sys.argv", ["torchslim", "report", str(tmp_path)])
    main()
    assert REPORTS[kind][2](make()) in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text() == REPORTS[kind][1](make())


# --------------------------------------------------------------------------------------------- browser


def show(driver: webdriver.Chrome, html: str, folder: Path, *, width: int = 1280) -> str:
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get(path.as_uri())
    WebDriverWait(driver, 30).until(lambda it: it.execute_script("return document.readyState") == "complete")
    return path.as_uri()


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda: render_search(make_search()), lambda: render_search(hostile(make_search())),
    lambda: render_sensitivity(make_sensitivity()),
])  # fmt: skip
def test_browser_shows_the_pages_alone_and_without_complaint(
    browser: webdriver.Chrome, make: Any, tmp_path: Path
) -> None:  # fmt: skip
    address = show(browser, make(), tmp_path, width=390)
    assert browser.get_log("browser") == []
    sent = requests(browser)
    assert address in sent
    assert [url for url in sent if url not in (address, "data:,")] == []
    wide = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0, "nothing sticks out of a narrow window"


@pytest.mark.slow
def test_browser_plots_the_front_over_axes_that_can_be_chosen(browser: webdriver.Chrome, tmp_path: Path) -> None:
    search = make_search()
    show(browser, render_search(search), tmp_path)
    tried = sum(bool(each["figures"]) for each in search["trials"])
    assert points(browser, "front-plot") == tried + len(search["front"]) + 1
    titles = [Select(browser.find_element(By.ID, f"axis-{which}")).first_selected_option.text for which in "xy"]
    assert titles == ["latency, ms", "accuracy lost, %"]
    Select(browser.find_element(By.ID, "axis-x")).select_by_value("macs")
    assert points(browser, "front-plot") == len(search["front"]), "trials have no figure of it, nor has the original"
    Select(browser.find_element(By.ID, "axis-x")).select_by_value("size")
    data = browser.execute_script(
        "return document.getElementById('front-plot').data.map(each => [each.name, each.x, each.hovertext])"
    )
    known = {name: (xs, texts) for name, xs, texts in data}
    assert known["front"][0] == [each["figures"]["size"]["value"] for each in search["front"]]
    assert "2-quantize.scheme = int8" in known["front"][1][0], "pointing at one shows its recipe"
    assert set(FIGURES) >= {"size", "macs"}


@pytest.mark.slow
def test_browser_leaves_a_bound_outside_that_is_far_from_all_points(browser: webdriver.Chrome, tmp_path: Path) -> None:
    search = make_search()
    search["budget"]["latency_ms"] = 300.0
    show(browser, render_search(search), tmp_path)
    low, high = browser.execute_script("return document.getElementById('front-plot').layout.xaxis.range")
    assert low < 0.15 * 0.9, "the spread of the fastest is seen"
    assert 0.5 < high < 1
