"""The README's config and its Python run do what the page says."""

import re
from pathlib import Path

import numpy as np

import data
from launch.config import load

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(language: str) -> str:
    """The page's first block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found[1]


def test_the_first_config_and_the_python_run_are_the_same(tmp_path, monkeypatch):
    """Both train, to the same loss."""
    monkeypatch.setenv("PALMETTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    data.prepare("python_docs")
    path = tmp_path / "first.gin"
    path.write_text(block("gin"))
    small = ["Run.steps = 2", "Run.batch_size = 8", "Run.length = 16"]
    first = load([str(path)], small, exercise=lambda run: run.abstract()).value.train(tmp_path / "run")
    script = block("python").replace("steps=300", "steps=2, batch_size=8, length=16")
    names: dict = {}
    exec(compile(script, "README.md", "exec"), names)
    second = names["run"].train(tmp_path / "again")
    assert np.isfinite(first["loss"])
    assert first["loss"] == second["loss"]
