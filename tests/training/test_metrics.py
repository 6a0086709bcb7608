"""Metrics come back from both files, once a step after a resume; progress says what is asked of it."""

import io
import json
import resource
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from partitioning.errors import UserError
from training.metrics import FILE, MetricWriter, group_norms
from training.progress import Pace, Progress, clock_time
from training.tensorboard import TensorBoard


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def events(folder, name, kind="Scalars"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    value = "value" if kind == "Scalars" else "histogram_value"
    return [(event.step, getattr(event, value)) for event in getattr(accumulator, kind)(name)]


def test_both_files_hold_what_was_written(tmp_path):
    with MetricWriter(tmp_path / "new", boards=[TensorBoard()]) as writer:
        load = jnp.asarray([0.25, 1 / 3, jnp.nan])
        writer.write(1, {"loss/mlm": jnp.float32(2.5), "learning_rate": 0.1, "rows": np.int64(4), "load": load})
        writer.write(2, {"loss/mlm": jnp.float32(jnp.nan), "learning_rate": float("inf")})
        writer.text("config", "a = 1")
    assert lines(tmp_path / "new") == [
        {"step": 1, "loss/mlm": 2.5, "learning_rate": 0.1, "rows": 4, "load": [0.25, 0.333333, "nan"]},
        {"step": 2, "loss/mlm": "nan", "learning_rate": "inf"},
    ]
    assert events(tmp_path / "new", "learning_rate")[0] == (1, pytest.approx(0.1))
    ((step, histogram),) = events(tmp_path / "new", "load", "Histograms")
    assert (step, histogram.num, histogram.min) == (1, 2, 0.25)


def test_a_resumed_run_has_each_step_once(tmp_path):
    with MetricWriter(tmp_path, boards=[TensorBoard()]) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": step})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 8, "lo')
    with MetricWriter(tmp_path, step=5, boards=[TensorBoard()]) as writer:
        for step in range(6, 10):
            writer.write(step, {"loss": 10 * step})
    expected = [*range(1, 6), 60, 70, 80, 90]
    assert [line["loss"] for line in lines(tmp_path)] == expected
    assert [value for _, value in events(tmp_path, "loss")] == expected
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="metrics cannot be written there"):
        MetricWriter(tmp_path / "run")


@contextmanager
def room(size):
    """No file of this process grows beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("names", "size"), [(1, 3000), (50, 20_000)])
def test_a_full_disk_is_one_line(tmp_path, names, size):
    """At whichever file it is met, and never waited for; what the buffers still hold is not tried again at the end."""

    def run():
        with room(size), MetricWriter(tmp_path, boards=[TensorBoard()]) as writer:
            for step in range(1, 400):
                writer.write(step, {f"loss/{i}": 1.0 for i in range(names)})

    with pytest.raises(UserError, match=r"metrics.jsonl: metrics cannot be written: File too large$"):
        run()


def test_what_ended_the_run_is_said_and_not_the_full_disk(tmp_path):
    def run():
        with room(2000), MetricWriter(tmp_path, boards=[TensorBoard()]) as writer:
            writer.write(1, {"loss": 1.0})
            writer.text("config", "a" * 4000)
            raise ValueError("left")

    with pytest.raises(ValueError, match="left"):
        run()
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_group_norms_are_those_of_the_concatenation():
    draw = np.random.default_rng(0)
    flat: dict[str, Any] = {
        "trunk/embed/tokens/table": draw.standard_normal((5, 4)).astype(np.float32),
        "trunk/embed/norm/scale": draw.standard_normal(4).astype(np.float32),
        "trunk/stack/scanned/0/mlp/kernel": draw.standard_normal((3, 4, 4)).astype(np.float32),
        "generator/embed/table": draw.standard_normal((2, 2)).astype(np.float32),
        "temperature": np.float32(3.0),
    }
    found = group_norms({name: jnp.asarray(value) for name, value in flat.items()})
    embed = np.concatenate([np.ravel(value) for name, value in flat.items() if name.startswith("trunk/embed")])
    assert set(found) == {"trunk/embed", "trunk/stack", "generator/embed", "temperature"}
    np.testing.assert_allclose(found["trunk/embed"], np.linalg.norm(embed), rtol=1e-6)
    np.testing.assert_allclose(found["temperature"], 3.0)
    whole = np.sqrt(sum(float(value) ** 2 for value in found.values()))
    tree = group_norms({name: jnp.asarray(value, jnp.bfloat16) for name, value in flat.items()}, depth=1)
    np.testing.assert_allclose(whole, np.sqrt(sum(float(value) ** 2 for value in tree.values())), rtol=1e-2)


def test_pace_looks_back_over_its_window():
    clock = iter([0.0, 1.0, 2.0, 40.0, 41.0])
    pace = Pace(window_s=30.0, now=lambda: next(clock))
    assert pace.steps_per_s is None
    for step, tokens in [(0, 0), (10, 100), (20, 200), (30, 900), (40, 1900)]:
        pace.add(step, tokens)
    assert pace.tokens_per_s == pytest.approx(1700 / 39)
    assert pace.steps_per_s == pytest.approx(20 / 39)


@pytest.mark.parametrize(("seconds", "words"), [(4.4, "4s"), (185, "3m05s"), (7620, "2h07m")])
def test_times_are_short(seconds, words):
    assert clock_time(seconds) == words


def shown(terminal, steps=(1, 2, 3, 4)):
    """What a run of four steps, one second each after a slow first, prints."""
    times = [0.0]
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160)
    progress = Progress(
        4, checkpoint_every=3, step_mfu=lambda s: 0.25 * s, interval_s=2.0, console=console, now=lambda: times[0]
    )
    with progress:
        for step in steps:
            times[0] += 60.0 if step == 1 else 1.0
            progress.update(step, loss=5.0 - step, tokens=512)
        progress.say("[bold] is no markup")
    return output.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    assert shown(terminal=False).splitlines() == [
        "step 1/4  loss 4.0000  checkpoint at 3",
        "step 3/4  loss 2.0000  512 tokens/s  MFU 25.0%  1s left  checkpoint at 4",
        "step 4/4  loss 1.0000  512 tokens/s  MFU 25.0%  0s left",
        "[bold] is no markup",
    ]


def test_a_bar_on_a_terminal():
    output = shown(terminal=True)
    assert "4/4" in output
    assert "512 tokens/s  MFU 25.0%  0s left" in output
