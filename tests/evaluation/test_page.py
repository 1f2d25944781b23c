"""report.html in a real browser: every figure is drawn, hovering tells values, nothing fails."""

import json
from pathlib import Path

import pytest

from browser import Browser, find_browser
from dylora.cli.main import main
from dylora.evaluation.page import page
from dylora.evaluation.page.comparison import differences, final_numbers, grouped
from dylora.evaluation.page.page import write_page
from dylora.evaluation.run_files import read_run
from run_folders import write_run, write_stream

HOSTILE = "</script><script>console.error('run')</script><img src=x onerror=console.error('run')>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_browser()
    if executable is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    found = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of a run whose rows hold markup."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "<b>a", text=HOSTILE, steps=6)
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture
def opened(browser, report):
    browser.problems.clear()
    browser.open(report, 1280)
    return browser


def place(browser: Browser, selector: str, across: float = 0.5, down: float = 0.5) -> list[float]:
    """Where a share of an element lies in the window, after it was scrolled to."""
    script = f"""(async () => {{ const one = document.querySelector({json.dumps(selector)});
      one.scrollIntoView({{block: "center"}});
      for (let n = 0; n < 3; n++) await new Promise(requestAnimationFrame);  // it hides the tip
      const box = one.getBoundingClientRect();
      return [box.left + {across} * box.width, box.top + {down} * box.height]; }})()"""
    return browser.evaluate(script)


def tip(browser: Browser) -> str | None:
    return browser.evaluate('tip.hidden ? null : document.getElementById("tip").innerText')


def test_nothing_fails_and_nothing_is_asked_of_a_network(opened):
    assert opened.evaluate("document.querySelectorAll('section').length") == 7
    assert opened.problems == []


