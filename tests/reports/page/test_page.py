"""The page: its data against the tables, and what a browser without a screen makes of it."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from harness.contracts.record import Score
from harness.files import write_files
from harness.records.store import RecordStore
from reports.cli import main
from reports.numbers.load import load_panels
from reports.numbers.measures import evaluate
from reports.page.build import build_page
from reports.page.data import CONSTANT, MAP, REMOVED, _routes, page_data
from reports.page.embed import embed, with_claims
from reports.page.screenshot import browser_options, find_browser
from reports.page.screenshot import main as screenshot
from reports.tables.scores import main_table
from tests.reports.synthetic import BASELINE, RIGHT, make_cell
from tests.reports.tables import test_answers, test_layers

CELLS = 200
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>&amp;\u2028"
WRITTEN = {"none": "    return x + 1  # 😀", "reap": "    return x - 1  # 😁", "hc_smoe": "    return x + 1  # 😀"}
CLAIM = {
    "id": "one", "says": "REAP keeps code", "source": "a paper", "verdict": "holds", "p": 0.001, "p_corrected": 0.004,
    "model": "tiny", "suite": "reference", "backend": "hf", "more": "", "missing": [], "commands": [],
    "corpus": "mixed", "note": "one model",
    "evidence": [{"text": "code, reap - frequency: +30.0", "alone": "math", "corpora": [
        {"corpus": "", "all": "+30.0 [20, 40]", "parts": {"code": "+1.0", "math": "+89.0"}},
        {"corpus": "writing", "all": "−7.0 [−9, −5]", "parts": {"code": "−7.0"}},
    ]}],
}  # fmt: skip
UNTESTED = CLAIM | {"id": "two", "verdict": "not tested", "p": None, "p_corrected": None, "evidence": []}


def dressed_cell(method: str, ratio: float, right: dict):
    """A cell with a plan, drift by position, texts that differ from cell to cell, and a hostile one."""
    record, samples = make_cell(method, ratio, "none" if method == "none" else "mixed", 0, right)
    samples = [
        replace(s, output=f"{s.item}\n{WRITTEN[method]}", prompt=f"Write {s.item}")
        if s.task == "code"
        else replace(s, output=HOSTILE, prompt=HOSTILE)
        if s.item == "writing-000"
        else s
        for s in samples
    ]
    drift = [
        Score("drift", metric, 1 + ratio + at / 100, 20, 1 + ratio, 1.5 + ratio, f"position {at}-{at}")
        for metric in ("js", "free_js", "running_cross_perplexity")
        for at in (1, 2, 4)
    ]
    plan = {"0": {"experts": 3, "rows": 4 if method == "hc_smoe" else 3, "group_sizes": [2] * (method == "hc_smoe")}}
    asked = test_answers.answers(0.02 + ratio / 10, 0.9 - ratio)
    return replace(record, scores=record.scores + drift + asked, plan={} if method == "none" else plan), samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sweep with a hostile name whose cells have something to show in every part of the page, and its report."""
    folder = tmp_path_factory.mktemp("page") / "<b>sweep & co"
    store = RecordStore(folder)
    RecordStore(folder, "baseline").write(*dressed_cell("none", 0.0, BASELINE))
    for method, route in (("reap", [0, None, 1, 2]), ("hc_smoe", [0, 1, 1, 2])):
        for ratio in (0.25, 0.5):
            cell = dressed_cell(method, ratio, RIGHT[method][ratio])
            store.write(*cell)
            place = folder / "cells" / cell[0].cell["id"]
            place.mkdir(parents=True)
            (place / "plan.json").write_text(
                json.dumps({"layers": [{"layer": 0, "experts": [{"sources": [{}]}] * 4, "route": route}]})
            )
            saliency = (
                {"layers": {"0": [0.5, 0.125, 2.0, 1.0]}} if method == "reap" else {"groups": {"0": [0, 1, 1, 2]}}
            )
            (place / "saliency.json").write_text(json.dumps({"method": method} | saliency))
            if ratio == 0.5:
                layers = {str(i): test_layers.numbers(i, 0.5, method == "hc_smoe") for i in (2, 4)}
                told = test_layers.told(cell[0].cell["id"], layers)
                write_files({folder / "diagnostics" / f"{place.name}.json": json.dumps(told).encode()})
    silent, _ = make_cell("random", 0.5, "mixed", 0, RIGHT["frequency"][0.5])
    store.write(silent, [])
    (folder / "report").mkdir()
    (folder / "report" / "claims.json").write_text(json.dumps([CLAIM, UNTESTED]))
    assert main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return page_data(folder, [evaluate(panel) for panel in load_panels(folder)], "Opening.")


