"""A run's page: what its folder tells, alone and beside others."""

import csv
import io
import json
import shutil

import numpy as np
import pytest

from benchmarks.report import made_up
from launch.report import run_page
from launch.report.command import report
from launch.report.experts import experts
from launch.report.run_folder import RunFolder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Forty steps, made up; its configuration builds nothing."""
    base = tmp_path_factory.mktemp("made_up")
    return (made_up(base / "s", arms=1, seeds=(0,), steps=40) / "arms" / "rate=0.10" / "0").rename(base / "tiny")


@pytest.fixture(scope="session")
def other(run):
    """The same run with another seed and rate, whose figures are other ones; it was stopped at half its way."""
    folder = run.parent / "other"
    shutil.copytree(run, folder)
    text = (folder / "config.gin").read_text()
    (folder / "config.gin").write_text(
        text.replace("Run.seed = 0", "Run.seed = 3").replace("rate = 0.10", "rate = 0.2")
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    half = [{**line, **({"loss": line["loss"] + 1} if "loss" in line else {})} for line in lines if line["step"] <= 20]
    # The line that is being written.
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in half) + '{"step": 21, "lo')
    return folder


def test_where_the_time_went_adds_up(run):
    parts = {part.name: part for part in run_page.time([RunFolder.read(run)]).parts}
    (row,) = parts["goodput-table"].rows
    assert sum(float(cell[:-1]) for cell in row[2:]) == pytest.approx(100, abs=0.5)
    assert sum(series.y[0] for series in parts["goodput"].series) == pytest.approx(1)
    # Twenty steps are 0.6 s of 9.2 s: 40 steps of 0.03 s, and what else made_up says.
    assert row[2] == f"{100 * 1.2 / (1.2 + 8.6):.1f}%"
    assert parts["throughput"].rows[0][2] == "61,538"


def test_runs_side_by_side(run, other, tmp_path):
    """Where their configurations differ, how far each has come, and no interval over what differs in more than the seed."""
    said = report([run, other], out=tmp_path / "page.html", csv=tmp_path)
    assert said[1].startswith(f"No examples of other: {other / 'config.gin'}")
    found = {path.stem: list(csv.reader(io.StringIO(path.read_text()))) for path in tmp_path.glob("*.csv")}
    assert found["difference"] == [
        ["binding", "tiny", "other"],
        ["objectives.RandomTokens.rate", "0.1", "0.2"],
        ["training.Run.seed", "0", "3"],
    ]
    assert found["last-figures"][1] == ["step", "40", "20 of 40"]
    assert "seeds" not in found
    assert "other is unfinished: 20 of 40." in (tmp_path / "page.html").read_text()


def test_runs_that_differ_in_their_seed_have_an_interval(run, other, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(other, again)
    text = (run / "config.gin").read_text()
    (again / "config.gin").write_text(text.replace("Run.seed = 0", "Run.seed = 3"))
    folders = [RunFolder.read(path) for path in (run, again)]
    tables = {part.name: part for part in run_page.sections(folders)[0].parts}
    each = [folder.figures["loss"] for folder in folders]
    # Of two numbers: Student's t of one degree of freedom at 0.975 is 12.706.
    half = 12.7062 * abs(each[0] - each[1]) / 2
    mean, told = tables["seeds"].rows[0][1].split(" ± ")
    assert tables["seeds"].rows[0][0] == "loss, 2 seeds"
    assert float(mean) == pytest.approx(np.mean(each), abs=0.06)
    assert float(told) == pytest.approx(half, rel=0.1)


def test_scores_of_examples_have_a_bootstrap_interval(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    scores = np.random.default_rng(0).normal(2.0, 1.0, 400)
    (tmp_path / "run" / "examples.json").write_text(json.dumps({"masked": {"bits_per_token": scores.tolist()}}))
    tables = {part.name: part for part in run_page.sections([RunFolder.read(tmp_path / "run")])[0].parts}
    ((name, mean, interval, count),) = tables["examples-run"].rows
    assert (name, count) == ("masked/bits_per_token", "400")
    low, high = map(float, interval.split(" to "))
    assert float(mean) == pytest.approx(scores.mean(), abs=1e-3)
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.1)


def test_loads_of_experts_are_those_of_the_last_step(run, tmp_path):
    """By layer and expert in the layers' order, and their evenness; a share is drawn as a bar."""
    shutil.copytree(run, tmp_path / "run")
    loads = {"trunk/layers/10": [0.2, 0.8, 0.0], "trunk/layers/2": [0.3, 0.3, 0.4]}
    last = {f"experts/{layer}/load": load for layer, load in loads.items()} | {"experts/trunk/entropy": 0.6}
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 39, "experts/trunk/layers/2/load": [1.0, 0.0, 0.0]}) + "\n")
        file.write(json.dumps({"step": 40, **last}) + "\n")
    section = experts([RunFolder.read(tmp_path / "run")])
    table, entropy = section.parts
    assert [row[0] for row in table.rows] == ["trunk/layers/2", "trunk/layers/10"]
    assert table.rows[1][3:] == ["20.0%", "80.0%", "0.0%"]
    even = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8)) / np.log(3)
    assert (float(table.rows[1][1]), table.rows[1][2]) == (pytest.approx(even, abs=1e-4), "2.400")
    assert [table.width(1, at) for at in (3, 4, 5)] == pytest.approx([25, 100, 0])
    assert entropy.series[0].y == [0.6]
    assert experts([RunFolder.read(run)]) is None
