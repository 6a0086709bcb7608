"""Sweeps: what arms there are, what they may spend, what is refused, and that a killed one goes on."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import cli
from launch.config import Shown
from launch.sweep import Flops, Options, Sweep, Tokens, Values, folder
from launch.sweep.budgets import Cost, Seconds, Spent, scaled
from launch.sweep.loading import Asked
from launch.sweep.logged import curve, learning_rates
from launch.sweep.planning import cost_of, planned
from launch.sweep.queue import Queue
from launch.sweep.table import compared, table
from partitioning import UserError
from training.flops import FlopCount

ROOT = Path(__file__).resolve().parents[2]
BASE = """from __gin__ import dynamic_registration
import data
import evaluation
import models
import objectives
import optax
import training

steps = 8
decay_steps = 6
warmup = 2
training.Run.data = @data.Records()
data.Records.examples = [{"text": "open a file and read it"}, {"text": "sort a list"}, {"text": "close the socket"}]
training.Run.model = @models.Trunk
models.Trunk.width = 16
models.Trunk.layers = 1
models.Trunk.mixer = @models.Attention
models.Attention.heads = 2
models.Trunk.feed_forward = @models.FeedForward
models.FeedForward.hidden = 16
training.Run.objective = @objectives.MaskedLM()
objectives.MaskedLM.select = @objectives.RandomTokens()
training.Run.steps = %steps
training.Run.batch_size = 8
training.Run.length = 16
training.Run.optimizer = @training.AdamW()
training.AdamW.learning_rate = @optax.warmup_cosine_decay_schedule()
optax.warmup_cosine_decay_schedule.init_value = 0.0
optax.warmup_cosine_decay_schedule.peak_value = 2e-3
optax.warmup_cosine_decay_schedule.warmup_steps = %warmup
optax.warmup_cosine_decay_schedule.decay_steps = %decay_steps
training.Run.evaluators = [@evaluation.MaskedLikelihood()]
evaluation.MaskedLikelihood.data = @data.Records()
evaluation.MaskedLikelihood.length = 16
evaluation.MaskedLikelihood.rate = 0.3
training.Run.checkpoint_every = 5
"""
STAGED = BASE.replace(
    "training.Run.steps = %steps",
    """long_steps = 6
training.Run.stages = [@a/training.Stage(), @b/training.Stage()]
a/training.Stage.steps = %steps
b/training.Stage.steps = %long_steps
b/training.Stage.batch_size = 16""",
)
HEAD = "from __gin__ import dynamic_registration\nfrom launch import sweep\n"
SWEEP = (
    HEAD
    + """