def cell_of(data: dict, method: str, ratio: float = 0.5) -> dict:
    (found,) = (cell for cell in data["cells"] if (cell["method"], cell["ratio"]) == (method, ratio))
    return found


def test_scores_are_those_of_the_tables(folder, data):
    (panel,) = load_panels(folder)
    table = main_table(evaluate(panel), "mixed")
    (row,) = (row for row in table.rows if row[:2] == ["0.5", "reap"])
    shown = cell_of(data, "reap")["scores"]
    assert [shown[name][0] for name in ("generative", "code", "perplexity")] == [
        row[table.header.index(name)] for name in ("generative average (%)", "code (%)", "perplexity")
    ]
    text, value, low, high, n, difference, change, paired = shown["code"]
    assert (value, n, change, paired) == (0.6, 40, -0.3, True) and low < value < high
    assert difference.startswith("−30.0 [") and cell_of(data, "baseline", 0.0)["scores"]["code"][5] is None
    groups = {m["name"]: m["group"] for m in data["measures"]}
    assert (groups["code"], groups["multiple_choice_code"]) == ("scores", "scores by domain")


def test_texts_are_of_the_longest_that_the_baseline_wrote(data):
    (items,) = data["items"]
    assert len([item for item in items if item["task"] == "code"]) == 4
    assert next(item for item in items if item["task"] == "writing")["item"] == "writing-000"
    place = next(i for i, item in enumerate(items) if item["task"] == "code")
    text, score, cut = cell_of(data, "reap")["texts"][place]
    assert text.endswith("return x - 1  # 😁") and items[place]["prompt"] == f"Write {items[place]['item']}"
    assert (score, cut) == (1.0, False) and cell_of(data, "random")["texts"] == []


def test_what_stands_for_experts_is_told_apart(tmp_path):
    experts = [{"constant": "c"}, {"sources": [{}]}, {"low_rank": {"left": "l"}}, {"sources": [{}], "down": "d"}]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"layers": [{"layer": 2, "experts": experts, "route": [3, 0, None, 2, 1]}]}))
    assert _routes(path) == {"2": [1, CONSTANT, REMOVED, MAP, 0]}


def test_plans_are_read_where_they_lie(data):
    reap = cell_of(data, "reap")
    assert reap["map"] == {"0": [0, -1, 1, 2]} and data["saliency"][reap["saliency"]] == {"0": [0.5, 0.125, 2.0, 1.0]}
    assert cell_of(data, "random")["map"] == {} == cell_of(data, "baseline", 0.0)["map"]
    assert reap["curves"]["js"][0] == [1, 1.51, 1.5, 2.0]


def test_answers_and_layers_are_those_of_the_record(data):
    merged, pruned, silent = (cell_of(data, method) for method in ("hc_smoe", "reap", "random"))
    assert merged["reliability"] == [[0.65, 0.58, 0.57, 0.59, 20], [0.99, 0.92, 0.91, 0.93, 80]]
    assert silent["reliability"] == silent["layers"] == cell_of(data, "hc_smoe", 0.25)["layers"] == []
    sections = {m["name"]: m["section"] for m in data["measures"]}
    assert (sections["ece"], sections["consistency_negation_code_consistent"]) == ("calibration", "consistency")
    assert sections["code"] == sections["drift_js"] == "scores"
    second, fourth = merged["layers"]
    assert (second["layer"], second["tokens"], fourth["entropy"]) == ("2", 4100, [2.0, 1.25])
    assert second["measured"][0] == 0.075 and second["predicted"][0] == 0.045 and second["measured"][3] == 4100
    assert second["distance"][0] == pytest.approx(1.27) and pruned["layers"][0]["distance"] is None


def test_json_in_the_page_cannot_end_its_element():
    text = embed({"a": HOSTILE, "b": "<!--<script>"})
    assert "<" not in text and json.loads(text) == {"a": HOSTILE, "b": "<!--<script>"}
    with pytest.raises(ValueError):
        embed(float("nan"))


