"""`palmette report`: bad input gets one line, and pictures come from the Chromium that is there."""

import json
import os
import stat

import pytest
from PIL import Image

from benchmarks.report import made_up
from launch import cli
from launch.report.browser import chromium, write_png
from launch.report.command import report
from launch.report.page import rendered, write
from launch.report.parts import Section, Table
from partitioning.errors import UserError

ROW = json.dumps({"step": 1, "loss": 2.0}) + "\n"


def folder(path, **files):
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


def refused(paths, out, **options):
    with pytest.raises(UserError) as error:
        report(paths, out=out, **options)
    assert not out.exists() or out.is_dir()
    return str(error.value)


def test_folders_that_are_not_what_they_should_be(tmp_path):
    out = tmp_path / "page.html"
    a = folder(tmp_path / "a", config_gin="", metrics_jsonl=ROW)
    empty = folder(tmp_path / "empty")
    assert refused([empty], out).startswith(
        f"{empty}: neither config.gin nor metrics.jsonl nor sweep.json in it, expected"
    )
    assert refused([tmp_path / "none"], out) == f"{tmp_path / 'none'}: no such folder, expected a run's folder"
    assert "is a file, expected a run's folder" in refused([a / "config.gin"], out)
    begun = folder(tmp_path / "begun", config_gin="")
    assert refused([begun], out).startswith(f"{begun / 'metrics.jsonl'}: no such file: the run has not begun")
    still = folder(tmp_path / "still", config_gin="", metrics_jsonl='{"step": 0, "goodput/wall_s": 1.0}\n')
    assert refused([still], out).startswith(f"{still / 'metrics.jsonl'}: no step is logged yet: ")
    odd = folder(tmp_path / "odd", config_gin="", metrics_jsonl=ROW + "[]\n" + ROW)
    assert f"{odd / 'metrics.jsonl'}:2: expected a line of figures" in refused([odd], out)
    broken = folder(tmp_path / "broken", config_gin="a = = 1", metrics_jsonl=ROW)
    assert refused([broken], out).startswith(f"{broken / 'config.gin'}:1: ")
    b = folder(tmp_path / "b", config_gin="", metrics_jsonl='{"step": 1, "reward": 2.0}\n')
    assert refused([a, b], out) == f"{a} and {b} have no figure in common (loss; none)"
    scores = folder(tmp_path / "scores", config_gin="", metrics_jsonl=ROW, examples_json="[1]")
    assert "expected {evaluator: {figure: [a number for each example]}}" in refused([scores], out)


def test_sweeps_that_are_not_what_they_should_be(tmp_path):
    out = tmp_path / "page.html"
    sweep = made_up(tmp_path / "sweep", arms=2, seeds=(0,), steps=2)
    run = folder(tmp_path / "run", config_gin="", metrics_jsonl=ROW)
    assert refused([run, sweep], out) == f"{sweep}: is a sweep, which has a page of its own: give it alone"
    told = json.loads((sweep / "sweep.json").read_text())
    change = lambda **what: (sweep / "sweep.json").write_text(json.dumps(told | what))
    change(metric=["masked/bits", "min"])
    assert "no run has the figure 'masked/bits', only masked/accuracy, masked/bits_per_token" in refused([sweep], out)
    change(baseline="rate=0.5")
    assert "its baseline 'rate=0.5' is none of its arms" in refused([sweep], out)
    (sweep / "sweep.json").write_text("{}")
    assert "has no 'metric', expected what `palmette sweep` writes" in refused([sweep], out)
    change()
    result = sweep / "arms" / "rate=0.10" / "0" / "result.json"
    result.write_text('{"status": "gone"}')
    assert refused([sweep], out) == f"{result}: status 'gone', expected 'done' or 'failed'"
    result.write_text('{"status": "failed", "error": "so it went"}')
    assert "no run of the baseline 'rate=0.10' has ended well" in refused([sweep], out)
    (sweep / "arms" / "rate=0.11" / "0" / "result.json").unlink()
    assert "none of its 2 runs has ended well (1 failed, 1 without result.json)" in refused([sweep], out)


def test_places_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    run = folder(tmp_path / "run", metrics_jsonl=ROW)
    assert refused([run], tmp_path).startswith(f"--out {tmp_path}: is a folder, expected a file to write")
    file = run / "metrics.jsonl"
    assert refused([run], tmp_path / "x.html", csv=file) == f"--csv {file}: is a file, expected a folder"
    assert "cannot be written" in refused([run], file / "x.html")
    monkeypatch.setenv("PATH", "/nowhere")
    assert refused([run], tmp_path / "x.html", png=tmp_path / "png").startswith(
        "--png needs a Chromium, and none of chromium"
    )
    with pytest.raises(SystemExit) as done:
        cli.main(["report", str(tmp_path / "none")])
    assert done.value.code == 2
    assert capsys.readouterr().err == f"palmette: {tmp_path / 'none'}: no such folder, expected a run's folder\n"


def test_a_browser_that_does_not_start_is_said(tmp_path, monkeypatch):
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    run = folder(tmp_path / "run", metrics_jsonl=ROW)
    with pytest.raises(UserError, match="--png: the Chromium that was found"):
        report([run], out=tmp_path / "x.html", png=tmp_path / "png")


def test_pictures_of_every_figure_and_table(sweep, tmp_path):
    said = report([sweep], out=tmp_path / "page.html", csv=tmp_path / "csv", png=tmp_path / "png")
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "png").iterdir()}
    assert {*pictures} == {path.stem for path in (tmp_path / "csv").iterdir()}
    assert said[1:] == [f"{tmp_path / 'csv'}: {len(pictures)} files", f"{tmp_path / 'png'}: {len(pictures)} pictures"]
    for name, picture in pictures.items():
        assert picture[:8] == b"\x89PNG\r\n\x1a\n", name
        assert int.from_bytes(picture[16:20]) > 600, name


def test_a_picture_has_all_of_a_wide_table(tmp_path):
    """Its last column too, which on the page is scrolled to."""
    columns = [f"column {i}" for i in range(60)]
    wide = Table("wide", "Sixty columns.", columns, [["1234567"] * 60])
    page = write(tmp_path / "page.html", rendered("wide", "a run", [Section("s", "S", parts=[wide])]))
    (path,) = write_png(chromium(), page, tmp_path, [Section("s", "S", parts=[wide])])
    with Image.open(path) as picture:
        last = picture.convert("L").crop((picture.width - 150, 0, picture.width - 40, picture.height))
        low, high = last.getextrema()
    assert picture.width > 2 * 60 * 80
    assert high - low > 150, "dark digits on light ground"