sweep.Sweep.base = 'base.gin'
sweep.Sweep.axes = [@sweep.Values()]
sweep.Values.binding = 'RandomTokens.rate'
sweep.Values.values = [0.15, 0.4]
sweep.Sweep.seeds = [0, 3]
sweep.Sweep.budget = @sweep.Tokens()
sweep.Tokens.amount = 2_560
sweep.Sweep.metric = ('masked/bits_per_token', 'min')
"""
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a base and a sweep of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PALMETTE_CACHE", str(tmp_path / "cache"))
    Path("base.gin").write_text(BASE)
    Path("s.gin").write_text(SWEEP)
    return tmp_path


def axes(**options):
    return [Options(name=name, options=found) for name, found in options.items()]


def described(**changes):
    asked = {"base": "base.gin", "budget": Tokens(amount=10), "metric": ("loss", "min")}
    return Sweep(**asked | changes)


# What arms there are.


def test_a_grid_has_every_combination_and_pairs_go_in_step():
    both = axes(
        rate={"low": "R.rate = 0.1", "high": ["R.rate = 0.4", "deep.gin"]}, norm={"pre": [], "post": "T.p = 'post'"}
    )
    grid = described(axes=both).arms()
    assert [arm.name for arm in grid] == [f"rate={r},norm={n}" for r in ("low", "high") for n in ("pre", "post")]
    assert grid[3].overrides == ("R.rate = 0.4", "T.p = 'post'")
    assert grid[3].configs == ("deep.gin",)
    assert grid[3].options == {"rate": "high", "norm": "post"}
    pairs = described(axes=both, paired=True).arms()
    assert [arm.name for arm in pairs] == ["rate=low,norm=pre", "rate=high,norm=post"]
    values = described(axes=[Values(binding="objectives.RandomTokens.rate", values=[0.15, [1, 2], "a/b"])]).arms()
    assert [arm.name for arm in values] == ["rate=0.15", "rate=1_2", "rate=a_b"]
    assert values[2].overrides == ("objectives.RandomTokens.rate = 'a/b'",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": []}, "changes nothing"),
        ({"axes": [("a", {"x": []})], "seeds": []}, "runs nothing"),
        ({"axes": [("a", {"x": []})], "seeds": [1, 1]}, "stands twice"),
        ({"axes": [("a", {"x": []}), ("a", {"y": []})]}, "two axes have one name"),
        ({"axes": [("a", {"x": [], "y": []}), ("b", {"z": []})], "paired": True}, "a has 2, b has 1"),
        ({"axes": [("a", {"x": []})], "baseline": "a=z"}, "no arm 'a=z': use one of a=x; nearest: a=x"),
        ({"axes": [("a", {"x": []})], "expected": {"a=q": "better"}}, "expected: there is no arm 'a=q'"),
        ({"axes": [("a", {})]}, "has no options"),
        ({"axes": [("a", {"../x": []})]}, "names a folder"),
        ({"axes": [("a", {"x=1": []})]}, "names a folder"),
    ],
)
def test_what_is_no_sweep_is_refused(changes, words):
    def make():
        made = [Options(name=name, options=options) for name, options in changes["axes"]]
        described(**changes | {"axes": made})

    with pytest.raises(UserError, match=words):
        make()


# What they may spend.


def shown(**bindings):
    return [Shown(name.replace("__", "."), str(value), "x.gin:3", True) for name, value in bindings.items()]


def test_a_budget_pays_for_whole_runs_of_a_cost():
    cost = Cost((Spent(4, 400, 2e6), Spent(6, 600, 3e6)), 4.0)
    assert Tokens(500).share(cost) == 0.5
    assert Flops(1e7).share(cost) == 2.0
    assert Seconds(1.0).share(cost) == 0.25


def test_lengths_are_macros_and_all_follow():
    found = scaled(shown(steps=100, warmup_steps=7, warmup=5, rate=0.1, training__Run__steps="%steps"), 0.25)
    assert found == ["steps = 25", "warmup_steps = 2"]
    assert scaled(shown(steps=3), 1e-6) == ["steps = 1"]
    with pytest.raises(UserError, match=r"x\.gin:3: optax\.f\.decay_steps = 100 would not follow"):
        scaled(shown(steps=100, optax__f__decay_steps=100), 2.0)
    with pytest.raises(UserError, match="no macro says how long"):
        scaled(shown(training__Run__steps="%length"), 2.0)


def one_device(monkeypatch):
    import jax

    found = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: found)


def test_steps_follow_the_budget_by_the_arms_own_step(place, monkeypatch):
    """In tokens both arms take as many steps; in FLOPs each takes what its own step leaves; stages share the factor."""
    one_device(monkeypatch)
    sweep = Asked(("s.gin",)).read()
    low, high = (planned(sweep, arm, None) for arm in sweep.arms())
    assert low.lengths == high.lengths == ("steps = 20", "decay_steps = 15")
    assert low.cost.tokens == high.cost.tokens == 20 * 8 * 16
    assert "optax.warmup_cosine_decay_schedule.decay_steps = %decay_steps" in low.operative
    Path("f.gin").write_text(
        SWEEP.replace("Tokens()", "Flops()").replace("Tokens.amount = 2_560", "Flops.amount = 1e9")
    )
    flops = Asked(("f.gin",)).read()
    low, high = (planned(flops, arm, None) for arm in flops.arms())
    assert low.cost.steps > high.cost.steps
    for one in (low, high):
        assert one.cost.flops == pytest.approx(1e9, rel=0.5 / one.cost.steps)
    Path("base.gin").write_text(STAGED)
    cost = planned(sweep, sweep.arms()[0], None)
    # 8 steps of 8 rows and 6 of 16 are 2,560 tokens: the budget itself.
    assert [stage.stage.steps for stage in cost.plan.stages] == [8, 6]


def test_a_budget_of_time_is_measured_once(place, monkeypatch):
    one_device(monkeypatch)
    monkeypatch.setattr("launch.sweep.planning.MEASURED_S", 0.05)
    Path("s.gin").write_text(
        SWEEP.replace("Tokens()", "Seconds()").replace("Tokens.amount = 2_560", "Seconds.amount = 1.0")
    )
    sweep = Asked(("s.gin",)).read()
    first = planned(sweep, sweep.arms()[0], place / "out")
    assert first.cost.steps > 1
    monkeypatch.setattr("launch.sweep.planning.step_seconds", lambda *_: pytest.fail("measured again"))
    assert planned(sweep, sweep.arms()[0], place / "out").lengths == first.lengths
    with pytest.raises(UserError, match="begun with another configuration"):
        planned(sweep, sweep.arms()[1].__class__("rate=0.15", {}, ("RandomTokens.rate = 0.2",)), place / "out")


def test_tokens_are_all_places_of_all_texts():
    leaf = lambda size: SimpleNamespace(size=size)
    batch = {"query/segments": leaf(6), "query/tokens": leaf(6), "positive/segments": leaf(10)}
    stage = SimpleNamespace(first=0, batch=batch, stage=SimpleNamespace(steps=5))
    flops = FlopCount(3.0, ("search",))
    plan = SimpleNamespace(steps=5, stages=(stage,), once=lambda name, make: flops)
    assert cost_of(plan) == Cost((Spent(5, 80, 15.0),))
    with pytest.raises(UserError, match="search loop as long as the data say"):
        cost_of(plan, Flops(1e9))


# Who runs what.


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_every_run_is_taken_once_and_seeds_follow_each_other(workers):
    arms, seeds = [f"a{i}" for i in range(4)], range(5)
    queue = Queue((arm, seed) for arm in arms for seed in seeds)
    parts = queue.share(arms, workers)
    assert [arm for part in parts for arm in part] == arms
    draw, taken, switches = random.Random(workers), [], Counter()
    last: dict[int, str] = {}
    busy = set(range(workers))
    while busy:
        worker = draw.choice(sorted(busy))
        run = queue.take(worker)
        if run is None:
            busy.remove(worker)
            continue
        if last.get(worker) != run[0]:
            switches[run[0]] += 1
            last[worker] = run[0]
        taken.append(run)
    assert sorted(taken) == [(arm, seed) for arm in arms for seed in seeds]
    assert len(queue) == 0
    if workers == 1:
        assert set(switches.values()) == {1}
    # An arm changes hands only when nothing else is left.
    assert sum(switches.values()) <= len(arms) + workers * (workers - 1)


# What is refused, in one line, before anything is trained.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("RandomTokens.rate'", "RandomTokens.rat'"), "objectives.RandomTokens has no argument rat; nearest: rate"),
        (("RandomTokens.rate'", "RandomToken.rate'"), "RandomToken is unknown; nearest: objectives.RandomTokens"),
        (("[0.15, 0.4]", "[0.15, 'much']"), "arm rate=much: override .* expected a number in [0, 1]"),
        (("[0.15, 0.4]", "[0.15, 1.4]"), "arm rate=1.4: override .* expected a number in [0, 1]"),
        (("[0.15, 0.4]", "[0.3, 0.30]"), "have one twice"),
        (("[0.15, 0.4]", "[]"), "has no options"),
        (("'masked/bits_per_token'", "'masked/bits_per_tokn'"), "nearest: masked/bits_per_token"),
        (("bits_per_token', 'min'", "bits_per_token', 'least'"), "expected a tuple"),
        (("2_560", "'all'"), "Tokens.amount = 'all': expected a number"),
        (
            ("sweep.Tokens.amount = 2_560", "sweep.Tokens.amount = 2_560\nsweep.Sweep.baseline = 'rate=0.3'"),
            "no arm 'rate=0.3'",
        ),
        (("'base.gin'", "'bas.gin'"), "arm rate=0.15: bas.gin: no such file; nearest: base.gin"),
        (("sweep.Sweep.seeds = [0, 3]", "sweep.Sweep.seeds = [0, -3]"), "seeds"),
        (
            (
                "@sweep.Values()]\nsweep.Values.binding = 'RandomTokens.rate'\nsweep.Values.values = [0.15, 0.4]",
                "@sweep.Options()]\nsweep.Options.name = 'r'\n"
                "sweep.Options.options = {'a': 'RandomTokens.rate = 0.2', 'b': 'objectives.RandomTokens.rate = 0.2'}",
            ),
            "arms r=a and r=b are the same run",
        ),
    ],
)
def test_bad_input_is_one_line(place, capsys, change, words):
    import re

    text = SWEEP.replace(*change)
    assert text != SWEEP
    Path("s.gin").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sweep", "s.gin", "--out", "out"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said.count("\n") == 1
    assert re.search(".*".join(map(re.escape, words.split(" .* "))), said), said
    assert not Path("out").exists()


def test_an_arm_that_only_spells_out_a_default_is_the_base(place, capsys, monkeypatch):
    one_device(monkeypatch)
    text = SWEEP.replace("@sweep.Values()", "@sweep.Options()").replace(
        "sweep.Values.binding = 'RandomTokens.rate'", "sweep.Options.name = 'r'"
    )
    text = text.replace(
        "sweep.Values.values = [0.15, 0.4]", "sweep.Options.options = {'a': [], 'b': 'RandomTokens.rate = 0.15'}"
    )
    Path("s.gin").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sweep", "s.gin", "--dry-run"])
    assert exit_.value.code == 2
    assert "arms r=a and r=b are the same run" in capsys.readouterr().err


def test_a_folder_is_one_sweeps(place):
    sweep = Asked(("s.gin",)).read()
    folder.claim(place / "out", "s.gin", sweep)
    more = Asked(("s.gin",), ("Sweep.seeds = [0, 3, 4]", "Values.values = [0.15, 0.4, 0.5]")).read()
    folder.claim(place / "out", "s.gin", more)
    assert len(folder.read_sweep(place / "out")["arms"]) == 3
    for override, words in (
        ("Tokens.amount = 99", "budget .* there"),
        ("Sweep.metric = ('loss', 'min')", "metric"),
        ("Values.binding = 'objectives.RandomTokens.rate'", "arm rate=0.15"),
        ("Values.values = [0.7]", "none of them here"),
    ):
        with pytest.raises(UserError, match=f"holds another sweep.*{words}"):
            folder.claim(place / "out", "s.gin", Asked(("s.gin",), (override,)).read())
    before = (place / "out" / "sweep.json").read_text()
    with pytest.raises(UserError, match="refused later"), folder.claimed(place / "out", "s.gin", sweep):
        raise UserError("refused later")
    assert (place / "out" / "sweep.json").read_text() == before
    (place / "run").mkdir()
    (place / "run" / "config.gin").write_text("")
    with pytest.raises(UserError, match="something else than a sweep"):
        folder.claim(place / "run", "s.gin", sweep)


def test_jobs_are_commands_for_what_is_not_done(place, capsys, monkeypatch):
    one_device(monkeypatch)
    out = place / "out"
    folder.claim(out, "s.gin", Asked(("s.gin",)).read())
    folder.keep_result(folder.run_folder(out, "rate=0.15", 3), "done")
    folder.keep_result(folder.run_folder(out, "rate=0.4", 0), "failed", error="no disk")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sweep", "s.gin", "--out", "out", "--jobs"])
    assert exit_.value.code == 0
    told = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [
        ["palmette", "sweep", "s.gin", "--out", "out", "--run", run]
        for run in ("rate=0.15/0", "rate=0.4/0", "rate=0.4/3")
    ]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sweep", "s.gin", "--out", "out", "--run", "rate=0.4/1"])
    assert "no run of this sweep" in capsys.readouterr().err


def test_curves_and_rates_are_read_from_what_a_run_left(place, monkeypatch):
    """Two stages: a step of the second costs twice as much, so a curve over tokens bends where one over steps does not."""
    one_device(monkeypatch)
    Path("base.gin").write_text(
        STAGED.replace("checkpoint_every = 5", "checkpoint_every = 5\ntraining.Run.log_every = 1")
    )
    with pytest.raises(SystemExit):
        cli.main(["sweep", "s.gin", "--out", "out", "--run", "rate=0.4/3"])
    sweep, run = Asked(("s.gin",)).read(), folder.run_folder(place / "out", "rate=0.4", 3)
    over = {per: curve(run, "loss", per=per) for per in ("steps", "tokens", "flops", "seconds")}
    assert over["steps"].spent.tolist() == list(range(1, 15))
    each = [128] * 8 + [256] * 6
    assert over["tokens"].spent.tolist() == [sum(each[: i + 1]) for i in range(14)]
    end = folder.result(place / "out", "rate=0.4", 3)
    assert over["flops"].spent[-1] == pytest.approx(end["flops"])
    assert 0 < over["seconds"].spent[-1] <= end["seconds"]["train"] + 1e-9
    assert len({tuple(found.values) for found in over.values()}) == 1
    assert curve(run, "masked/bits_per_token", per="tokens").spent.tolist() == [2560]
    with pytest.raises(UserError, match="no figure 'los'"):
        curve(run, "los", per="steps")
    logged = curve(run, "learning_rate", per="steps")
    assert learning_rates(planned(sweep, sweep.arms()[1], None).plan) == pytest.approx(logged.values, rel=1e-5)


def test_the_table_calls_noise_noise_and_counts_what_is_done():
    sweep = {
        "metric": ["m", "min"],
        "baseline": "a",
        "seeds": [0, 1, 2],
        "arms": [{"name": n} for n in "abcd"],
        "expected": {"b": "better"},
    }
    end = lambda m: {"status": "done", "figures": {"m": m}, "steps": 5, "tokens": 1280, "flops": 2e9}
    results = {
        "a": {0: end(3.0), 1: end(3.1), 2: end(2.9)},
        "b": {0: end(2.0), 1: end(2.11), 2: end(1.9)},
        "c": {0: end(3.2), 1: end(2.9), 2: end(3.0)},
        "d": {0: {"status": "failed", "figures": {}}},
    }
    rows = {row[0]: row for row in table(sweep, results)}
    assert rows["a"][1:5] == ["3/3", "3", "± 0.25", "the baseline"]
    assert rows["b"][6] == "better: agrees"
    assert rows["c"][6] == "within noise"
    assert rows["b"][7:] == ["5", "1.28e+03", "2e+09"]
    assert rows["d"][1:3] == ["0/3", ""]
    assert compared(sweep, {"b": results["b"]}) == {}


# A real sweep, in processes of its own.


def palmette(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,
    )


def ended(process):
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


@pytest.mark.long
def test_a_killed_sweep_goes_on_and_runs_no_arm_twice(place, monkeypatch):
    """Killed at a random moment. What was done is not touched, what was cut goes on, and the figures are those of runs alone."""
    Path("s.gin").write_text(
        SWEEP.replace("@sweep.Values()", "@sweep.Options()")
        .replace("sweep.Values.binding = 'RandomTokens.rate'", "sweep.Options.name = 'rate'")
        .replace(
            "sweep.Values.values = [0.15, 0.4]",
            "sweep.Options.options = {'low': [], 'high': 'RandomTokens.rate = 0.4', 'wrong': 'Run.init_from = \"nowhere\"'}",
        )
    )
    out = place / "out"
    words = ("sweep", "s.gin", "--out", "out", "--processes", "2", "Sweep.seeds = [0, 3]")
    first = palmette(*words)
    limit = time.time() + 200
    while not any(out.glob("arms/*/*/metrics.jsonl")) and first.poll() is None and time.time() < limit:
        time.sleep(0.05)
    time.sleep(random.uniform(0, 2.5))
    asked = random.choice([signal.SIGKILL, signal.SIGTERM])
    first.send_signal(asked)
    status, said = ended(first)
    # Asked to stop, it has its runs save, and that is no failure.
    assert status in ((-signal.SIGKILL, 1) if asked == signal.SIGKILL else (0, 1)), said
    done = {path: path.stat().st_mtime_ns for path in out.glob("arms/*/*/result.json") if '"done"' in path.read_text()}
    status, said = ended(palmette(*words))
    assert status == 1, said
    assert said.count(": failed: ") == 2, said
    assert "nowhere" in said
    assert "2 of 6 runs failed: rate=wrong/0, rate=wrong/3" in said
    assert {path: path.stat().st_mtime_ns for path in done} == done
    ends = folder.results(out, ["rate=low", "rate=high"], [0, 3])
    for runs in ends.values():
        for end in runs.values():
            assert end["status"] == "done"
            assert (end["steps"], end["tokens"]) == (20, 2560)
            assert set(end["seconds"]) >= {"start", "compile", "train", "evaluate"}
    # Alone, in this process, by the command that a cluster would start.
    one_device(monkeypatch)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sweep", "s.gin", "--out", "alone", "--run", "rate=high/3"])
    assert exit_.value.code == 0
    alone = folder.result(place / "alone", "rate=high", 3)["figures"]
    assert ends["rate=high"][3]["figures"] == pytest.approx(alone, rel=1e-4)
    assert ends["rate=high"][3]["figures"] != pytest.approx(ends["rate=high"][0]["figures"], rel=1e-4)
    run = folder.run_folder(out, "rate=high", 3)
    assert "training.Run.seed = 3" in (run / "config.gin").read_text()
    examples = json.loads((run / "examples.json").read_text())
    assert {*examples["masked"]} == {"accuracy", "bits_per_token"}
    # All done but the wrong ones: nothing is run again but those.
    assert sum("MiB temporaries" in line for line in (run / "log.txt").read_text().splitlines()) <= 2