def test_claims_replace_those_of_a_finished_page(data):
    page = build_page("t", data, json.dumps([CLAIM]))
    changed = with_claims(page, json.dumps([CLAIM | {"says": r"\1 </script>"}]).replace("0.004", "NaN"))
    assert r'"says":"\\1 \u003c/script>"' in changed and '"p_corrected":null' in changed
    assert "REAP keeps code" not in changed and changed.count("</script>") == page.count("</script>") == 3


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_a_picture_is_taken(folder, tmp_path):
    picture = tmp_path / "docs" / "page.png"
    assert screenshot([str(folder / "report"), str(picture), "ratio=0.5"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_no_page_no_picture(tmp_path, capsys):
    assert screenshot([str(tmp_path), str(tmp_path / "page.png")]) == 2
    assert capsys.readouterr().err.startswith("screenshot: error: no page.html in ")


# In a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    program, driver = find_browser(), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its driver is installed (Debian: chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in (*browser_options(), "--window-size=1400,1200"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


def show(browser, page: Path, view: str = "") -> None:
    browser.get("about:blank")
    browser.get(page.resolve().as_uri() + (f"#{view}" if view else ""))


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])]"
        ".filter(e => e.getClientRects().length).map(e => e.textContent)",
        selector,
    )


def cells_of(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(r => [...r.cells].map(c => c.textContent).join('|'))",
        selector,
    )


def choose(browser, select: str, value: str) -> float:
    """Milliseconds until the page is laid out again after another choice."""
    return browser.execute_script(
        "const start = performance.now(), select = document.getElementById(arguments[0]); select.value = arguments[1];"
        "select.dispatchEvent(new Event(select.tagName === 'SELECT' ? 'change' : 'input'));"
        "document.body.offsetHeight; return performance.now() - start",
        select,
        value,
    )


def test_it_loads_without_an_error_or_a_request(browser, folder):
    for log in ("browser", "performance"):
        browser.get_log(log)  # forgets what came before
    cell = next((folder / "records").glob("*reap__0.5*.json")).stem
    for view in ("", f"cell={cell}"):
        show(browser, folder / "report" / "page.html", view)
        assert browser.execute_script("return document.body.dataset.ready") is not None
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in asked)
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "about"} and len(set(asked)) <= 4


def test_hostile_texts_stay_texts(browser, folder):
    cell = next((folder / "records").glob("*reap__0.5*.json")).stem
    show(browser, folder / "report" / "page.html", f"cell={cell}")
    assert browser.execute_script("return window.hacked === undefined")
    assert browser.execute_script("return document.querySelectorAll('img, b').length") == 0
    assert texts(browser, "h1") == ["<b>sweep & co"]
    shown = browser.execute_script(
        "return [...document.querySelectorAll('[data-item=\"writing-000\"] pre')].map(e => e.textContent)"
    )
    assert shown == [HOSTILE] * 3  # the prompt, the baseline's and the cell's


def test_filters_sorting_and_claims(browser, folder):
    show(browser, folder / "report" / "page.html")
    methods = "#cells tbody tr td:nth-child(2)"
    assert len(texts(browser, methods)) == 6 and texts(browser, "#count") == ["5 of 5 cells"]
    choose(browser, "filter-method", "reap")
    assert texts(browser, methods) == ["baseline", "reap", "reap"] and texts(browser, "#count") == ["2 of 5 cells"]
    choose(browser, "filter-ratio", "0.5")
    choose(browser, "filter-method", "")
    assert sorted(texts(browser, methods)) == ["baseline", "hc_smoe", "random", "reap"]
    choose(browser, "filter-search", "HC smoe")
    assert texts(browser, methods) == ["baseline", "hc_smoe"]
    choose(browser, "filter-search", "")
    choose(browser, "filter-ratio", "")
    for wanted in (1, -1):
        browser.execute_script("document.querySelector('th[data-column=\"code (%)\"] button').click()")
        place = texts(browser, "#cells thead th").index("code (%)") + 1
        values = [float(text.split()[0]) for text in texts(browser, f"#cells tbody td:nth-child({place})")]
        assert values == sorted(values, reverse=wanted < 0) and len(set(values)) > 3
    choose(browser, "values", "differences")
    assert "Δ code (points)" in texts(browser, "#cells thead th")
    (claim,) = texts(browser, "#claims-table > tbody > tr")
    assert texts(browser, "#claims-untested > summary") == ["1 not tested, and what is missing"]
    assert claim.startswith("holdsREAP keeps code") and "0.004" in claim and "math alone carries it" in claim
    browser.execute_script("document.querySelector('#claims-table details').open = true")
    rows = texts(browser, "#claims-table details tbody tr")
    assert rows == ["mixed (the claim)+30.0 [20, 40]+1.0+89.0", "writing−7.0 [−9, −5]−7.0–"]
    show(browser, folder / "report" / "page.html", "method=hc_smoe&ratio=0.25")
    assert texts(browser, methods) == ["baseline", "hc_smoe"]


