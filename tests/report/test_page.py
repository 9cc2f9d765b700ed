"""The report says what `run.json` says: as text, as HTML, and in a browser that is cut off."""

from __future__ import annotations

import copy
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.pages import HOSTILE, Page, points, requests
from tests.support.run_records import layer, make_run, number
from torchslim.errors import ArtifactError
from torchslim.report import findings, load_run, numbers, render, table

# --------------------------------------------------------------------------------------- a run by hand


def gappy_run() -> dict[str, Any]:
    """What a runtime without a file, and a task without a test split, leave out."""
    run = make_run()
    run["reported_on"] = "val (selected on val)"
    for row in run["rows"]:
        row["metric"]["test"] = {"not_measured": "the task has no test batches"}
        row["size_bytes"] = {"not_measured": "runtime 'inductor' has no file"}
        row["shrink"] = {key: {"not_measured": "the runtime has no file"} for key in row["shrink"]}
    run["rows"][2]["macs"] = {"not_measured": "the counter failed"}
    return run


def fields(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every entry that the page's table has a cell for, by the name of the field."""
    return {
        **{f"metric.{split}": entry for split, entry in row["metric"].items()},
        **{key: row[key] for key in ("parameters", "nonzero", "macs", "size_bytes")},
        "shrink.over_baseline": row["shrink"]["over_baseline"],
        **{f"latency_ms.{runtime}": entry for runtime, entry in row["latency_ms"].items()},
        "speedup.over_baseline": row["speedup"]["over_baseline"],
    }


# ------------------------------------------------------------------------------------ reading the page


def assert_same_numbers(cells: dict[str, dict[str, str]], row: dict[str, Any]) -> None:
    expected = fields(row)
    assert set(cells) == set(expected)
    for name, entry in expected.items():
        for attribute, key in (("data-value", "value"), ("data-low", "low"), ("data-high", "high")):
            if key in entry:
                shown = json.loads(cells[name][attribute])
                assert (shown, type(shown)) == (entry[key], type(entry[key])), name
            else:
                assert attribute not in cells[name]
        if "not_measured" in entry:
            assert cells[name]["text"].strip() == "not measured"
            assert entry["not_measured"] in cells[name]["title"]


# --------------------------------------------------------------------------------------------- numbers


@given(st.floats(1e-5, 1e12), st.integers(2, 6))
def test_significant_digits_are_right_to_half_a_unit(value: float, digits: int) -> None:
    text = numbers.significant(value, digits)
    assert "e" not in text
    assert abs(float(text) - value) <= value * 0.5 * 10 ** (1 - digits) * (1 + 1e-9)


@given(st.integers(0, 10**14))
def test_counts_read_back_to_three_digits(value: int) -> None:
    text = numbers.counted(value)
    power = "kMGT".find(text[-1]) + 1
    assert len(text) <= 5
    assert float(text.rstrip("kMGT")) * 1000**power == pytest.approx(value, rel=0.0051)
    assert value >= 1000 or text == str(value), "small counts are exact"


@given(st.integers(1, 2**48))
def test_sizes_read_back(size: int) -> None:
    text, unit = numbers.sized(size).split()
    assert float(text) * 1024 ** numbers.BYTE_UNITS.index(unit) == pytest.approx(size, rel=0.0051)
    assert float(text) <= 1024


def test_examples_of_the_number_formats_hold() -> None:
    found = doctest.testmod(numbers)
    assert found.attempted >= 5
    assert found.failed == 0


def test_a_speedup_below_one_is_a_slowdown() -> None:
    assert numbers.faster(0.25) == "4.00 times slower"
    assert numbers.smaller(0, 10) == "from 0 bytes to 10 bytes"


# ----------------------------------------------------------------------------------------------- story


def test_summary_tells_the_three_results() -> None:
    told = findings.summary(make_run())
    assert "accuracy on test goes from 92.44 % to 91.88 % (0.56 points worse)" in told
    assert "the artifact is 3.84 times smaller" in told
    assert "it runs 2.54 times faster on onnxruntime" in told


def test_summary_claims_no_speed_within_the_spread() -> None:
    run = make_run()
    run["rows"][-1]["speedup"]["over_baseline"] = number(1.08, "x", spread=0.2, verdict="no difference")
    assert "shows no difference" in findings.summary(run)
    assert "faster" not in findings.summary(run)


def test_a_metric_where_lower_is_better_is_judged_so() -> None:
    run = make_run(metric="perplexity", unit="")
    run["metric"]["higher_is_better"] = False
    assert "(0.5625 better)" in findings.summary(run)


def test_a_step_that_gained_nothing_says_none() -> None:
    prune, distill, quantize = findings.gains(make_run())
    assert prune.size == "none"
    assert prune.latency.startswith("none (1.03x [0.93-")
    assert distill.size == "under 0.01 % larger (+74 bytes)"
    assert quantize.size == "3.84 times smaller (-33.0 MiB)"
    assert quantize.latency.startswith("2.49 times faster [2.24-2.74]")


def test_a_slower_step_says_so_with_its_spread_in_order() -> None:
    run = make_run()
    run["rows"][3]["speedup"]["over_previous"] = number(0.5, "x", spread=0.2, verdict="slower")
    assert findings.gains(run)[2].latency == "2.00 times slower [1.67-2.50]"


def test_the_artifact_is_no_step_and_gains_nothing_alone() -> None:
    assert [gain.label for gain in findings.gains(make_run())] == ["prune", "distill", "quantize"]


def test_a_step_taken_twice_is_numbered() -> None:
    run = make_run()
    run["rows"][2]["name"] = "prune"
    assert findings.labels(run["rows"]) == ["baseline", "prune #1", "prune #2", "quantize", "artifact"]


def test_each_warning_stands_once_with_its_steps() -> None:
    found = dict(findings.warnings(make_run()))
    assert found["operations without a MAC count: aten.lstm"] == ["quantize", "artifact"]
    assert len(found) == 2


def test_a_layer_has_one_line_for_all_steps() -> None:
    found = {each.name: each for each in findings.layers(make_run())}
    assert list(found)[:2] == ["conv1", "layer1.conv"]
    assert (found["layer2.conv"].sparsity, found["layer2.conv"].weight_bits) == (0.25, 8)
    assert found["conv1"].refused
    assert found["conv1"].weight_bits == 8
    assert found["layer7.conv"].notes == [
        ("quantize", "refused", "its output goes to an operator that has no int8 kernel here")
    ]


# ----------------------------------------------------------------------------------------------- table


def block(text: str) -> tuple[list[str], str, list[str]]:
    """Headers, rule and rows of a text table."""
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("----"))
    end = lines.index("", at)
    return lines[at - 2 : at], lines[at], lines[at + 1 : end]


