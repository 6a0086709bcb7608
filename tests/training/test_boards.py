"""Weights & Biases gets what the file gets, of one run over all its starts; what is missing is one line."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import devices, metrics, tiny

from partitioning.errors import UserError
from training.metrics import FILE, MetricWriter
from training.tensorboard import TensorBoard
from training.weights_and_biases import FILE as ID
from training.weights_and_biases import WeightsAndBiases

OPERATIVE = "from __gin__ import dynamic_registration\n\na.B.rate = 0.15\na.B.names = [\n  'x',\n]\nc/a.B.rate = 1\n"


class Service:
    """Stands in for the package: what it was told, as the package takes it."""

    def __init__(self):
        self.begun: list[dict[str, Any]] = []
        self.logged: dict[int, dict[str, Any]] = {}
        self.config: dict[str, str] = {}
        self.ended: list[int] = []

    def init(self, **asked):
        self.begun.append(asked)
        config = SimpleNamespace(update=lambda values, allow_val_change: self.config.update(values))
        return SimpleNamespace(log=self.log, config=config, finish=lambda exit_code: self.ended.append(exit_code))

    def log(self, values, step):
        self.logged.setdefault(step, {}).update(values)


@pytest.fixture
def service(monkeypatch):
    """The stand-in, importable as `wandb`."""
    found, package = Service(), ModuleType("wandb")
    found.error = type("Error", (Exception,), {})
    package.init = found.init
    package.Settings = lambda **options: options
    package.Histogram = tuple
    package.errors = SimpleNamespace(Error=found.error)
    monkeypatch.setitem(sys.modules, "wandb", package)
    return found


def test_a_run_and_its_resumption_are_one_run_there(service, tmp_path):
    """Every figure of the file, by step; the config by its bindings; the same id after a second start."""
    boards = [TensorBoard(), WeightsAndBiases(project="p", entity="e")]
    out = tmp_path / "runs" / "a"
    with devices(1):
        tiny(steps=2, boards=boards).train(out, operative=OPERATIVE)
    with MetricWriter(out, step=2, boards=boards) as writer:
        writer.write(3, {"loss": 1.5})
    first, second = service.begun
    assert (first["project"], first["entity"], first["name"], first["resume"]) == ("p", "e", "runs/a", "allow")
    assert first["id"] == second["id"] == json.loads((out / ID).read_text())["id"]
    assert service.config == {"a.B.rate": "0.15", "a.B.names": "[\n  'x',\n]", "c/a.B.rate": "1"}
    assert service.ended == [0, 0]
    found = metrics(out)
    assert list(found) == [1, 2, 3]
    for step, figures in found.items():
        assert {name: service.logged[step][name] for name in figures if name != "step"} == {
            name: value for name, value in figures.items() if name != "step"
        }
    assert list(out.glob("events*"))


def test_arrays_are_histograms_and_no_number_is_no_error(service, tmp_path):
    with MetricWriter(tmp_path, boards=[WeightsAndBiases()]) as writer:
        writer.write(1, {"load": np.asarray([0.5, np.nan, 0.25]), "loss": float("nan"), "none": np.full(2, np.nan)})
    assert set(service.logged[1]) == {"load", "loss"}
    assert service.logged[1]["load"] == (0.5, 0.25)
    assert np.isnan(service.logged[1]["loss"])


def test_an_error_is_shown_as_one(service, tmp_path):
    def fail():
        with MetricWriter(tmp_path, boards=[WeightsAndBiases()]):
            raise ValueError("left")

    with pytest.raises(ValueError, match="left"):
        fail()
    assert service.ended == [1]


def test_a_board_that_cannot_be_opened_closes_the_others(service, tmp_path, monkeypatch):
    """No key, no service: one line, and no run is left open."""

    def refuse(**asked):
        raise service.error("no API key: run `wandb login`")

    boards = [WeightsAndBiases(), WeightsAndBiases(name="second")]
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **a: refuse() if a["name"] else service.init(**a))
    with pytest.raises(UserError, match="Weights & Biases: no API key"):
        MetricWriter(tmp_path, boards=[SimpleNamespace(open=lambda folder, step: OpenOnce(service)), *boards])
    assert service.ended == [1]


class OpenOnce:
    """A board that notes that it was closed."""

    def __init__(self, service):
        self.service = service

    def close(self, *, failed):
        self.service.ended.append(int(failed))


@pytest.mark.parametrize("package", [None, ModuleType("wandb")])
def test_a_missing_package_is_one_line_before_anything_is_made(package, tmp_path, monkeypatch):
    """Not there, or a folder of that name, which offline runs leave behind."""
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(UserError, match=r"needs the package wandb: pip install 'palmette\[wandb\]'"):
        tiny(boards=[WeightsAndBiases()]).train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_package_itself_offline(tmp_path, monkeypatch):
    """The real package keeps the figures, by step, in the run's folder, twice with one id."""
    pytest.importorskip("wandb", reason="pip install 'palmette[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    boards = [WeightsAndBiases(project="p")]
    for steps in (2, 4):
        tiny(steps=steps, boards=boards).train(tmp_path / "run", operative=OPERATIVE)
    known = json.loads((tmp_path / "run" / ID).read_text())["id"]
    kept = sorted((tmp_path / "run").glob(f"wandb/offline-run-*-{known}/run-{known}.wandb"))
    assert len(kept) == 2
    rows = [row for path in kept for row in history(path)]
    losses = {row["_step"]: row["loss"] for row in rows if "loss" in row}
    assert losses == {step: figures["loss"] for step, figures in metrics(tmp_path / "run").items()}
    assert (tmp_path / "run" / FILE).exists()


def history(path):
    """The rows of an offline run's file: a LevelDB log of protocol buffers behind seven bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    block, header = 32768, 7
    held, at, record = path.read_bytes(), header, b""
    while at + header <= len(held):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = int.from_bytes(held[at + 4 : at + 6], "little"), held[at + 6]
        record += held[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # the whole of a record, or its end
            found, record = wandb_internal_pb2.Record.FromString(record), b""
            if found.WhichOneof("record_type") == "history":
                items = found.history.item
                yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
