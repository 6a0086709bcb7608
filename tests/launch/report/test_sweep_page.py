"""A sweep's page: its numbers are those of the runs, by another library; and it reads well in a browser."""

import csv
import io
import json
import re
import urllib.request
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from launch.report.command import distinct
from launch.report.parts import Section, Text
from launch.report.sweep_folder import SweepFolder
from launch.report.sweep_page import sections

METRIC = "masked/bits_per_token"
SIZES = [(1280, "light"), (390, "dark")]
LEAST_CONTRAST = """() => {
  const channel = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (css) => {
    const [r, g, b] = css.match(/[\\d.]+/g).map((v) => channel(Number(v) / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const css = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)|transparent/.test(css)) return css;
    }
    return "rgb(255, 255, 255)";
  };
  const ratio = (e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const texts = "p, h1, h2, h3, th, td, caption, figcaption, a, button, label, summary, legend";
  return Math.min(...[...document.querySelectorAll(texts)].map(ratio));
}"""
FOCUS = """() => {
  const e = document.activeElement;
  return e === document.body ? null : [e.tagName, e.className, e.name || "", getComputedStyle(e).outlineStyle];
}"""
LOOKS = """(id) => document.querySelector(id + " .plot")._fullData.map(
  (trace) => [trace.line?.dash, trace.marker?.symbol, trace.marker?.pattern?.shape].join())"""
FORTY = """() => {
  const spec = palmette.specs["curve-loss"];
  spec.series = Array.from({ length: 40 }, (_, i) => ({ ...spec.series[0], name: `arm ${i}` }));
}"""


def rows(path):
    return list(csv.reader(io.StringIO(path.read_text())))


def table(page, name):
    """A table of the page by its first cells: what a reader sees."""
    head, *body = page.eval_on_selector_all(f"#{name} tr", "rows => rows.map(r => [...r.cells].map(c => c.innerText))")
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def numbers(text):
    return [
        float(number)
        for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e-?\d+)?", text.replace("−", "-").replace(",", ""))
    ]


def values(sweep, arm, seeds=(0, 1, 2)):
    return np.array(
        [json.loads((sweep / "arms" / arm / str(s) / "result.json").read_text())["figures"][METRIC] for s in seeds]
    )


def test_means_differences_and_p_are_those_of_the_runs(sweep, sweep_page, visit):
    """Beside scipy: Student's interval, the interval of the paired difference at Bonferroni's level, Holm's p."""
    shown = table(visit(sweep_page), "comparison")
    base, others = values(sweep, "rate=0.10"), ["rate=0.11", "rate=0.12"]
    raw = {arm: stats.ttest_rel(values(sweep, arm), base).pvalue for arm in others}
    # The arm with one seed left has a difference and no test.
    low, high = sorted(raw.values())
    holm = {min(raw, key=raw.get): 2 * low, max(raw, key=raw.get): max(2 * low, high)}
    for arm in others:
        each, cells = values(sweep, arm), shown[arm]
        half = stats.sem(each) * stats.t.ppf(0.975, 2)
        assert numbers(cells[METRIC]) == pytest.approx([each.mean(), half], abs=1e-3)
        wide = stats.ttest_rel(each, base).confidence_interval(1 - 0.05 / 3)
        mean, *ends = numbers(cells["difference"])
        assert mean == pytest.approx((each - base).mean(), abs=1e-2)
        assert ends == pytest.approx([wide.low, wide.high], abs=1e-2)
        assert float(cells["p (Holm)"]) == pytest.approx(holm[arm], abs=1e-3)
        noise = wide.low <= 0 <= wide.high
        assert cells["finding"] == ("◇ within noise" if noise else "▲ better")
        assert numbers(cells["tokens"] + " " + cells["FLOPs"]) == [80_000, 3.56e11]
    assert shown["rate=0.10"]["finding"] == "● baseline"
    assert shown["rate=0.13"]["runs"] == "1 of 3"
    assert "(n = 1)" in shown["rate=0.13"][METRIC]