def test_chart_tells_what_is_pointed_at_and_opens_it(browser, folder):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, folder / "report" / "page.html", "method=reap&ratio=0.5")
    choose(browser, "chart-score", "code")
    choose(browser, "chart-size", "compression ratio")
    marks = browser.find_elements(By.CSS_SELECTOR, "#chart svg path[transform]")
    assert len(marks) == 2
    ActionChains(browser).move_to_element(marks[1]).perform()
    (tip,) = texts(browser, "#tip")
    assert "reap, ratio 0.5" in tip and "code: 60.0 [" in tip and "(n 40)" in tip
    ActionChains(browser).click().perform()
    opened = WebDriverWait(browser, 30).until(lambda _: texts(browser, "#cell h2"))  # the address changes first
    assert opened == ["reap, ratio 0.5, calibrated on mixed"]


def test_cell_shows_its_texts_plan_and_curves(browser, folder):
    cells = {path.stem.split("__")[1]: path.stem for path in (folder / "records").glob("*__0.5__*.json")}
    page = folder / "report" / "page.html"
    show(browser, page, f"cell={cells['reap']}")
    pair = "#cell .pair:has(pre mark)"
    assert texts(browser, f"{pair} mark")[:2] == ["+", "-"]
    assert texts(browser, f"{pair} .tag")[:2] == ["right", "right"]
    fills = browser.execute_script(
        "return [...document.querySelectorAll('#cell svg.experts')[0].querySelectorAll('rect')]"
        ".map(r => r.getAttribute('class') + ': ' + r.dataset.title)"
    )
    assert fills[1] == "removed: layer 0, expert 1, removed, saliency 0.125" and fills[2].startswith("kept: ")
    assert len(texts(browser, "#drift > svg")) == 3  # divergence, free-running, cross-perplexity
    show(browser, page, f"cell={cells['hc_smoe']}")
    fills = browser.execute_script(
        "return [...document.querySelectorAll('#cell svg.experts rect')].slice(0, 4).map(r => r.getAttribute('fill'))"
    )
    assert fills[0] == fills[3] != fills[1] == fills[2]
    assert "same text" in texts(browser, "#cell .tag")
    show(browser, page, f"cell={cells['random']}")
    assert any("were not stored" in text for text in texts(browser, "#cell .note"))


def test_cell_shows_its_answers_beside_the_baselines(browser, folder):
    cells = {path.stem.split("__")[1]: path.stem for path in (folder / "records").glob("*__0.5__*.json")}
    page = folder / "report" / "page.html"
    show(browser, page, f"cell={cells['reap']}")
    assert len(texts(browser, "#calibration svg path[transform]")) == 4  # two bins of two models
    places = browser.execute_script(
        "return [...document.querySelectorAll('#calibration path[transform]')].map(p => p.getAttribute('transform'))"
    )
    (x, y), size = (float(number) for number in places[-1][10:].split(")")[0].split()), places[-1].split("scale(")[1]
    # 0.99 of the axis from 64 to 360, and 0.92 of that from 314 up to 14; 80 of 100 questions.
    assert (x, y) == pytest.approx((64 + 0.99 * 296, 314 - 0.92 * 300)) and float(size[:-1]) == pytest.approx(
        1.84, abs=0.01
    )
    rows = [row.split("|") for row in cells_of(browser, "#calibration tbody tr")]
    assert rows[0][:4] == ["ECE", "0.070 [0.060, 0.080]", "100", "0.020 [0.010, 0.030]"]
    assert [row[0] for row in rows] == ["ECE", "adaptive ECE", "ECE by chance", "Brier score", "overconfidence"]
    same = {row[0]: row for row in (row.split("|") for row in cells_of(browser, "#consistency tbody tr"))}
    found = same["negation code: same answer (%)"]
    assert found[1].startswith("40.0 [") and found[3].startswith("90.0 [") and found[4].startswith("−50.0 [")
    assert set(same) == {
        f"{form}: {what} (%)" for form in ("negation code", "mmlu order") for what in ("same answer", "accuracy")
    }
    assert not any("ECE" in text or "negation" in text for text in texts(browser, "#cell .row:first-of-type table td"))
    show(browser, page, f"cell={cells['random']}")
    assert texts(browser, "#calibration, #consistency, #layer-charts") == []
    assert not {"Calibration of answers", "Layer by layer"} & set(texts(browser, "#cell h3"))


