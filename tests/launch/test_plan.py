"""`palmette plan`: real plans for chips that are not here, each in a process of its own, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli

ROOT = Path(__file__).resolve().parents[2]
PODS = sorted((ROOT / "configs" / "pods").glob("*.gin"))


def palmette(*arguments):
    """The command in a process of its own: libtpu refuses XLA's flags for CPUs."""
    return subprocess.run(
        [sys.executable, "-c", "from launch.cli import main; main()", "plan", *map(str, arguments)],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_small_run_is_planned_and_said_twice(small, tmp_path):
    run = palmette(small, "--topology", "v5e:2x2", "--json", tmp_path / "plan.json")
    assert (run.returncode, run.stderr) == (0, "")
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    # Every leaf is cut over the four chips, four bytes a number; two moments each, and counters.
    (parameters,) = found["parameters"].values()
    assert found["memory"]["params"] == parameters
    assert 2 * parameters < found["memory"]["optimizer"] < 2 * parameters + 64
    assert found["mesh"] == {"fsdp": 4}
    assert found["fits"]
    assert found["used"] == sum(found["memory"].values()) < found["capacity"]
    # Causal attention on four chips of 197 TFLOP/s, computed whole.
    assert found["executed_flops"] == pytest.approx(found["model_flops"] + found["masked_flops"])
    assert found["roofline"]["compute"] == pytest.approx(found["executed_flops"] / 4 / 197e12)
    assert {axis for one in found["sent"] for axis in one["axes"].split(" + ")} == {"fsdp"}
    assert {one["network"] for one in found["sent"]} == {"ICI"}
    for words in ("4 chips, mesh fsdp 4", "memory of a chip", "least time of a step", "<- binds", "compiled in"):
        assert words in run.stdout


@pytest.mark.long
def test_between_slices_only_gradients_go(small, tmp_path):
    """What crosses is summed, no more than the gradients in float32 and some numbers to report."""
    run = palmette(small, "--topology", "v5e:2x2", "--slices", 2, "--json", tmp_path / "plan.json")
    assert run.returncode == 0, run.stderr
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    across = [one for one in found["sent"] if one["network"] == "DCN"]
    assert {one["kind"] for one in across} == {"all-reduce"}
    gradients = found["memory"]["params"]
    assert 0.5 * gradients <= sum(one["bytes"] for one in across) < 1.5 * gradients
    assert found["roofline"]["dcn"] > 0


@pytest.mark.long
def test_linear_layers_pass_states_and_no_tokens(small, tmp_path):
    """What is gathered along cut rows does not grow with them; of softmax layers it does."""
    path, gathered = tmp_path / "rows.gin", {}
    cut = small.read_text().replace(
        "@partitioning.fsdp()", "@partitioning.fsdp_sequence()\npartitioning.fsdp_sequence.sequence = 2"
    )
    for kind in ("LightningAttention", "Attention"):
        more = "models.LightningAttention.layers = 2\n" if kind == "LightningAttention" else ""
        path.write_text(cut.replace("models.Attention", f"models.{kind}") + more)
        for length in (1024, 2048):
            run = palmette(path, f"Run.length = {length}", "--topology", "v5e:2x2", "--json", tmp_path / "plan.json")
            assert run.returncode == 0, run.stderr
            (found,) = json.loads((tmp_path / "plan.json").read_text())
            gathered[kind, length] = sum(
                one["bytes"] for one in found["sent"] if (one["kind"], one["axes"]) == ("all-gather", "sequence")
            )
    assert gathered["LightningAttention", 2048] == gathered["LightningAttention", 1024] > 0
    assert gathered["Attention", 2048] > 1.5 * gathered["Attention", 1024]


@pytest.mark.long
def test_what_does_not_fit_says_why_and_what_would(small):
    big = ("Trunk.width = 1024", "Attention.heads = 8", "Run.batch_size = 256", "Run.length = 1024", "Trunk.layers = 4")
    run = palmette(small, *big, "--topology", "v5e:2x2")
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert re.search(
        r"^palmette: v5e:2x2: a step needs [\d.]+ GiB a chip and there are 16.00 GiB; the largest term is temp", line
    )
    assert "what fits: " in line
    assert "none of" not in line


@pytest.mark.long
def test_search_ranks_by_the_least_time(small, tmp_path):
    run = palmette(small, "--topology", "v5e:2x2", "--search", "--most", 3, "--json", tmp_path / "plan.json")
    assert run.returncode == 0, run.stderr
    times = [one["roofline"]["step"] for one in json.loads((tmp_path / "plan.json").read_text())]
    assert len(times) == 3
    assert times == sorted(times)


@pytest.mark.long
def test_search_shares_out_experts_where_there_are_some(small, tmp_path):
    small.write_text(
        small.read_text()
        + "models.Trunk.feed_forward = @models.Experts\nmodels.Experts.experts = 4\nmodels.Experts.hidden = 128\n"
    )
    run = palmette(small, "--topology", "v5e:2x2", "--search", "--most", 4, "--json", tmp_path / "plan.json")
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    (shared,) = [one for one in found if "partitioning.fsdp_expert.expert = 2" in one["overrides"]]
    assert shared["mesh"] == {"fsdp": 2, "expert": 2}
    assert "ragged-all-to-all" in {one["kind"] for one in shared["sent"] if one["axes"] == "expert"}


@pytest.mark.long
@pytest.mark.parametrize("path", PODS, ids=lambda path: f"pod-{path.stem}")
def test_a_pod_config_fits_where_its_header_says(path, tmp_path):
    where, used = re.search(r"^# Topology: (\S+)\. ([\d.]+) GiB", path.read_text(), re.MULTILINE).groups()
    run = palmette(path, "--topology", where, "--json", tmp_path / "plan.json")
    assert run.returncode == 0, run.stderr
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    assert found["used"] / 2**30 == pytest.approx(float(used), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x.gin", "--topology", "v5p:8x8"], "topology 'v5p:8x8' is unknown: use a chip and a shape"),
        (["--topology", "v5e:2x2"], "no configuration given|Missing argument"),
        (["x.gin"], "Missing option '--topology'"),
        (["x.gin", "--topology", "v5e:2x2", "--slices", "0"], "--slices"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["plan", *arguments])
    error = capsys.readouterr().err
    assert done.value.code == 2
    assert re.search(says, error)
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("fsdp_tensor.tensor = 3", "4 devices cannot be divided by the mesh sizes"),
        ("fsdp_tensor.tensor = 4", "axis 'heads' of size 2 does not divide over tensor = 4 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_chips_is_refused(small, override, says):
    run = palmette(small, "Run.rules = @partitioning.fsdp_tensor()", override, "--topology", "v5e:2x2")
    assert run.returncode == 2
    assert says in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_described_data_plan_and_do_not_train(small, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["train", str(small), "--out", str(tmp_path / "run")])
    assert done.value.code == 2
    assert "describes its data and has none to read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.json"))