def test_what_failed_and_what_is_missing_is_said(sweep_page, visit):
    page = visit(sweep_page)
    told = page.eval_on_selector_all("#missing tbody tr", "rows => rows.map(r => [...r.cells].map(c => c.innerText))")
    assert told == [
        ["rate=0.13", "1", "failed", "step 7: <loss> is not a number"],
        ["rate=0.13", "2", "unfinished", "no result yet"],
    ]
    assert "Which rate is best?" in page.inner_text("main")
    assert "More is better. (A made-up paper, 2026.)" in page.inner_text("main")


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_in_every_size_and_light(width, scheme, sweep_page, visit):
    """No network, nothing that scrolls sideways, dark and light."""
    page = visit(sweep_page, width=width, scheme=scheme)
    assert not [url for url in page.noted.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert page.noted.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Every plot lies within the page, and has drawn something.
    for box in page.eval_on_selector_all(
        ".plot", "all => all.map(p => p.querySelector('svg').getBoundingClientRect())"
    ):
        assert box["left"] >= 0
        assert box["right"] <= width
    assert page.locator(".plot .points path, .plot .point path").count() > 50
    wide = page.eval_on_selector("#comparison", "t => [t.parentElement.scrollWidth, t.parentElement.clientWidth]")
    assert (wide[0] > wide[1]) == (width == 390), "only the wide table scrolls, in its own box"
    dark_and_light(page, scheme)


def dark_and_light(page, scheme):
    """As the system asks, until the reader says otherwise; every text stands out from its ground, plots follow."""
    ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    plotted = lambda: page.evaluate("document.querySelector('.plot')._fullLayout.paper_bgcolor")
    seen = []
    for dark in (scheme == "dark", scheme != "dark"):
        assert page.get_attribute("html", "data-theme") == ("dark" if dark else "light")
        assert page.get_attribute("#theme", "aria-pressed") == str(dark).lower()
        assert page.evaluate(LEAST_CONTRAST) >= 4.5
        seen.append((ground(), plotted()))
        page.click("#theme")
    assert len({*seen}) == 2
    light = {("rgb(255, 255, 255)", "#ffffff")}
    assert light < {*seen}


def test_by_keyboard(sweep_page, visit):
    """The skip link comes first; every control and every wide table is reached, and the focus is seen."""
    page = visit(sweep_page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.reload()
    page.wait_for_selector("html[data-ready]")
    reached = []
    for _ in range(200):
        page.keyboard.press("Tab")
        what = page.evaluate(FOCUS)
        if what is None:
            break
        reached.append(what)
    assert all(outline != "none" for *_, outline in reached)
    count = lambda tag, kind="": sum(t == tag and kind in (c, n) for t, c, n, _ in reached)
    assert count("INPUT", "axis") == 1, "radio buttons are one stop, arrows choose"
    assert count("DIV", "box") == page.locator(".box").count()
    assert count("BUTTON", "png") == count("A", "csv") == page.locator("figure").count()
    assert sum(t == "SUMMARY" for t, *_ in reached) == 1
    # Arrows choose another axis, and the space bar hides a curve.
    page.focus("input[name=axis]:checked")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('#curve-loss .plot')._fullLayout.xaxis.title.text") == "tokens"
    page.focus("#curve-loss .legend input")
    page.keyboard.press("Space")
    drawn = "document.querySelector('#curve-loss .plot')._fullData.map(trace => trace.visible)"
    assert page.evaluate(drawn) == [False, True, True, True]


def test_it_reads_without_colour(sweep_page, visit):
    """Curves differ in dash and marker, findings in words and markers, shares in patterns."""
    page = visit(sweep_page)
    for figure in ("#curve-loss", "#curve-masked-bits-per-token", "#goodput", "#means"):
        found = page.evaluate(LOOKS, figure)
        assert len(found) > 1
        assert all(a != b for a, b in combinations(found, 2)), figure
    # As many arms as a large sweep has.
    page.evaluate(FORTY)
    page.check("input[name=axis][value=FLOPs]")
    assert len({*page.evaluate(LOOKS, "#curve-loss")}) == 40


def test_it_is_a_document(sweep_page, visit):
    """Language, title, headings in order, captions, scopes, names of figures, and no name twice."""
    page = visit(sweep_page)
    assert page.title() == "made_up"
    assert page.get_attribute("html", "lang") == "en"
    ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    # Plotly names parts of its drawings itself.
    ours = [i for i in ids if not re.match(r"(clip|legend|topdefs|defs|g)[\w-]*\d", i)]
    assert len(ours) == len({*ours})
    assert page.locator("h1").count() == 1
    assert page.locator("table").count() == page.locator("table > caption").count() > 4
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator(".plot[role=img][aria-label]").count() == page.locator("figure").count() == 4
    for link in page.eval_on_selector_all("nav a", "all => all.map(a => a.getAttribute('href'))"):
        assert page.locator(f"section{link} > h2").count() == 1


def test_files_of_figures_and_tables(sweep_page, visit, tmp_path):
    """What the page's links give is what `--csv` writes, and both are what is drawn."""
    page = visit(sweep_page)
    folder = sweep_page.parent / "csv"
    names = page.eval_on_selector_all("table, figure", "all => all.map(e => e.id)")
    assert sorted(path.stem for path in folder.glob("*.csv")) == sorted(names)
    numeric = re.compile(r"-?[\d.]+(e[+-]?\d+)?")
    plain = lambda text: [
        [float(c) if numeric.fullmatch(c) else c for c in row] for row in csv.reader(io.StringIO(text))
    ]
    for name in names:
        link = page.locator(f"#{name} >> xpath=ancestor-or-self::*[.//a[@download]][1]//a[@download]")
        assert link.get_attribute("download") == f"{name}.csv"
        if name in page.evaluate("Object.keys(palmette.specs)"):
            given = page.evaluate("name => palmette.csv(name)", name)
        else:
            with urllib.request.urlopen(link.get_attribute("href")) as opened:
                given = opened.read().decode()
        assert plain(given) == plain((folder / f"{name}.csv").read_text())
    for name in ("comparison", "curve-loss"):
        with page.expect_download() as download:
            page.click(f"#{name} >> xpath=ancestor-or-self::*[.//a[@download]][1]//a[@download]")
        download.value.save_as(tmp_path / name)
        assert plain((tmp_path / name).read_text()) == plain((folder / f"{name}.csv").read_text())
    head, *points = rows(folder / "curve-loss.csv")
    assert head == ["series", "steps", "tokens", "FLOPs", "seconds", "loss"]
    assert [float(p[5]) for p in points if p[0] == "rate=0.10"] == pytest.approx(
        page.evaluate("[...document.querySelector('#curve-loss .plot').data[0].y]")
    )
    with page.expect_download() as download:
        page.click("#curve-loss .png")
    download.value.save_as(tmp_path / "loss.png")
    found = (tmp_path / "loss.png").read_bytes()
    assert found[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(found[16:20]) == 2000


def test_curves_are_means_over_seeds_and_tokens_are_what_was_spent(sweep, sweep_page):
    logged = {}
    for seed in (0, 1, 2):
        for line in (sweep / "arms" / "rate=0.11" / str(seed) / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if "loss" in row:
                logged.setdefault(row["step"], []).append(row["loss"])
    _, *points = rows(sweep_page.parent / "csv" / "curve-loss.csv")
    own = [[float(x) for x in p[1:]] for p in points if p[0] == "rate=0.11"]
    assert [p[0] for p in own] == sorted(logged)
    for step, tokens, flops, seconds, loss in own:
        assert loss == pytest.approx(np.mean(logged[step]), rel=1e-5)
        assert (tokens, flops) == pytest.approx((2000 * step, 8.9e9 * step))
        assert seconds == pytest.approx(0.1 + 0.03 * step)


def test_at_equal_budget(sweep, sweep_page):
    """The mean curve at a quarter of the tokens that all have spent, by numpy; 25 % lies between two evaluations."""
    head, *found = rows(sweep_page.parent / "csv" / "equal.csv")
    assert head[1:] == ["at 20,000 tokens", "at 40,000 tokens", "at 60,000 tokens", "at 80,000 tokens"]
    curves = {}
    for seed in (0, 1, 2):
        for line in (sweep / "arms" / "rate=0.12" / str(seed) / "metrics.jsonl").read_text().splitlines():
            if (value := json.loads(line).get(f"evaluation/{METRIC}")) is not None:
                curves.setdefault(json.loads(line)["step"], []).append(value)
    (row,) = [row for row in found if row[0] == "rate=0.12"]
    expected = np.interp([10, 20, 30, 40], sorted(curves), [np.mean(curves[step]) for step in sorted(curves)])
    assert [float(x) for x in row[1:]] == pytest.approx(expected, abs=1e-3)


def test_names_that_stand_twice_are_told_apart():
    parts = [Text("a", "", ""), Text("a", "", "")]
    found = distinct([Section("a", "", parts=parts)])
    assert [found[0].name, *(part.name for part in found[0].parts)] == ["a", "a-2", "a-3"]


def test_a_sweep_of_one_seed_claims_nothing(sweep, tmp_path):
    """Differences are shown, none is a finding, and the page says why."""
    told = json.loads((sweep / "sweep.json").read_text()) | {"seeds": [0]}
    (tmp_path / "sweep.json").write_text(json.dumps(told))
    (tmp_path / "arms").symlink_to(sweep / "arms")
    first, *_ = sections(SweepFolder.read(tmp_path))
    assert any("One seed says nothing of noise" in line for line in first.words)
    assert {row[4] for row in first.parts[0].rows} == {"● baseline", "◇ within noise"}
    assert {row[3] for row in first.parts[0].rows} == {"–"}
