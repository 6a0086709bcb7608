"""`palmette train` on several hosts: how they are started, what each is told, and how all end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import metrics, record

from benchmarks.several import CONFIG, JUDGED, STEPS, Several, steps
from launch.hosts import BEAT_S, Meeting, Silence, difference
from partitioning import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hosts": 2}, "--host and --coordinator missing"),
        ({"hosts": 2, "host": 0}, "--coordinator missing"),
        ({"hosts": 2, "host": 2, "coordinator": "a:1"}, "--host 2: expected 0 to 1"),
        ({"hosts": 2, "host": 0, "coordinator": "a"}, "--coordinator a: expected ADDRESS:PORT"),
        ({"hosts": 2, "cluster": True}, "--cluster asks the environment"),
    ],
)
def test_hosts_that_cannot_be(given, words):
    with pytest.raises(UserError, match=words):
        Meeting(**given)


def test_one_host_meets_nobody():
    assert Meeting().alone
    assert Meeting(hosts=1, host=0, coordinator="a:1").alone
    assert not Meeting(cluster=True).alone


def test_the_difference_of_two_configurations():
    there = "training.Run.steps = 5\ndata.Records.examples = \\\n    [1,\n     2]\ntraining.Run.seed = 0\n"
    assert difference(there, there) == ""
    here = there.replace("2]", "3]").replace("seed = 0", "seed = 1").replace("training.Run.steps = 5\n", "")
    assert difference(there, here) == (
        "data.Records.examples = [1, 2] there, [1, 3] here; training.Run.seed = 0 there, 1 here; "
        "training.Run.steps = 5 there, nothing here"
    )
    many = "".join(f"training.Run.{name} = 1\n" for name in "abcde")
    assert difference(many, "").endswith("; and 2 more")


def test_silence_is_counted_while_this_host_runs():
    """A beat that comes ends it; a stall of this host, after which it has not yet heard the others, is two beats of it."""
    silence = Silence()
    found = []
    for now, beat in ((0, "1"), (1, "1"), (2, "2"), (3, "2"), (4, "2"), (64, "2"), (65, "2"), (66, "3")):
        silence.round(100.0 + now)
        found.append(silence.of(1, beat))
    assert found == [0, 1, 0, 1, 2, 2 + 2 * BEAT_S, 3 + 2 * BEAT_S, 0]
    assert silence.of(2, "") == 0


def test_faults_of_a_small_campaign():
    """Runs on two hosts, of which one is killed, or one of whose checkpoints gets a flipped bit: they end at once, go on from
    an interval before at most, and end in the same bits."""
    code = "from benchmarks import chaos; import json; print(json.dumps(chaos.sample(json.loads(input()))))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([0, 5]),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [2, {}]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.gin"
    path.write_text(JUDGED)
    return path


@pytest.mark.long
def test_hosts_with_different_configurations(config, tmp_path):
    run = Several(config, tmp_path / "run", overrides=(["Run.seed = 1"], ["Run.seed = 2", "AdamW.learning_rate = 0.5"]))
    assert run.end() == [3, 2]
    unlike = "training.AdamW.learning_rate = 0.01 there, 0.5 here; training.Run.seed = 1 there, 2 here"
    assert all(unlike in said.read_text() for said in run.said)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_configuration_that_one_host_refuses_ends_all(config, tmp_path):
    run = Several(config, tmp_path / "run", overrides=([], ["Run.sed = 2"]))
    assert run.end() == [3, 2]
    assert "palmette: host 1 (" in run.said[0].read_text()
    assert "training.Run has no argument sed" in run.said[0].read_text()


@pytest.mark.long
@pytest.mark.parametrize("place", ["run", "copy"])
def test_a_write_that_fails_in_one_of_two_places_ends_all(config, tmp_path, place):
    """At once, and by the name of that place."""
    other = tmp_path / place / "checkpoints"
    run = Several(config, tmp_path / "run", copy=tmp_path / "copy")
    run.wait_for(lambda: (other / "4").exists())
    other.rename(tmp_path / "away")
    other.write_text("mine")
    assert run.end() == [2, 3]
    assert f"palmette: {other}: cannot be written to" in run.said[0].read_text()
    assert "palmette: host 0 (" in run.said[1].read_text()
    assert other.read_text() == "mine"


@pytest.mark.long
def test_a_folder_in_use_by_another_run(config, tmp_path):
    run = Several(config, tmp_path / "run")
    run.wait_for(lambda: (tmp_path / "run" / ".in_use").exists())
    command = [sys.executable, "-m", "launch.cli", "train", str(config), "--out", str(tmp_path / "run")]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert other.returncode == 2
    assert f"{tmp_path / 'run'}: in use by process {run.processes[0].pid} on " in other.stderr
    assert run.end() == [0, 0]


@pytest.mark.long
@pytest.mark.parametrize("host", [0, 1])
def test_a_signal_to_one_host_saves_and_judges_one_step_on_all(host, config, tmp_path):
    out = tmp_path / "run"
    run = Several(config, out, overrides=([f"Run.steps = {10 * STEPS}"],) * 2)
    run.wait_for(lambda: bool(steps(out)))
    run.processes[host].send_signal(signal.SIGTERM)
    assert run.end() == [0, 0], run.words()
    last = steps(out)[-1]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == last < 10 * STEPS
    assert any(row["step"] == last and "evaluation/masked/accuracy" in row for row in rows)
    assert f"saved at step {last}" in run.said[0].read_text()


@pytest.mark.long
def test_four_hosts_lose_one_and_go_on_as_two(tmp_path):
    """The three that are left name it within a minute; four again end in the same bits, two see the same batches."""
    config, out = tmp_path / "run.gin", tmp_path / "run"
    config.write_text(CONFIG)
    whole = Several(config, tmp_path / "whole", 4, devices=4)
    assert whole.end(300) == [0] * 4, whole.words()
    run = Several(config, out, 4, devices=4, patience=10)
    run.wait_for(lambda: len(steps(out)) > 1, 300)
    run.processes[2].send_signal(signal.SIGKILL)
    statuses = run.end(60)
    assert statuses[2] == -signal.SIGKILL
    assert [statuses[host] for host in (0, 1, 3)] == [3, 3, 3], run.words()
    assert all("palmette: host 2 (" in run.said[host].read_text() for host in (0, 1, 3))
    fewer = tmp_path / "fewer"
    subprocess.run(["cp", "-r", out, fewer], check=True)
    again = Several(config, out, 4, devices=4)
    assert again.end(300) == [0] * 4, again.words()
    assert record(out, STEPS) == record(tmp_path / "whole", STEPS)
    two = Several(config, fewer, 2, devices=4)
    assert two.end(300) == [0, 0], two.words()
    losses = lambda folder: [row["loss"] for row in metrics(folder).values()]
    assert losses(fewer) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
