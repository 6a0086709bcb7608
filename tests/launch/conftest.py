"""A package to configure, and a way to resolve a file's text over it."""

from pathlib import Path

import pytest

from launch import config

HEADER = "from __gin__ import dynamic_registration\nimport workshop\nimport optax\n"


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