def test_table_shows_each_row() -> None:
    text = table(make_run())
    _, _, rows = block(text)
    assert [row.split()[0] for row in rows] == ["baseline", "prune", "distill", "quantize", "artifact"]
    assert re.split(r"  +", rows[0]) == [
        "baseline", "92.44", "11.7M / 11.7M", "1.81G", "44.6 MiB", "12.9 [12.0-13.8] ms", "1.00x", "39.9 ms",
    ]  # fmt: skip
    assert re.split(r"  +", rows[1])[6] == "no difference"
    assert re.split(r"  +", rows[4]) == [
        "artifact", "91.88", "5.79M / 11.7M", "1.81G", "11.6 MiB", "5.06 [4.71-5.42] ms", "2.54x faster",
        "15.7 ms",
    ]  # fmt: skip
    assert "selected on val, reported on test" in text.splitlines()
    assert max(map(len, text.splitlines())) <= 120


def test_table_without_a_test_split_says_what_it_shows_and_what_is_missing() -> None:
    text = table(gappy_run())
    headers, _, rows = block(text)
    assert "val" in headers[1]
    assert "test" not in headers[1]
    assert re.split(r"  +", rows[2])[3:5] == ["-", "-"]
    assert "not measured (-): size of all rows: runtime 'inductor' has no file" in text
    assert "not measured (-): MACs of distill: the counter failed" in text
    assert "selected on val, reported on val: there is no test split, so the figure is optimistic" in text


def test_table_names_the_steps_of_a_warning() -> None:
    lines = table(make_run()).splitlines()
    assert "warning (quantize, artifact): operations without a MAC count: aten.lstm" in lines
    assert sum("aten.lstm" in line for line in lines) == 1


def test_table_of_eager_has_no_second_eager_column() -> None:
    run = make_run()
    run["target"]["runtime"] = "eager"
    assert "latency on eager" in table(run)
    assert len(block(table(run))[1].split()) == 7


def test_table_of_a_run_without_steps() -> None:
    run = make_run()
    run["rows"] = [run["rows"][0], {**run["rows"][0], "name": "artifact", "kind": "artifact"}]
    assert "no step was taken" in table(run)
    assert "No step was taken" in render(run)


