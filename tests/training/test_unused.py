"""A run says which experts no token comes to, once, and when one does again."""

from __future__ import annotations

import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from awkward import TRUNK
from running import devices, tiny

from models import Experts, HashRouter, TopKRouter
from models.loads import Loads
from models.side import Tally
from partitioning import data
from training.unused import Unused


def test_once_for_each_death_and_once_for_each_return():
    """After a window of steps in a row; steps without any token do not count."""
    watch, said = Unused(2), []
    chosen = [[1, 0, 3], [2, 0, 0], [0, 0, 0], [2, 0, 0], [1, 0, 0], [1, 0, 1], [1, 5, 1], [1, 0, 1], [1, 0, 1]]
    for step, counts in enumerate(chosen):
        tallies = {"trunk/layers/1/experts": Tally(np.asarray(counts, np.float32), layers=(1,))}
        said += [(step, line) for line in watch.add(Loads(tallies))]
    dead, back = "no token for 2 steps: dead", "tokens again, after being dead"
    assert said == [
        (1, f"trunk, layer 1: expert 1: {dead}"),
        (3, f"trunk, layer 1: expert 2: {dead}"),
        (5, f"trunk, layer 1: expert 2: {back}"),
        (6, f"trunk, layer 1: expert 1: {back}"),
        (8, f"trunk, layer 1: expert 1: {dead}"),
    ]


class Starving(TopKRouter):
    """Never takes experts 1 and 2 of its four."""

    def logits(self, x, present, context):
        return super().logits(x, present, context) + jnp.asarray([0.0, -1e9, -1e9, 0.0])


@pytest.mark.parametrize(("kind", "dead"), [(Starving, True), (partial(HashRouter, vocabulary=37), False)])
def test_a_run_names_the_experts_that_it_starves(kind, dead, tmp_path, capsys):
    """In every layer, and no others; their load is in the metrics, by layer and expert."""
    model = partial(TRUNK, layers=2, feed_forward=partial(Experts, experts=4, hidden=8, router=kind))
    with devices(1):
        tiny("clm", model=model, rules=data(), unused_after=3, checkpoint_every=100).train(tmp_path)
    printed = capsys.readouterr().out
    for layer in range(2):
        line = f"step 3: trunk, layer {layer}: experts 1, 2: no token for 3 steps: dead"
        assert printed.count(line) == dead
    assert printed.count("dead") == 2 * dead
    assert "expert entropy" in printed
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    loads = [line["experts/trunk/layers/1/load"] for line in lines if "loss" in line]
    assert len(loads) == 4
    for load in loads:
        assert sum(load) == pytest.approx(1, abs=1e-5)
        assert [share == 0 for share in load] == [False, dead, dead, False]
