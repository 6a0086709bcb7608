"""Every shipped ablation resolves in all its arms, at the budget that it names, and says what it asks."""

from pathlib import Path

import pytest

from launch.sweep import command
from launch.sweep.loading import Asked
from training import screen

SWEEPS = sorted((Path(__file__).parent.parent / "configs" / "ablations").glob("*.gin"))


@pytest.mark.usefixtures("some_sources")
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_an_ablation_resolves(path, monkeypatch):
    said = []
    monkeypatch.setattr(screen, "say", said.append)
    sweep = Asked((str(path),)).read()
    command.dry_run(Asked((str(path),)))
    rows = [line.split() for line in said if line.startswith(sweep.arms()[0].name.partition("=")[0] + "=")]
    assert len(rows) == len(sweep.arms()) > 1
    # The last columns are tokens and FLOPs; the budget holds within half a step.
    spent = [float(row[-2 if sweep.budget.kind == "tokens" else -1]) for row in rows]
    assert spent == pytest.approx([sweep.budget.amount] * len(rows), rel=0.01)
    assert sweep.question.endswith("?")
    assert sweep.claim
    assert sweep.source
    assert sweep.expected
    assert len(sweep.seeds) == 5
    assert path.read_text().startswith("# ")