texts = st.text(max_size=40)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-6, 1e9)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Runs with any names and numbers that a run can hold."""
    run = make_run(metric=draw(texts), unit=draw(st.sampled_from(["%", "", "dB"])))
    for row in run["rows"]:
        row["name"] = draw(texts)
        for entry in row["metric"].values():
            entry["value"] = draw(st.floats(-1e6, 1e6))
        row["nonzero"]["value"] = draw(st.integers(0, 10**12))
        row["size_bytes"]["value"] = draw(st.integers(0, 10**12))
        for entry in (*row["latency_ms"].values(), *row["speedup"].values()):
            low, middle, high = sorted(draw(st.tuples(positive, positive, positive)))
            entry.update(value=middle, low=low, high=high)
        for entry in row["speedup"].values():
            entry["verdict"] = draw(st.sampled_from(["faster", "slower", "no difference"]))
    run["rows"][1]["warnings"] = draw(st.lists(texts, max_size=3))
    run["rows"][2]["layers"] = [layer(draw(texts), "refused", reason=draw(texts), sparsity=draw(st.floats(0, 1)))]
    return run


@pytest.mark.slow
@given(runs())
def test_table_is_aligned_and_plain(run: dict[str, Any]) -> None:
    headers, rule, rows = block(table(run))
    edges = [match.start() for match in re.finditer("  ", rule)]
    for line in (*headers, *rows):
        padded = line.ljust(len(rule))
        assert len(padded) == len(rule), "nothing sticks out"
        assert all(padded[edge : edge + 2] == "  " for edge in edges)
    assert all(char.isprintable() or char == "\n" for char in table(run))


# ------------------------------------------------------------------------------------------------ page


def test_page_holds_every_number_exactly() -> None:
    for run in (make_run(), gappy_run()):
        page = Page(render(run))
        for cells, row in zip(page.cells("steps"), run["rows"], strict=True):
            assert_same_numbers(cells, row)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(runs())
def test_page_holds_any_number_exactly_and_any_name_as_text(run: dict[str, Any]) -> None:
    page = Page(render(run))
    for cells, row in zip(page.cells("steps"), run["rows"], strict=True):
        assert_same_numbers(cells, row)
    assert page.tags.count("script") == 3
    labels = [row[0]["text"] for row in page.rows["steps"][1:]]
    # a browser reads CR LF as LF and NUL as nothing that can be shown; neither can start a tag
    tidy = str.maketrans({"\r": "\n", "\0": "\ufffd"})
    assert [each.translate(tidy) for each in labels] == [each.translate(tidy) for each in findings.labels(run["rows"])]


def test_page_shows_layers_with_bits_sparsity_and_reasons() -> None:
    page = Page(render(make_run()))
    rows = page.rows["layers"][1:]
    shown = {row[0]["text"]: row for row in rows}
    assert shown["layer4.conv"][1]["data-value"] == "0.5"
    assert shown["layer4.conv"][2]["data-value"] == "8"
    assert shown["layer7.conv"][2]["text"] == "float"
    assert "no int8 kernel" in shown["layer7.conv"][6]["text"]
    assert "refused by prune: its 3 input channels" in re.sub(r"\s+", " ", shown["conv1"][6]["text"])


def test_page_shows_the_history_of_training() -> None:
    run = make_run()
    page = Page(render(run))
    for cells, epoch in zip(page.cells("history"), run["rows"][2]["history"], strict=True):
        assert {name: json.loads(cell["data-value"]) for name, cell in cells.items()} == epoch
    assert [plot["id"] for plot in page.data["histories"]] == ["history-2-loss", "history-2-val"]
    assert [line["name"] for line in page.data["histories"][0]["lines"]] == ["response", "label"]


def test_history_of_rounds_keeps_what_an_epoch_lacks() -> None:
    run = make_run()
    run["rows"][1]["history"] = [
        {"round": 1.0, "epoch": 1.0, "loss_label": 1.0},
        {"round": 2.0, "epoch": 1.0, "loss_label": 0.5, "val": 80.0},
    ]
    data = Page(render(run)).data
    assert data["histories"][0]["where"] == ["round 1, epoch 1", "round 2, epoch 1"]
    assert data["histories"][1]["lines"][0]["y"] == [None, 80.0]


def test_page_shows_recipe_machine_warnings_and_what_it_was_judged_on() -> None:
    text = "".join(Page(render(make_run())).text)
    for part in (
        '"do": "torchslim.prune.step:Prune"',
        "Made-up 9000",
        "2.14.1",
        "operations without a MAC count: aten.lstm",
        "Selected on val, reported on test",
    ):
        assert part in text


def test_page_gives_the_reason_for_what_is_not_measured() -> None:
    page = Page(render(gappy_run()))
    assert "Not measured: Size of all rows: runtime 'inductor' has no file" in "".join(page.text)
    assert page.data["tradeoffs"][0]["points"] == []
    assert len(page.data["tradeoffs"][1]["points"]) == 5


def hostile_run() -> dict[str, Any]:
    run = make_run(metric=HOSTILE)
    run["metric"]["unit"] = "</td>"
    for row in run["rows"]:
        row["name"] = f"{row['name']}<b>&lt;{HOSTILE}"  # plotly would take <b> and &lt; for markup
        row["warnings"] = [f"{HOSTILE}\" onmouseover='alert(1)'"]
    run["rows"][1]["layers"] = [layer(f"a{HOSTILE}", "refused", reason=f'" onclick=alert(1) {HOSTILE}')]
    run["rows"][1]["macs"] = {"not_measured": f'"><img src=x onerror=alert(1)>{HOSTILE}'}
    run["rows"][2]["history"] = [{"epoch": 1.0, f"loss_{HOSTILE}": 1.0, "val": 80.0}]
    run["recipe"]["note"] = f"<!--{HOSTILE}"
    run["machines"]["this"]["processor"] = f"<b>{HOSTILE}"
    run["target"]["runtime"] = f"x{HOSTILE}"
    for row in run["rows"]:
        row["latency_ms"][f"x{HOSTILE}"] = row["latency_ms"].pop("onnxruntime")
    return run


def test_no_name_becomes_markup() -> None:
    run = hostile_run()
    page = Page(render(run))
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "</script" not in page.scripts[0]
    assert HOSTILE in page.data["tradeoffs"][0]["y"]
    for cells, row in zip(page.cells("steps"), run["rows"], strict=True):
        assert_same_numbers(cells, row)


def test_page_names_no_other_file() -> None:
    page = Page(render(make_run()))
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert addresses == ["data:,"]
    assert not re.search(r"url\(|@import", (Path(numbers.__file__).parent / "page.css").read_text())
    policy = next(
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in str(value)
    )
    assert str(policy).startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in str(policy).partition("style-src")[0]


def test_page_is_the_same_each_time() -> None:
    run = make_run()
    before = copy.deepcopy(run)
    assert render(run) == render(run)
    assert run == before, "rendering changes nothing"


# ------------------------------------------------------------------------------------------------ load


def written(folder: Path, content: Any) -> Path:
    path = folder / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_load_takes_the_file_or_its_folder(tmp_path: Path) -> None:
    run = make_run()
    path = written(tmp_path, run)
    assert load_run(path) == load_run(tmp_path) == load_run(str(path)) == run


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is damaged: Expecting property name"),
        ("[" * 100_000, "is damaged.*nested.*64"),
        ('{"format": NaN}', "NaN is no number of JSON"),
        ("[1]", 'has no "format"'),
        ("{}", 'has no "format"'),
        ('{"format": true}', "number from 1 to 1.*got true"),
        ('{"format": 0}', "number from 1 to 1.*got 0"),
        ('{"format": 2}', "format 2.*up to 1.*upgrade"),
        ('{"format": 1}', "is damaged: torchslim: Field required.*run again"),
        ('{"format": 1, "format": 1}', "the key 'format' is given twice"),
        ('{"format": 1e999}', "a number is too large"),
        (f'{{"format": {2**64}}}', "whole number.*64 bits"),
    ],
)
def test_load_refuses_what_is_no_run(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        load_run(written(tmp_path, content))


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no run\.json.*folder"):
        load_run(tmp_path)
    with pytest.raises(ArtifactError, match="there is no file"):
        load_run(tmp_path / "none.json")
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="is damaged"):
        load_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="there is no file"):
        load_run(tmp_path / "file" / "run.json")
    (tmp_path / "deep" / "run.json").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="holds no run.json"):
        load_run(tmp_path / "deep" / "run.json")


@pytest.mark.parametrize("key", sorted(set(make_run()) - {"format"}))
def test_load_names_a_missing_key(tmp_path: Path, key: str) -> None:
    run = make_run()
    del run[key]
    with pytest.raises(ArtifactError, match=rf"is damaged: {key}: Field required; run again"):
        load_run(written(tmp_path, run))


@pytest.mark.parametrize("key", sorted(make_run()["rows"][0]))
def test_load_names_a_row_that_lacks_a_key(tmp_path: Path, key: str) -> None:
    run = make_run()
    run["rows"][2][key] = 7
    with pytest.raises(ArtifactError, match=rf"is damaged: rows\.2\.{key}\S*: Input should be .*, got 7; run again"):
        load_run(written(tmp_path, run))


@pytest.mark.parametrize("key", ["over_baseline", "over_previous"])
@pytest.mark.parametrize("of", ["speedup", "shrink"])
def test_load_names_a_ratio_that_is_missing(of: str, key: str, tmp_path: Path) -> None:
    run = make_run()
    del run["rows"][1][of][key]
    with pytest.raises(ArtifactError, match=rf"rows\.1\.{of}\.{key}: Field required"):
        load_run(written(tmp_path, run))


@pytest.mark.parametrize("end", ["low", "high"])
def test_load_takes_no_spread_with_one_end(end: str, tmp_path: Path) -> None:
    run = make_run()
    del run["rows"][1]["speedup"]["over_baseline"][end]
    with pytest.raises(ArtifactError, match=r"damaged: rows\[1\]\.speedup\.over_baseline needs both low and high"):
        load_run(written(tmp_path, run))


@pytest.mark.parametrize("place", [(), ("rows", 0), ("rows", 0, "parameters"), ("metric",), ("rows", 1, "speedup")])
def test_load_takes_no_unknown_keys_and_no_absurd_numbers(place: tuple[Any, ...], tmp_path: Path) -> None:
    run = make_run()
    inside: Any = run
    for key in place:
        inside = inside[key]
    inside["more"] = 1
    with pytest.raises(ArtifactError, match=r"more: Extra inputs are not permitted"):
        load_run(written(tmp_path, run))
    run = make_run()
    run["rows"][0]["parameters"]["value"] = 1e300
    with pytest.raises(ArtifactError, match=r"rows\.0\.parameters\S*: Input should be less than"):
        load_run(written(tmp_path, run))
    run["rows"][0]["parameters"]["value"], run["rows"][0]["name"] = 1, "x" * 10**6
    with pytest.raises(ArtifactError, match=r"rows\.0\.name: String should have at most"):
        load_run(written(tmp_path, run))


def test_load_wants_the_figures_that_the_report_is_about(tmp_path: Path) -> None:
    for parent, key in (("metric", "test"), ("latency_ms", "onnxruntime")):
        run = make_run()
        del run["rows"][1][parent][key]
        with pytest.raises(ArtifactError, match=rf"rows\[1\]\.{parent} has no {key}"):
            load_run(written(tmp_path, run))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_loads_can_be_shown_and_what_cannot_is_an_artifact_error(data: st.DataObject) -> None:
    """Any part of a run replaced by anything: never an error of another kind."""
    run = make_run()
    place: Any = run
    keys: list[Any] = []
    while isinstance(place, dict | list) and place and (not keys or data.draw(st.booleans() | st.just(True))):
        keys.append(data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))))
        parent, place = place, place[keys[-1]]
    parent[keys[-1]] = data.draw(json_values)
    with TemporaryDirectory() as folder:
        path = written(Path(folder), run)
        try:
            loaded = load_run(path)
        except ArtifactError:
            return
    table(loaded)
    findings.summary(loaded)
    render(loaded)


@pytest.mark.slow
def test_reading_and_writing_reports_loads_no_torch_and_importing_loads_no_plotly() -> None:
    """The package's own `__init__` imports torch, so a bare stand-in takes its place."""
    code = (
        "import sys, types; bare = types.ModuleType('torchslim'); bare.__path__ = [sys.argv[1]]; "
        "sys.modules['torchslim'] = bare; import torchslim.report as report; "
        "assert not {'torch', 'plotly', 'jinja2'} & set(sys.modules), 'at import'; "
        "import json; report.render(json.load(sys.stdin)); assert 'torch' not in sys.modules, 'at render'"
    )
    package = str(Path(numbers.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, package], input=json.dumps(make_run()), text=True, check=True)


