"""Every shipped config is loaded, shrunk and trained two steps, and opens with a true header."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from launch.config import load

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.gin"))


def shrunk(run):
    """The same run, two steps a stage and eight short rows."""
    small = {"batch_size": 8, "length": 32}
    stages = [replace(stage, steps=2, **{k: v for k, v in small.items() if getattr(stage, k)}) for stage in run.stages]
    changes = {"stages": stages} if stages else {"steps": 2}
    objective = run.objective
    if getattr(objective, "chunked", None):
        objective = replace(objective, chunked=8)
    model = partial(run.model, width=32, layers=2)
    return replace(run, model=model, objective=objective, evaluators=(), accumulate=1, **small, **changes)


@pytest.mark.usefixtures("some_sources")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_trains_and_says_what_it_is(path, tmp_path):
    """It resolves with every binding consumed, its loss is a number, and its header names what may be overridden."""

    def exercise(run):
        run.prepare()
        run.abstract()

    resolved = load([str(path)], exercise=exercise)
    figures = shrunk(resolved.value).train(tmp_path / "run")
    assert np.isfinite(figures["loss"])

    header = path.read_text().split("\nfrom __gin__")[0]
    assert re.search(r"^# 2 CPU cores: .*\d+ (s|min)\b.*\d", header, re.MULTILINE), "the header gives time and figure"
    named = re.search(r"^# Override: (.+)$", header, re.MULTILINE)
    assert named, "the header says what to override"
    known = {parameter.name for parameter in resolved.available}
    for name in named[1].rstrip(".").split(", "):
        assert name.split("/")[-1] in known, f"{name} is nothing that may be overridden"
