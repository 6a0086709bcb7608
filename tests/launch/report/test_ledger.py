"""The ledger: deterministic, rebuilt without the runs, and a null is called null."""

import json
import shutil

import pytest

from benchmarks.report import made_up
from launch import cli
from launch.report.ledger import ledger, overall
from partitioning.errors import UserError


@pytest.fixture
def kept(sweep, tmp_path):
    """A page and what it was written from."""
    out = tmp_path / "docs" / "ledger.md"
    assert ledger([sweep], out) == [str(out.with_suffix("") / "made_up.json"), f"{out}: 1 sweep(s)"]
    return out


def cells(page):
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_what_it_says_of_a_sweep(kept):
    text = kept.read_text()
    for told in (
        "| [made_up](#made_up) | More is better. | 1 agrees, 2 null |",
        "Which rate is best?",
        "Claim: More is better. (A made-up paper, 2026.)",
        "Command: `palmette sweep configs/ablations/made_up.gin`",
        "(smaller is better) at equal tokens, 80,000 a run; seeds 0, 1, 2; baseline `rate=0.10`.",
    ):
        assert told in text
    found = cells(kept)
    assert found["rate=0.10"][3:] == ["baseline", "–", "–", "3", "80,000", "3.560e11"]
    assert found["rate=0.11"][3:6] == ["within noise", "better", "null"]
    assert found["rate=0.12"][3:6] == ["better", "better", "agrees"]
    assert found["rate=0.13"][3:7] == ["within noise", "better", "null", "1 of 3"]
    assert "Infinity" not in (kept.with_suffix("") / "made_up.json").read_text()


def test_the_same_again_and_without_the_runs(sweep, kept):
    """Byte for byte: from the runs once more, and from the summary alone."""
    before = kept.read_bytes(), (kept.with_suffix("") / "made_up.json").read_bytes()
    ledger([sweep], kept)
    assert (kept.read_bytes(), (kept.with_suffix("") / "made_up.json").read_bytes()) == before
    kept.unlink()
    ledger([], kept)
    assert kept.read_bytes() == before[0]


def test_a_claim_that_the_runs_contradict(sweep, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(sweep, folder)
    told = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(told | {"expected": {"rate=0.12": "worse"}, "config": "b.gin"}))
    out = tmp_path / "ledger.md"
    ledger([folder], out)
    assert cells(out)["rate=0.12"][3:6] == ["better", "worse", "disagrees"]
    assert "| [b](#b) | More is better. | disagrees |" in out.read_text()
    # A second sweep joins the first, in the order of their names.
    ledger([sweep], out)
    assert [line for line in out.read_text().splitlines() if line.startswith("## ")] == ["## b", "## made_up"]
    assert overall({"arms": [{}]}) == "no claim on an arm"


def test_bad_input(tmp_path, sweep, capsys):
    out = tmp_path / "ledger.md"
    for sweeps, page, told in (
        ([tmp_path], out, "no sweep.json in it"),
        ([], out, "no summary of a sweep is kept there yet"),
        ([sweep, sweep], out, "are sweeps of one name"),
        ([sweep], tmp_path, "expected a file to write, such as docs/ledger.md"),
    ):
        with pytest.raises(UserError, match=told):
            ledger(sweeps, page)
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "x.json").write_text("{}")
    with pytest.raises(SystemExit) as done:
        cli.main(["ledger", "--out", str(out)])
    assert done.value.code == 2
    assert "x.json: is no summary of a sweep" in capsys.readouterr().err


def test_a_sweep_that_has_just_begun_says_what_is_missing(tmp_path):
    sweep = made_up(tmp_path / "s", arms=3, seeds=(0, 1), steps=2)
    shutil.rmtree(sweep / "arms" / "rate=0.12")
    ledger([sweep], tmp_path / "ledger.md")
    assert cells(tmp_path / "ledger.md")["rate=0.12"][3:] == ["no run has ended", "–", "–", "0 of 2", "–", "–"]
