"""What a page shows of a run from inside, beside what the verbs and the run's own metrics say."""

import json

import numpy as np
import pytest

from launch.config import load
from launch.fill import fill
from launch.report import run_page
from launch.report.bindings import bindings_of, changes
from launch.report.command import distinct
from launch.report.inside import inside
from launch.report.page import rendered, write
from launch.report.run_folder import RunFolder
from training.judging import restored


def test_a_run_from_inside(run, visit, tmp_path):
    """One run is trained for all of it."""
    folder = RunFolder.read(run)
    sections = [*run_page.sections([folder]), *inside([folder], ())]
    parts = {part.name: part for section in sections for part in section.parts}
    last_figures(run, parts)
    fillings(run, parts)
    texts_and_documents(parts)
    hidden_places(run, parts)
    configuration(run)
    in_a_browser(sections, visit, tmp_path)


def column(table, name):
    return {row[0]: row[table.head.index(name)] for row in table.rows}


def last_figures(run, parts):
    """They are the last lines of the metrics."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for row in logged if row["step"] == 4 for name, value in row.items()}
    shown = column(parts["last-figures"], "tiny")
    for name in ("loss", "evaluation/masked/bits_per_token", "evaluation/retrieval/ndcg@10"):
        assert float(shown[name.removeprefix("evaluation/")]) == pytest.approx(last[name], rel=1e-3)
    assert int(shown["tokens spent"].replace(",", "")) == last["spent/tokens"] > 0
    assert shown["step"] == "4"


def fillings(run, parts):
    """The guesses are `fill`'s of the same text, and what had been hidden is what the text has there."""
    plan, values = restored(load([str(run / "config.gin")]).value, run)
    trunk = plan.trees.models(**values).module("trunk")
    text = parts["filled-tiny"].passages[0]
    kinds = [kind for _, kind in text.runs]
    assert kinds == ["text", "given", "true", "text", "given", "true", "text"]
    masked = "".join("[MASK]" if kind == "given" else run for run, kind in text.runs if kind != "true")
    found = fill(trunk, plan.tokenizer, masked, count=3)
    assert [run for run, kind in text.runs if kind == "given"] == [guesses[0].text for guesses in found]
    whole = "".join(run for run, kind in text.runs if kind != "given")
    assert any(whole in example["text"] for example in plan.run.data.examples)
    shown = parts["guesses-tiny"].rows[0]
    assert shown[2] == f"{found[0][0].text!r} {found[0][0].probability:.1%}"


def texts_and_documents(parts):
    prompts = [[kind for _, kind in passage.runs] for passage in parts["written-tiny"].passages]
    assert prompts == [["text", "given"]] * 4
    found = parts["found-tiny-retrieval"]
    assert [row[0] for row in found.rows] == ["1.1", "1.2", "1.3", "2.1", "2.2", "2.3"]
    scores = [float(row[3].replace("−", "-")) for row in found.rows]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert found.rows[0][1] == "is it a string?"
    judged = {("1", "Return True"): "✓ yes", ("2", "The list of"): "✓ yes"}
    assert all(row[2] == judged.get((row[0][0], row[4][:11]), "no") for row in found.rows)


def hidden_places(run, parts):
    """As `palmette data show` draws it at the last step."""
    from launch.rows import batch_of

    batch, *_ = batch_of(load([str(run / "config.gin")]).value, 3)
    hidden, seen = parts["map-tiny"].series
    places = {(int(row.removeprefix("row ")), place) for row, place in zip(hidden.y, hidden.x["place"], strict=True)}
    assert places == {(int(r), int(p)) for r, p in np.argwhere(batch["hidden"][:8])}
    assert len(places) > 0
    assert len(places) + len(seen.y) == np.count_nonzero(batch["segments"][:8])


def configuration(run):
    """Nothing is imported, and only what is bound otherwise is a change."""
    text = (run / "config.gin").read_text()
    found = bindings_of(text, "config.gin")
    assert found["training.Run.evaluators"] == "[@evaluation.MaskedLikelihood(), @evaluation.Retrieval()]"
    assert found["models.Trunk.mixer"] == "@models.Attention"
    assert changes(found, found) == []
    (one,) = changes(found, found | {"training.Run.seed": "1", "models.Trunk.layers": "2"})
    assert (one.name, one.base, one.other) == ("models.Trunk.layers", "1", "2")
    assert [c.name for c in changes(found, found | {"training.Run.seed": "1"}, seed=True)] == ["training.Run.seed"]


def in_a_browser(sections, visit, tmp_path):
    """All sections are there, nothing is asked of a network, nothing scrolls sideways, marks are told apart without colour."""
    out = write(tmp_path / "page.html", rendered("tiny", "a run", distinct(sections)))
    page = visit(out, scheme="dark")
    assert not [url for url in page.noted.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert page.noted.complaints == []
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function("innerWidth >= document.documentElement.scrollWidth")
    assert page.eval_on_selector_all("section", "all => all.map(s => s.id)") == [
        "figures", "curves", "time", "configuration", "environment", "examples", "hidden",
    ]  # fmt: skip
    borders = "all => [...new Set(all.map(m => m.className + getComputedStyle(m).borderBottom))]"
    found = page.eval_on_selector_all("mark", borders)
    assert len({border.split("rgb")[0] for border in found}) == len(found) >= 3
    assert page.locator("#starts tbody tr").count() == 1
    assert "jax" in page.inner_text("#starts")
    page.click("#config summary")
    assert "training.Run.seed = 0" in page.inner_text("#config pre")
    drawn = "document.querySelector('#map-tiny .plot')._fullData.map(t => [t.name, t.marker.symbol])"
    assert page.evaluate(drawn) == [["hidden", "square"], ["seen", "circle-open"]]
