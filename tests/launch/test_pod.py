"""The pod verbs against a `gcloud` that notes what it is asked: which commands, in which order, and that money is asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
from launch.tpu_vm.pod import Pod
from launch.tpu_vm.verbs import _pack, pods

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "launch" / "tpu_vm" / "example.toml"
QUEUED = ["compute", "tpus", "queued-resources"]

# Notes its arguments, prints the next of the states or the log, and fails where it is told to.
STUB = """#!{python} -S
import json, os, sys
from pathlib import Path
here = Path(__file__).parent
with (here / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
verb = sys.argv[4]
if verb == os.environ.get("FAILS"):
    sys.stderr.write("ERROR: (gcloud) Quota 'TPUS' exceeded\\n")
    sys.exit(1)
answers = here / ("states" if verb == "describe" else "logs")
if verb == "describe" or "--worker=0" in sys.argv:
    first, *rest = answers.read_text().split("|")
    print(first)
    answers.write_text("|".join(rest or [first]))
"""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Puts the stub on PATH; returns a function to the calls so far, without the zone."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    stub = tmp_path / "gcloud"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    (tmp_path / "states").write_text("ACTIVE")
    (tmp_path / "logs").write_text("step 1")

    def calls():
        lines = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        found = [json.loads(line) for line in lines]
        assert all(call[:3] == QUEUED and call[-1] == "--zone=us-east5-a" for call in found)
        return [call[3:-1] for call in found]

    return calls


def pod(*arguments, answer=None):
    """The verb's exit status and what it printed."""
    done = CliRunner().invoke(pods, [arguments[0], str(EXAMPLE), *arguments[1:]], input=answer)
    return done.exit_code, done.output, done.exception


CREATE = [
    "create", "palmette", "--accelerator-type=v5p-512", "--runtime-version=v2-alpha-tpuv5", "--node-count=2",
    "--node-prefix=palmette", "--spot", "--async",
]  # fmt: skip
DESCRIBE = ["describe", "palmette", "--format=value(state.state)"]
DELETE = ["delete", "palmette", "--force", "--quiet"]
EVERYWHERE = ["--node=all", "--worker=all"]


@pytest.mark.parametrize(("verb", "call"), [("create", CREATE), ("resume", None), ("delete", DELETE)])
def test_what_costs_or_deletes_asks(gcloud, verb, call):
    """No answer and 'no' call nothing."""
    for answer in (None, "n\n"):
        status, said, _ = pod(verb, answer=answer)
        assert status == 1
        assert "2 x v5p-512 (spot) in us-east5-a" in said
        assert ("billed" in said) == (verb != "delete")
        assert gcloud() == []
    if call is not None:
        assert pod(verb, answer="y\n")[0] == 0
        assert pod(verb, "--yes")[0] == 0
        assert gcloud() == [call, call]


@pytest.mark.parametrize("verb", ["create", "sync", "run", "watch", "resume", "delete"])
def test_a_dry_run_prints_and_calls_nothing(gcloud, verb):
    status, said, _ = pod(verb, "--dry-run")
    assert status == 0
    assert "gcloud compute tpus queued-resources" in said
    assert gcloud() == []


def test_sync_and_run_reach_every_worker(gcloud):
    assert pod("sync")[0] == 0
    assert pod("run")[0] == 0
    copy, install, start = gcloud()
    assert copy[0] == "scp"
    assert copy[2:] == ["palmette:palmette.tar.gz", *EVERYWHERE]
    assert install[:4] == start[:4] == ["ssh", "palmette", *EVERYWHERE]
    assert "-e '.[tpu,gcs]'" in install[4]


def test_one_slice_is_one_node():
    named = Pod(name="a", zone="z", type="v6e-256", runtime="r", run=["x.gin"], project="p")
    words = named.create()
    assert "--node-id=a" in words
    assert "--project=p" in words
    assert not any(word.startswith("--node-count") for word in words)


def test_watch_ends_with_the_run(gcloud, tmp_path):
    """Waits for the chips, shows the log when it moves, and hands the run's status on."""
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES|WAITING_FOR_RESOURCES|ACTIVE")
    (tmp_path / "logs").write_text("step 1|step 1|step 2\nexit 2")
    status, said, _ = pod("watch", "--every", "0.01")
    assert status == 2
    assert said.splitlines() == ["WAITING_FOR_RESOURCES", "ACTIVE", "step 1", "ACTIVE", "step 2", "exit 2"]


def test_watch_tells_of_a_preemption(gcloud, tmp_path):
    (tmp_path / "states").write_text("ACTIVE|SUSPENDED")
    status, said, _ = pod("watch", "--every", "0.01")
    assert status == 75
    assert said.splitlines()[-1] == f"SUSPENDED: palmette pod resume {EXAMPLE}"


def test_resume_brings_back_what_was_taken_away(gcloud, tmp_path):
    """Deleted, asked for again, waited for, copied to and started, in this order."""
    (tmp_path / "states").write_text("SUSPENDED|PROVISIONING|ACTIVE")
    assert pod("resume", "--yes", "--every", "0.01")[0] == 0
    assert [call[0] for call in gcloud()] == [
        "describe",
        "delete",
        "create",
        "describe",
        "describe",
        "scp",
        "ssh",
        "ssh",
    ]
    assert gcloud()[1:3] == [DELETE, CREATE]
    assert gcloud()[0] == DESCRIBE


def test_resume_of_chips_that_are_there_asks_for_none(gcloud):
    assert pod("resume", "--yes", "--every", "0.01")[0] == 0
    assert [call[0] for call in gcloud()] == ["describe", "describe", "scp", "ssh", "ssh"]


def test_a_failure_is_one_line(gcloud, monkeypatch, capsys):
    """Of a command whose output is on the screen, and of one that was asked."""
    monkeypatch.setenv("FAILS", "describe")
    with pytest.raises(SystemExit) as done:
        cli.main(["pod", "watch", str(EXAMPLE)])
    assert done.value.code == 2
    assert capsys.readouterr().err == (
        "palmette: `gcloud compute tpus queued-resources describe palmette ...` ended with status 1: ERROR: (gcloud) "
        "Quota 'TPUS' exceeded\n"
    )
    monkeypatch.setenv("FAILS", "create")
    assert "ended with status 1: see above" in str(pod("create", "--yes")[2])


def test_no_gcloud_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "gcloud is not on PATH: install the Google Cloud CLI" in str(pod("create", "--yes")[2])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the key 'name' is missing"),
        ("name = 3", "name = 3: expected a string"),
        ("nmae = 'a'", "unknown key 'nmae': expected one of name, zone"),
        ("name = ", "no TOML"),
        ("slices = 0", "slices = 0: expected a whole number in [1, 4096]"),
        (None, "No such file or directory: expected a file as launch/tpu_vm/example.toml"),
    ],
)
def test_a_file_that_says_no_pod_is_refused(tmp_path, text, says):
    path = tmp_path / "pod.toml"
    if text is not None:
        rest = EXAMPLE.read_text() if "slices" in text else ""
        path.write_text(re.sub(r"slices = 2 .*", text, rest) if rest else text)
    with pytest.raises(Exception, match=re.escape(says)) as raised:
        Pod.read(path)
    assert str(raised.value).startswith(str(path))


