"""A package to configure, a way to resolve a file's text over it, and a config that is planned in seconds."""

from pathlib import Path

import pytest

from launch import config

HEADER = "from __gin__ import dynamic_registration\nimport workshop\nimport optax\n"
SMALL = """
from __gin__ import dynamic_registration
import data
import models
import objectives
import partitioning
import training
training.Run.data = @data.Described()
data.Described.vocabulary = 250
training.Run.objective = @objectives.CausalLM()
training.Run.model = @models.Trunk
models.Trunk.width = 128
models.Trunk.layers = 1
models.Trunk.mixer = @models.Attention
models.Attention.heads = 2
training.Run.rules = @partitioning.fsdp()
training.Run.steps = 10
training.Run.batch_size = 8
training.Run.length = 128
training.Run.clip = None
training.Run.guard = None
training.Run.optimizer = @training.AdamW()
training.AdamW.learning_rate = 1e-3
"""


@pytest.fixture
def small(tmp_path):
    """A config that is planned in seconds."""
    path = tmp_path / "small.gin"
    path.write_text(SMALL)
    return path


@pytest.fixture
def workshop(monkeypatch):
    """The package of tests/launch/workshop."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "workshop"))
    import workshop

    return workshop


@pytest.fixture
def load(workshop, tmp_path):
    """Resolve `text`, after the usual imports, as the file x.gin."""

    def resolve(text, *overrides, header=HEADER, allow_import=("workshop",)):
        path = tmp_path / "x.gin"
        path.write_text(header + text)
        return config.load(
            [str(path)],
            overrides,
            top="workshop.Run",
            allow_import=allow_import,
            exercise=lambda run: run.abstract(),
        )

    return resolve
