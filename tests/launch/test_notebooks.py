"""The notebooks run from top to bottom on the package that is here, with small numbers in their one cell of parameters."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "launch" / "notebooks").glob("*.ipynb"))
SMALL = {
    "first_run": {"STEPS": 3, "WIDTH": 16},
    "write_an_objective": {"STEPS": 2, "WIDTH": 16},
    "plan_a_pod": {"CONFIG": "small.gin", "TOPOLOGY": "v5e:2x2"},
    "read_an_ablation": {"SEEDS": [0, 1], "STEPS": 3},
}
SHORT = ("first_run",)
LONG = [pytest.param(p, marks=() if p.stem in SHORT else pytest.mark.long, id=p.stem) for p in NOTEBOOKS]


def shrunk(notebook, values):
    """The notebook with other values in its cell of parameters; each must be there, on a line of its own."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in values.items():
        cell.source, found = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        assert found == 1, name
    return notebook


@pytest.mark.parametrize("path", LONG)
def test_a_notebook_runs(path, small, tmp_path, monkeypatch, tmp_path_factory):
    if path.stem == "plan_a_pod":
        pytest.importorskip("libtpu", reason="pip install 'palmette[tpu]'")
        # It refuses flags that are for CPUs.
        monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("PALMETTE_CACHE", str(tmp_path_factory.getbasetemp() / "docs_cache"))
    values = SMALL[path.stem]
    if "CONFIG" in values:
        values = values | {"CONFIG": str(small)}
    notebook = shrunk(nbformat.read(path, as_version=4), values)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert {"first_run": "(", "write_an_objective": "two micro-batches are one batch", "plan_a_pod": "least time of a step",
            "read_an_ablation": "corrected: "}[path.stem] in shown  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_source(path):
    """Without outputs, and its first code installs what is not there and does nothing else."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert re.search(r"try:\n +from launch.ours import ROOT\nexcept ImportError:\n +%pip install", code[0].source)
    assert path.stem in SMALL
