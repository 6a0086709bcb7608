"""The split of a run's wall time: it adds up, by a clock that is ours and in real runs that were killed."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from running import devices, killed_after, tiny

from checkpoints.folder import Folder
from training import hosts as told_by
from training.goodput import KINDS, WALL, Goodput, beat_file
from training.hosts import Hosts, slowest


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def spend(clock, goodput, **seconds):
    """So many seconds in a block of each kind."""
    for kind, each in seconds.items():
        with goodput(kind):
            clock.time += each


def seconds(figures):
    return {kind: figures[f"goodput/{kind}"] * figures[WALL] for kind in KINDS}


def test_blocks_add_up_to_the_wall_time():
    """What is inside another block is not counted twice; a wait for the device belongs to the step."""
    clock = Clock()
    goodput = Goodput(clock)
    clock.time += 2
    spend(clock, goodput, compile=5)
    with goodput("step"):
        clock.time += 1
        spend(clock, goodput, data=3, device=4, evaluation=6, checkpoint=7)
        clock.time += 10
    found = goodput.figures()
    expected = {"start": 2, "compile": 5, "step": 15, "data": 3, "evaluation": 6, "checkpoint": 7, "lost": 0}
    assert seconds(found) == pytest.approx(expected)
    assert found[WALL] == clock.time - 100
    assert sum(found[f"goodput/{kind}"] for kind in KINDS) == pytest.approx(1)
    assert goodput.line() == (
        "wall time 38s: steps 39.5%, start 5.3%, compilation 13.2%, waiting for data 7.9%, checkpoints 18.4%, "
        "evaluation 15.8%"
    )


def test_a_block_that_ends_in_an_error_gives_its_time_back():
    clock = Clock()
    goodput = Goodput(clock)
    batches = iter(())
    with pytest.raises(StopIteration), goodput("data"):
        next(batches)
    clock.time += 1
    assert seconds(goodput.figures())["start"] == pytest.approx(1)


def test_what_was_done_after_the_checkpoint_is_lost(tmp_path):
    """Two crashes: each start adds all that earlier ones took, and what they must do again is lost once."""
    clock = Clock()
    path = tmp_path / "metrics.jsonl"

    def start(step):
        goodput = Goodput(clock)
        goodput.resume(tmp_path, step)
        write(goodput, step)
        return goodput

    def write(goodput, step):
        with path.open("a") as file:
            file.write(json.dumps({"step": step} | goodput.figures()) + "\n")

    first = start(0)
    spend(clock, first, compile=10, step=20)
    write(first, 10)
    spend(clock, first, step=20, evaluation=5)
    write(first, 20)
    with path.open("a") as file:
        file.write('{"step": 2')
    # The last heartbeat was four seconds later.
    beat_file(tmp_path, 0).parent.mkdir()
    beat_file(tmp_path, 0).write_text(json.dumps({"wall_s": 59.0}))

    second = start(10)
    assert seconds(second.figures()) == pytest.approx(dict.fromkeys(KINDS, 0) | {"compile": 10, "step": 20, "lost": 29})
    spend(clock, second, start=2, step=21)
    write(second, 20)
    third = start(10)
    spend(clock, third, step=40)
    found = seconds(third.figures())
    assert found == pytest.approx(dict.fromkeys(KINDS, 0) | {"compile": 10, "step": 60, "lost": 52})
    assert third.figures()[WALL] == pytest.approx(clock.time - 100 + 4)


def test_a_real_run_and_one_that_was_killed(tmp_path, capsys):
    """A line at every log step and checkpoint, shares that add up; the killed run's redone steps are lost."""
    out = tmp_path / "run"
    with devices(1):
        tiny("clm").train(out)
        whole = splits(out)
        assert [step for step, _ in whole] == [1, 2, 2, 3, 4, 4, 4]
        for _, found in whole:
            assert sum(found[f"goodput/{kind}"] for kind in KINDS) == pytest.approx(1)
        walls = [found[WALL] for _, found in whole]
        assert walls == sorted(walls)
        final = seconds(whole[-1][1])
        assert final["lost"] == 0
        assert all(final[kind] > 0 for kind in ("start", "compile", "data", "step", "checkpoint"))
        beat = json.loads(beat_file(out, 0).read_text())
        assert 1 <= beat["step"] <= 4
        killed_after(2, out, tmp_path / "killed")
        tiny("clm").train(tmp_path / "killed")
    lost = seconds(splits(tmp_path / "killed")[-1][1])["lost"]
    at_the_checkpoint = whole[2][1][WALL]
    assert lost == pytest.approx(walls[-1] - at_the_checkpoint, rel=1e-6)
    assert "lost to restarts" in capsys.readouterr().out.splitlines()[-1]


def splits(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row) for row in rows if WALL in row]


def test_a_heartbeat_is_rare(tmp_path):
    """Every five seconds at most, whatever the steps."""
    clock = Clock()
    hosts = Hosts(Folder(str(tmp_path), tmp_path), Goodput(clock), now=clock)
    steps = []
    for step in range(1, 12):
        hosts.beat(step)
        steps.append(json.loads(beat_file(tmp_path, 0).read_text())["step"])
        clock.time += 2
    assert steps == [1, 1, 1, 4, 4, 4, 7, 7, 7, 10, 10]
    assert hosts.compare() == ({}, None)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([[0.1, 1, 9], [0.2, 1, 9], [0.1, 1, 9]], None),
        (
            [[0.1, 1, 9], [4, 1, 5], [0.1, 1, 9]],
            "host 1 is slow: 4.0 s of 10.0 s waiting for data, the median host 0.1 s",
        ),
        (
            [[0, 1, 9], [0, 1, 9], [0, 8, 2]],
            "host 2 is slow: 8.0 s of 10.0 s working on the host, the median host 1.0 s",
        ),
    ],
)
def test_the_slowest_host_is_named(times, says):
    figures, line = slowest(np.array(times))
    assert line == says
    assert figures["hosts/slowest_data"] == np.argmax([t[0] for t in times])


class Keys(SimpleNamespace):
    """The hosts' store, as much of it as is needed."""

    def __init__(self, told):
        super().__init__(
            key_value_set=lambda key, value, allow_overwrite: told.update({key: value}),
            key_value_dir_get=lambda prefix: [(key, value) for key, value in told.items() if key.startswith(prefix)],
        )


def test_the_first_host_hears_of_the_others(tmp_path, monkeypatch):
    """Between two beats of all; a host that hangs compares with nothing."""
    clock, told = Clock(), {}
    monkeypatch.setattr(told_by, "key_values", lambda: Keys(told))
    monkeypatch.setattr(told_by, "_STARTS", itertools.repeat(0))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    hosts = []
    for host in range(2):
        monkeypatch.setattr(jax, "process_index", lambda h=host: h)
        hosts.append(Hosts(Folder(str(tmp_path), tmp_path), Goodput(clock), now=clock))
    times = [hosts[0]._goodput.seconds, hosts[1]._goodput.seconds]

    def beat(*who):
        clock.time += 10
        for host in who:
            hosts[host].beat(1)
        return hosts[0].compare()

    assert beat(0) == ({}, None)
    assert beat(0, 1) == ({}, None)
    for seconds, data in zip(times, (0.5, 4.0), strict=True):
        seconds |= {"data": data, "step": 1.0, "device": 9 - data}
    assert beat(0) == ({}, None)
    figures, line = beat(0, 1)
    assert figures["hosts/slowest_data"] == 1
    assert line == "host 1 is slow: 4.0 s of 10.0 s waiting for data, the median host 2.2 s"
    assert hosts[1].compare() == ({}, None)