def test_a_script_of_a_row_would_be_reported(browser, report, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(report.read_text("utf-8").replace("</body>", f"{HOSTILE}</body>"))
    browser.problems.clear()
    browser.open(bad, 800)
    browser.evaluate("0")
    assert browser.problems != []
    assert all("'value': 'run'" not in problem for problem in browser.problems)  # refused, not run


def test_what_rows_hold_stands_there_as_text(opened):
    assert opened.evaluate("document.querySelector('h1').textContent") == "<b>a"
    assert HOSTILE in opened.evaluate("document.querySelector('.answers').textContent")
    assert HOSTILE in opened.evaluate("document.querySelector('.text').textContent")


def test_every_figure_is_drawn_and_has_a_size(opened):
    found = opened.evaluate(
        "[...document.querySelectorAll('figure')].map(one => [one.querySelector('b').innerText,"
        "one.querySelector('svg').getBoundingClientRect().width,"
        "one.querySelectorAll('path').length])"
    )
    assert len(found) == 17
    assert [name for name, width, paths in found if width < 300 or paths < 5] == []


def test_hovering_a_curve_tells_step_and_values(opened):
    opened.hover(*place(opened, "#figure-share-0 svg", 0.5, 0.4))
    told = tip(opened).splitlines()
    assert told[0].startswith("step ")
    assert sorted(told[1:]) == [f"expert {n}: 0.25" for n in range(4)]
    opened.hover(2, 2)
    assert tip(opened) is None


def test_hovering_a_map_tells_the_cell(opened, report):
    usage = read_run(report.parent).routing["usage"]["skill/1"]
    data = opened.evaluate(
        "JSON.parse(document.querySelector('#figure-usage-0 script').textContent)"
    )
    left, top, width, height = data[1]["box"]
    cell = (left + width * 2.5 / 6, top + height * 3.5 / 4)  # site 2, expert 3
    opened.hover(*place(opened, "#figure-usage-0 svg", *cell))
    assert tip(opened).splitlines() == ["skill/1", f"expert 3, site 2: {usage[2][3] * 4:.4g}"]


def test_the_loss_has_a_switch_to_a_logarithmic_scale(opened):
    shown = "[...document.querySelectorAll('#training .plot')].map(one => one.hidden)"
    assert opened.evaluate(shown)[:2] == [False, True]
    opened.click(*place(opened, "#training button[data-switch]"))
    assert opened.evaluate(shown)[:2] == [True, False]
    assert opened.evaluate("document.querySelector('#figure-loss-1 svg').clientWidth") > 300


def test_text_is_coloured_by_the_leading_expert_of_any_site_and_tells_the_gates(opened):
    color = "getComputedStyle(document.querySelector('.token')).getPropertyValue('--c')"
    assert opened.evaluate(color) == "#0072b2"
    opened.hover(*place(opened, ".token"))
    assert tip(opened).splitlines() == ["expert 0: 70 %", "expert 1: 30 %"]
    opened.evaluate(
        "(() => { const one = document.querySelector('#texts select'); one.value = '1';"
        "one.dispatchEvent(new Event('change')); })()"
    )
    assert opened.evaluate(color) == "#e69f00"
    options = opened.evaluate("[...document.querySelectorAll('option')].map(one => one.text)")
    assert options == ["all sites, mean", "site 0: layers.0"]


def test_the_config_is_copied_by_its_button(opened):
    opened.click(*place(opened, "#settings button"))
    assert opened.evaluate("document.querySelector('#settings button').textContent") == "copied"
    selected = opened.evaluate("getSelection().toString()")
    assert selected.strip() == (Path(report_folder(opened)) / "config.yaml").read_text().strip()
    assert opened.problems == []


def report_folder(browser: Browser) -> str:
    from urllib.parse import unquote

    return unquote(browser.evaluate("location.pathname")).rpartition("/")[0]


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_makes_the_page_scroll_sideways(browser, report, width):
    browser.open(report, width)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    sizes = browser.evaluate(
        "[...document.querySelectorAll('figure:not(.wide) .plot:not([hidden]) svg')].map(one =>"
        "[one.getBoundingClientRect().width, parseFloat(getComputedStyle(one.querySelector("
        "'text')).fontSize) * one.getScreenCTM().a])"
    )
    assert all(0 < drawn <= width for drawn, _ in sizes)
    assert min(text for _, text in sizes) > 6.5  # pixels of the smallest text


def test_on_a_phone_answers_are_stacked_and_what_goes_on_sideways_fades(browser, report):
    """The fade goes where the end is reached."""
    browser.open(report, 360)
    over = "[...document.querySelectorAll('{}')].filter(one => one.scrollWidth > one.clientWidth)"
    assert browser.evaluate(over.format(".answers .scroll") + ".length") == 0
    found = over.format("#experts .scroll, #routing .wide .plot")
    assert browser.evaluate(found + ".map(one => one.className)") == ["scroll more", "plot more"]
    browser.evaluate(f"{found}.forEach(one => one.scrollTo(9999, 0))")
    browser.evaluate("new Promise(requestAnimationFrame)")
    assert browser.evaluate(found + ".map(one => one.className)") == ["scroll", "plot"]


def test_a_dark_page_has_light_ink_in_its_figures(browser, report):
    inks = []
    for dark in (False, True):
        browser.open(report, 800, dark=dark)
        inks.append(browser.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
    assert inks == ["rgb(27, 28, 29)", "rgb(232, 233, 234)"]


def test_print_shows_everything_and_no_button(browser, report):
    browser.open(report, 800)
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert browser.evaluate("[...document.querySelectorAll('details')].every(one => one.open)")
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("document.querySelector('button').offsetParent") is None
    browser.send("Emulation.setEmulatedMedia", media="")


def test_a_stream_has_its_matrix_and_its_novelty(browser, tmp_path):
    folder = write_stream(tmp_path / "stream", 3)
    assert main(["report", str(folder)]) == 0
    browser.problems.clear()
    browser.open(folder / "report.html", 1280)
    titles = browser.evaluate(
        "[...document.querySelectorAll('#stream b')].map(one => one.innerText)"
    )
    assert len(titles) == 4
    assert browser.problems == []
    assert "12 steps, 1,200 target tokens" in browser.evaluate("document.body.innerText")
    browser.hover(*place(browser, "#figure-novelty-0 svg", 0.4, 0.3))
    assert tip(browser).startswith("distance / threshold")
    assert "skill 2" in browser.evaluate("document.querySelector('#stream table').innerText")


@pytest.mark.slow
def test_the_largest_run_is_a_page_below_3_mb_that_says_what_is_thinned(tmp_path):
    folder = write_run(tmp_path / "a", experts=64, sites=96, sets=20, steps=300)
    write_page([folder], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3e6
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "rows of metrics.jsonl is drawn, and every evaluation" in text
    assert "texts are shown for 1 of 96 sites" in text


# Several runs


def test_runs_that_differ_in_seeds_alone_are_one_group_with_a_spread(tmp_path):
    runs = [read_run(write_run(tmp_path / name, seed=n, rank=8)) for n, name in enumerate("ab")]
    runs.append(read_run(write_run(tmp_path / "c", rank=16)))
    groups = grouped(runs)
    assert {name: [run.name for run in group] for name, group in groups.items()} == {
        "a": ["a", "b"],
        "c": ["c"],
    }
    (_, header, rows), losses, passed = final_numbers(groups)
    assert rows[0][:3] == ["a", "2", "1.3 ± 0"]
    assert losses[2][0] == ["skill/0", "1 ± 0", "1"]
    assert passed[2][0] == ["skill/0", "0.5 ± 0", "0.5"]
    assert differences(groups) == [("", ["setting", "a", "c"], [["moe.r", "8", "16"]])]
    assert header[2] == "loss at the end"


def test_the_page_of_several_runs_draws_their_curves_over_each_other(browser, tmp_path, capsys):
    folders = [str(write_run(tmp_path / name, rank=n)) for n, name in enumerate("ab", 1)]
    assert main(["report", *folders, "--out", str(tmp_path / "both.html")]) == 0
    browser.problems.clear()
    browser.open(tmp_path / "both.html", 1000)
    browser.hover(*place(browser, "#compared-0-0 svg", 0.9, 0.4))
    assert sorted(tip(browser).splitlines()) == ["a: 1.3", "b: 1.3", "step 10"]
    assert browser.problems == []


# What cannot be


def test_a_page_without_matplotlib_names_the_extra(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "a", steps=2)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["report", str(folder)]) == 2
    assert "pip install 'dylora[report]'" in capsys.readouterr().err


def test_a_page_without_jinja2_names_the_extra(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "a", steps=2)
    monkeypatch.setattr(page, "_figures", lambda run, names: [])
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    assert main(["report", str(folder)]) == 2
    assert "pip install 'dylora[report]'" in capsys.readouterr().err


def test_what_a_run_has_not_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a", steps=2)
    for name in ("results.json", "routing.json", "config.yaml", "env.json"):
        (folder / name).unlink()
    write_page([folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "figure-loss-0" in page
    assert "figure-usage-0" not in page


def test_a_file_that_is_no_json_is_named(tmp_path, capsys):
    folder = write_run(tmp_path / "a", steps=2)
    (folder / "results.json").write_text("{")
    assert main(["report", str(folder)]) == 2
    assert "results.json: not valid JSON" in capsys.readouterr().err
