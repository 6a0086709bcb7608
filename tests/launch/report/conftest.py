"""A browser, a made-up sweep, and a tiny run that does all that examples may show."""

import json
import textwrap
from types import SimpleNamespace

import pytest
from running import devices

from benchmarks.report import made_up
from launch.report.browser import chromium
from launch.report.command import report

ARMS, SEEDS, STEPS = 4, (0, 1, 2), 40


# Not the session's: while playwright is started it keeps an event loop running, in which no other test could run one.
@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Opens a file's page once its figures are drawn; what it asked for and what it complained of are noted."""
    contexts = []

    def visit(path, *, width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.noted = SimpleNamespace(requests=[], complaints=[])
        page.on("request", lambda request: page.noted.requests.append(request.url))
        page.on("pageerror", lambda error: page.noted.complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.noted.complaints.append(message.text))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """Four arms of three seeds: of the last arm one run failed and one has not ended."""
    folder = made_up(tmp_path_factory.mktemp("sweeps") / "sweep", arms=ARMS, seeds=SEEDS, steps=STEPS, effect=0.02)
    last = folder / "arms" / "rate=0.13"
    (last / "1" / "result.json").write_text(json.dumps({"status": "failed", "error": "step 7: <loss> is not a number"}))
    (last / "2" / "result.json").unlink()
    return folder


@pytest.fixture(scope="session")
def sweep_page(sweep, tmp_path_factory):
    """The sweep's page, and its figures and tables as CSV."""
    out = tmp_path_factory.mktemp("pages") / "sweep.html"
    report([sweep], out=out, csv=out.parent / "csv")
    return out


TEXTS = [
    "Return True if the object is a string, and False if it is anything else.",
    "The list of all names in the scope, in the order in which they were bound.",
    "Raise ValueError if the value is not found between start and stop.",
    "Open the file and return a stream; an error is raised where it cannot be opened.",
]
CONFIG = """
from __gin__ import dynamic_registration
import data
import evaluation
import models
import objectives
import training

training.Run.data = @data.Records()
data.Records.examples = {examples}
training.Run.model = @models.Trunk
models.Trunk.width = 16
models.Trunk.layers = 1
models.Trunk.mixer = @models.Attention
models.Attention.heads = 2
training.Run.objective = @objectives.GPTBert()
objectives.GPTBert.ratio = 0.5
training.Run.optimizer = @training.AdamW()
training.AdamW.learning_rate = 0.01
training.Run.steps = 4
training.Run.batch_size = 8
training.Run.length = 96
training.Run.log_every = 1
training.Run.evaluators = [@evaluation.MaskedLikelihood(), @evaluation.Retrieval()]
evaluation.MaskedLikelihood.data = @data.Records()
evaluation.MaskedLikelihood.length = 96
evaluation.MaskedLikelihood.batch_size = 8
evaluation.Retrieval.folder = '{collection}'
evaluation.Retrieval.split = 'test'
evaluation.Retrieval.length = 32
evaluation.Retrieval.batch_size = 8
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Four steps of a model that fills masks, writes on and is judged by a search."""
    from launch.config import load

    base = tmp_path_factory.mktemp("runs")
    found = base / "collection"
    (found / "qrels").mkdir(parents=True)
    rows = lambda texts, kind: "".join(
        json.dumps({"_id": f"{kind}{i}", "text": t, "title": ""}) + "\n" for i, t in enumerate(texts)
    )
    (found / "corpus.jsonl").write_text(rows(TEXTS, "d"))
    (found / "queries.jsonl").write_text(rows(["is it a string?", "which names are bound?"], "q"))
    (found / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    path = base / "run.gin"
    path.write_text(textwrap.dedent(CONFIG.format(examples=[{"text": text} for text in TEXTS], collection=found)))
    resolved = load([str(path)], exercise=lambda run: run.abstract())
    with devices(1):
        resolved.value.train(base / "tiny", operative=resolved.operative)
    return base / "tiny"