def worker(home):
    """A worker's home with a `palmette` that prints its words and fails."""
    fake = home / "palmette" / ".venv" / "bin" / "palmette"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\nprintf "<%s>\\n" "$@"\nsleep 1\nexit 3\n')
    fake.chmod(0o755)

    def shell(script):
        return subprocess.run(
            ["bash", "-c", script], cwd=home, env=os.environ | {"HOME": str(home)}, capture_output=True, text=True
        )

    return shell


def test_the_start_script_on_a_worker(tmp_path):
    """It returns at once, hands every word on as it is, refuses a second run, and leaves the status behind."""
    shell = worker(tmp_path)
    start = Pod.read(EXAMPLE).start()
    script = next(word for word in start if word.startswith("--command=")).removeprefix("--command=")
    assert shell(script).returncode == 0
    again = shell(script)
    assert (again.returncode, again.stderr) == (1, "a run is going here\n")
    subprocess.run(["tail", "--pid", (tmp_path / "palmette.pid").read_text().strip(), "-f", "/dev/null"], timeout=20)
    log = (tmp_path / "palmette.log").read_text().splitlines()
    words = tomllib.loads(EXAMPLE.read_text())["run"]
    assert log == ["starting", "<train>", *(f"<{word}>" for word in words), "<--cluster>", "exit 3"]
    assert shell(script).returncode == 0


def test_what_is_copied_installs(tmp_path):
    """All packages of the wheel and what installs them, and no caches."""
    _pack(tmp_path / "x.tar.gz")
    with tarfile.open(tmp_path / "x.tar.gz") as archive:
        names = archive.getnames()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {name.split("/")[0] for name in names} == {*wanted["only-include"], "pyproject.toml", "README.md"}
    assert not any("__pycache__" in name for name in names)


def test_the_image_has_every_package():
    """What the Dockerfile copies is there, and is what the wheel has and needs."""
    lines = (ROOT / "launch" / "tpu_vm" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert sorted(copied) == sorted([*wheel, "pyproject.toml", project["project"]["readme"]])