def test_cell_shows_its_layers(browser, folder):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    cells = {path.stem.split("__")[1]: path.stem for path in (folder / "records").glob("*__0.5__*.json")}
    page = folder / "report" / "page.html"
    show(browser, page, f"cell={cells['hc_smoe']}")
    rows = [row.split("|") for row in cells_of(browser, "#layers tbody tr")]
    heads = texts(browser, "#layers th")
    second = dict(zip(heads, rows[0], strict=True))
    assert len(rows) == 2 and second["layer"] == "2" and second["measured error (%)"].startswith("7.5 [")
    assert second["load entropy (nats)"] == "2 → 1.25" and second["distance of merged pairs"].startswith("1.27 [")
    marks = browser.find_elements(By.CSS_SELECTOR, "#layer-charts svg path[transform]")
    assert len(marks) == 4 + 2  # measured and predicted errors, and ratios of spreads, of two layers
    ActionChains(browser).move_to_element(marks[0]).perform()
    (tip,) = texts(browser, "#tip")
    assert tip.startswith("layer 2\nmeasured: 7.5 [")
    show(browser, page, f"cell={cells['reap']}")
    assert (
        "distance of merged pairs" not in texts(browser, "#layers th") and len(texts(browser, "#layers tbody tr")) == 2
    )


def test_without_the_baselines_texts_a_cell_shows_its_own(browser, data, tmp_path):
    page, without = tmp_path / "page.html", deepcopy(data)
    cell_of(without, "baseline", 0.0)["texts"] = []
    page.write_text(build_page("t", without), encoding="utf-8")
    show(browser, page, f"cell={cell_of(data, 'reap')['id']}")
    assert any("nothing to compare with" in text for text in texts(browser, "#cell .note"))
    assert texts(browser, "#cell mark") == [] and any("x - 1" in text for text in texts(browser, "#cell .pair pre"))
    assert "null" not in browser.execute_script("return document.getElementById('cell').innerText")


def test_two_hundred_cells_stay_responsive(browser, data, tmp_path):
    many = deepcopy(data)
    shapes = [cell for cell in many["cells"] if not cell["baseline"]]
    many["cells"] = [cell for cell in many["cells"] if cell["baseline"]]
    for number in range(CELLS):
        cell = deepcopy(shapes[number % len(shapes)])
        cell["id"], cell["corpus"], cell["ratio"] = f"cell-{number}", f"corpus-{number % 5}", 0.1 + number / 400
        many["cells"].append(cell | {"ids": [cell["id"]]})
    page = tmp_path / "page.html"
    page.write_text(build_page("many", many), encoding="utf-8")
    show(browser, page)
    load = float(browser.execute_script("return document.body.dataset.ready"))
    steps = [("filter-corpus", "corpus-1"), ("filter-search", "cell-1"), ("filter-corpus", "")]
    filtering = [[choose(browser, *step) for step in steps] for _ in range(3)]
    assert texts(browser, "#count") == ["111 of 200 cells"]  # 1, 10 to 19 and 100 to 199
    redrawing = choose(browser, "values", "differences")
    print(f"loaded in {load:.0f} ms, filters {filtering} ms, other columns {redrawing:.0f} ms")
    # The quickest of three: other work on the machine is not the page's doing.
    assert load < 10_000 and max(map(min, zip(*filtering, strict=True))) < 1000 and redrawing < 5000
