"""What the harness concludes from rounds and from `/proc`, and where it writes."""

import json
from dataclasses import asdict

import pytest

from benchmarks import chaos, harness, results
from benchmarks.harness import Reading, Round, alternate, choose


def test_contended_rounds_do_not_count():
    rounds = [Round({"a": 1.0, "b": 2.0}, 0.02), Round({"a": 9.0, "b": 1.0}, 0.5), Round({"a": 3.0, "b": 2.0}, 0.1)]
    found = choose(rounds, wanted=2)
    assert (len(found.kept), found.rejected, found.contended) == (2, 1, False)
    assert found.seconds("a") == 2.0
    assert found.ratio("a", "b") == 1.0
    assert found.ratios("a", "b") == (0.5, 1.5)


def test_without_a_quiet_round_the_least_contended_are_marked():
    rounds = [Round({"a": float(i)}, 1.0 - i / 10) for i in range(5)]
    found = choose(rounds, wanted=2)
    assert found.contended
    assert [r.seconds["a"] for r in found.kept] == [4.0, 3.0]
    assert "CONTENDED" in found.note()


def test_the_ratio_is_taken_within_rounds():
    # Medians of each side alone would give 2 / 2 = 1.
    rounds = [Round({"a": 1.0, "b": 2.0}, 0.0), Round({"a": 2.0, "b": 4.0}, 0.0), Round({"a": 3.0, "b": 1.0}, 0.0)]
    assert choose(rounds, wanted=3).ratio("a", "b") == 0.5


def test_processor_seconds(monkeypatch):
    monkeypatch.setattr(harness, "_TICK", 100)
    # user nice system idle iowait irq softirq steal guest: idle and waiting are nobody's work.
    assert harness.busy_seconds("cpu  100 20 30 9999 888 4 5 41 7 7\ncpu0 1 1 1 1\n") == 2.0
    # Fields 14 to 17: user and system time, and those of ended children; the name holds a space and a parenthesis.
    line = "12 (a b) c) S " + " ".join(str(i) for i in range(4, 14)) + " 100 20 3 7 99"
    assert harness.own_seconds(line) == 1.3


def test_what_others_used():
    before, after = Reading(10.0, 100.0, 50.0), Reading(14.0, 107.0, 55.0)
    assert after.others_since(before) == pytest.approx(0.5)


def test_contestants_take_turns(monkeypatch):
    monkeypatch.setattr(harness, "ALLOWED", 1e9)
    module, function = "benchmarks.harness", "fixed"
    pair = [harness.Contestant(name, module, function, seconds=s) for name, s in (("a", 0.5), ("b", 2.0))]
    found = alternate(pair, wanted=2)
    assert found.ratio("a", "b") == 0.25
    assert found.facts == {"a": {"said": 0.5}, "b": {"said": 2.0}}


def test_a_contestant_that_ends_is_named():
    with pytest.raises(RuntimeError, match=r"^x: the process ended"):
        harness.Contestant("x", "no_such_module", "f")


def test_a_section_is_replaced_and_the_rest_kept():
    text = results.replaced("# Head\n\nby hand\n", "a", "one")
    text = results.replaced(text, "b", "two")
    text = results.replaced(text + "\nbehind\n", "a", r"new \1")
    assert "one" not in text
    assert text.index("by hand") < text.index(r"new \1") < text.index("two") < text.index("behind")


def test_a_campaign_in_pieces_is_counted_as_one(tmp_path, monkeypatch):
    outcome = lambda seed: chaos.Outcome(seed, chaos.FAULTS[seed % 7], 0, reached=9, began=8, passed=0, seconds=1.0)
    pieces = [
        {"found": [asdict(outcome(2))], "wrong": {}, "minutes": 2.0},
        {"found": [asdict(outcome(0))], "wrong": {1: "SIGTERM: hung"}, "minutes": 1.5},
    ]
    tally = tmp_path / "tally.jsonl"
    tally.write_text("".join(json.dumps(piece) + "\n" for piece in pieces))
    read = [json.loads(line) for line in tally.read_text().splitlines()]
    assert chaos.joined(read) == ([0, 1, 2], [outcome(2), outcome(0)], {1: "SIGTERM: hung"}, 3.5)
    # No run is counted twice, and none is begun to find that out.
    for name, value in {"TALLY": str(tally), "SEED": "1", "RUNS": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(chaos, "campaign", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match="has the runs of seeds 1, 2: set SEED"):
        chaos.main()