# --------------------------------------------------------------------------------------------- browser


def show(
    browser: webdriver.Chrome, run: dict[str, Any], folder: Path, *, width: int = 1280, scheme: str = "light"
) -> str:
    """Open a run's page at a width; its address."""
    path = folder / "report.html"
    path.write_text(render(run), encoding="utf-8")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    for log in ("browser", "performance"):
        browser.get_log(log)  # what earlier pages left
    browser.get(path.as_uri())
    WebDriverWait(browser, 30).until(lambda it: it.execute_script("return document.readyState") == "complete")
    return path.as_uri()


def boxes(browser: webdriver.Chrome, selector: str) -> list[tuple[float, float, float, float]]:
    script = (
        "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
        ".map(r => [r.left, r.top, r.right, r.bottom])"
    )
    return [tuple(box) for box in browser.execute_script(script, selector)]


@pytest.mark.slow
def test_browser_shows_the_page_alone_and_without_complaint(browser: webdriver.Chrome, tmp_path: Path) -> None:
    address = show(browser, make_run(), tmp_path)
    assert browser.get_log("browser") == []
    sent = requests(browser)
    assert address in sent, "the log of requests works"
    assert [url for url in sent if url not in (address, "data:,")] == []


@pytest.mark.slow
def test_browser_draws_a_point_for_each_row(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = make_run()
    show(browser, run, tmp_path)
    for plot in ("plot-size", "plot-latency"):
        assert points(browser, plot) == len(run["rows"])
        shown = [each.text for each in browser.find_elements(By.CSS_SELECTOR, f"#{plot} .annotation-text")]
        assert shown == findings.labels(run["rows"])
    assert len(browser.find_elements(By.CSS_SELECTOR, "#plot-latency .errorbar path.xerror")) == len(run["rows"])
    epochs = len(run["rows"][2]["history"])
    assert points(browser, "history-2-loss") == 2 * epochs
    assert points(browser, "history-2-val") == epochs


@pytest.mark.slow
def test_browser_draws_what_was_measured_only(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = gappy_run()
    show(browser, run, tmp_path)
    assert points(browser, "plot-size") == 0
    assert "not measured" in browser.find_element(By.ID, "plot-size").text
    assert points(browser, "plot-latency") == len(run["rows"])
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_browser_shows_the_numbers_of_the_run(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = make_run()
    show(browser, run, tmp_path)
    for element, row in zip(browser.find_elements(By.CSS_SELECTOR, "#steps tbody tr"), run["rows"], strict=True):
        assert element.find_element(By.TAG_NAME, "th").text == row["name"]
        cells = element.find_elements(By.TAG_NAME, "td")
        shown = {cell.get_attribute("data-field"): json.loads(str(cell.get_attribute("data-value"))) for cell in cells}
        assert shown == {name: entry["value"] for name, entry in fields(row).items()}
        assert all(cell.text for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_browser_keeps_labels_apart_and_the_page_within_the_window(
    browser: webdriver.Chrome, tmp_path: Path, width: int
) -> None:
    run = make_run()
    for row in run["rows"]:
        row["metric"]["test"]["value"] = 90.0
        row["size_bytes"]["value"] = 1000
    show(browser, run, tmp_path, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for plot in ("plot-size", "plot-latency"):
        found = boxes(browser, f"#{plot} .annotation-text")
        frame = boxes(browser, f"#{plot} .main-svg")[0]
        assert len(found) == len(run["rows"])
        for index, (left, top, right, bottom) in enumerate(found):
            assert frame[0] <= left < right <= frame[2]
            assert frame[1] <= top < bottom <= frame[3]
            for other in found[:index]:
                apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
                assert apart, f"labels overlap in {plot}"


@pytest.mark.slow
def test_browser_runs_no_script_of_a_name(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = hostile_run()
    address = show(browser, run, tmp_path)
    assert HOSTILE in browser.find_element(By.ID, "steps").text  # an open alert would raise here
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if url not in (address, "data:,")] == []
    for plot in ("plot-size", "plot-latency"):
        shown = [each.text for each in browser.find_elements(By.CSS_SELECTOR, f"#{plot} .annotation-text")]
        assert shown == findings.labels(run["rows"]), "plots show names as they are"


@pytest.mark.slow
def test_browser_follows_the_color_scheme(browser: webdriver.Chrome, tmp_path: Path) -> None:
    found = []
    for scheme in ("light", "dark"):
        show(browser, make_run(), tmp_path, scheme=scheme)
        ink = browser.execute_script("return getComputedStyle(document.body).color")
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        label = browser.execute_script(
            "return getComputedStyle(document.querySelector('#plot-size .annotation-text')).fill"
        )
        found.append((paper, ink))
        assert label == ink, "plots take the page's colors"
    assert found[0] != found[1]
