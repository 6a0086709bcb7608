"""The command: what it prints, with which status it exits, and that nothing is written when it refuses."""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.cache import Cache
from launch import cli, ours
from launch.methods import methods

ROOT = Path(__file__).resolve().parents[2]
HEADER = "from __gin__ import dynamic_registration\nimport training\nimport workshop\n"
ENOUGH = HEADER + "training.Run.steps = 5\ntraining.Run.objective = @workshop.Hide()\n"


@pytest.fixture
def house(workshop, monkeypatch, tmp_path):
    """A working folder with a configuration, and a training.Run that notes what the command asks of it."""
    import training

    asked = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Run(workshop.Run):
        """The top object."""

        def train(self, *, out, copy, operative, debug, watch):
            """Note the call."""
            asked.append((self, out, operative, debug, watch))

        def describe(self):
            """Note the call."""
            asked.append("described")

        def evaluate(self, out):
            """Note the call."""
            asked.append((self, out))
            return {"bits": 2.5, "load": np.asarray([0.25, 0.75]), "none": math.nan}

        def prepare(self, *, overwrite, processes, report):
            """Note the call."""
            asked.append((overwrite, processes))
            report("there: prepared")

    Run.__module__ = "training"
    Run.__qualname__ = "Run"
    monkeypatch.setattr(training, "Run", Run, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gin").write_text(ENOUGH)
    return asked


def palmette(*arguments):
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments])
    return done.value.code


def trusted(*arguments):
    return palmette(*arguments, "--allow-import", "workshop")


def test_train(house, tmp_path):
    assert trusted("train", "x.gin", "Hide.rate = 0.4", "--out", "runs/a", "--debug") == 0
    run, out, operative, debug, watch = house[0]
    assert (run.objective.rate, out, debug) == (0.4, Path("runs/a"), True)
    assert "workshop.Hide.rate = 0.4" in operative
    assert (watch.first, watch.last, watch.dump) == (None, None, False)
    assert trusted("train", "x.gin", "--profile", "10:15", "--dump") == 0
    assert (house[1][4].first, house[1][4].last, house[1][4].dump) == (10, 15, True)
    assert house[1][1] == Path("runs/x")
    assert house[1][3] is False


def test_dry_run_trains_nothing(house, tmp_path):
    assert trusted("train", "x.gin", "--dry-run", "--out", "a") == 0
    assert house == ["described"]
    assert os.listdir(tmp_path) == ["x.gin"]


def test_prepare(house, monkeypatch, capsys):
    import data

    def note(task, folder=None, *, overwrite=False, processes=1, report=print):
        house.append((task, folder, overwrite, processes))
        return f"in {task}"

    monkeypatch.setattr(data, "prepare", note, raising=False)
    assert palmette("prepare", "python_docs", "text.txt", "--folder", "there", "--overwrite", "--processes", "2") == 0
    assert house == [("python_docs", "there", True, 2), ("text.txt", "there", True, 2)]
    assert capsys.readouterr().out == "in python_docs\nin text.txt\n"


def test_prepare_into_a_bucket(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("\n\n".join(f"note {i} says nothing that {i * 7} would not" for i in range(200)))
    assert palmette("prepare", "notes.txt", "--folder", f"{bucket}/prepared") == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    assert folder.startswith(f"{bucket}/prepared/notes-")
    assert Cache(folder).split("train").examples == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_prepare_what_a_configuration_reads(house, tmp_path, capsys):
    # Not built abstractly, as that may need the data: so a model's bindings are not counted as unused either.
    (tmp_path / "x.gin").write_text(ENOUGH + "training.Run.model = @workshop.Trunk\nworkshop.Trunk.layers = 1\n")
    assert trusted("prepare", "x.gin") == 0
    assert house == [(False, 1)]
    assert capsys.readouterr().out == "there: prepared\n"


def test_evaluate_reads_the_saved_configuration(house, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert trusted("evaluate", "run") == 2
    assert "run: no config.gin in it" in capsys.readouterr().err
    trusted("train", "x.gin", "Hide.rate = 0.4")
    (tmp_path / "run" / "config.gin").write_text(house[0][2])
    assert trusted("evaluate", "run", "--json", "figures.json") == 0
    assert house[1] == (house[0][0], Path("run"))
    assert json.loads(Path("figures.json").read_text()) == {"bits": 2.5, "load": [0.25, 0.75], "none": "nan"}
    assert trusted("evaluate", "run", "--json", "nowhere/figures.json") == 2
    assert "nowhere/figures.json: cannot be written: No such file or directory" in capsys.readouterr().err


def test_config_prints_a_configuration_that_resolves_again(house, tmp_path, capsys):
    assert trusted("config", "x.gin", "Hide.rate = 0.4") == 0
    printed = capsys.readouterr().out
    assert "workshop.Hide.rate = 0.4" in printed
    assert "# workshop.Hide.span" in printed
    assert "a whole number of at least 1" in printed
    (tmp_path / "y.gin").write_text(printed)
    assert trusted("config", "y.gin") == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("train", "x.gin", "Hide.rate = 1.7"),
            "override 'Hide.rate = 1.7': workshop.Hide.rate = 1.7: expected a",
        ),
        (("train", "x.gin", "Hide.rte = 1"), "nearest: rate"),
        (("train", "x.gin", "--out", "x.gin"), "--out x.gin: x.gin is a file, expected a folder"),
        (("train", "x.gin", "--out", "x.gin/deeper"), "x.gin is a file"),
        (("train", "y.gin"), "y.gin: no such file; nearest: x.gin"),
        (("train", "Hide.rate = 1"), "no configuration given: expected a file that ends in .gin"),
        (("train", "x.gin", "runs"), "'runs': expected a file that ends in .gin, or an override"),
        (("train",), "Missing argument"),
        (
            ("train", "x.gin", "--profile", "15:10"),
            "--profile 15:10: expected the first and the last step, such as 10:15",
        ),
        (("train", "x.gin", "--dump", "--debug"), "--dump writes a compiled step, and --debug compiles none"),
        (("train", "x.gin", "--dry"), "No such option: --dry"),
        (("tarin", "x.gin"), "No such command 'tarin'"),
        (("evaluate", "nowhere"), "nowhere: no config.gin in it"),
        (("fill", "nowhere", "no mask"), "'no mask': nothing to fill, expected [MASK] in it"),
        (("prepare", "x.gin", "--folder", "f"), "--folder goes with tasks by name"),
    ],
)
def test_refusals_are_one_line_and_status_2(house, tmp_path, capsys, arguments, words):
    assert trusted(*arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("palmette: ")
    assert told.err.count("\n") == 1
    assert words in told.err
    assert not told.out
    assert os.listdir(tmp_path) == ["x.gin"]
    assert not house


def test_imports_need_trust(house, capsys):
    assert palmette("train", "x.gin") == 2
    assert "x.gin:3: imports workshop, which a configuration may not: pass --allow-import workshop" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/log"), 2, "palmette: runs/x/log: No space left"),
        (SystemExit(0), 0, ""),
    ],
)
def test_exits(house, monkeypatch, capsys, raised, status, words):
    import training

    def fail(self, **_):
        raise raised

    monkeypatch.setattr(training.Run, "train", fail)
    assert trusted("train", "x.gin") == status
    assert capsys.readouterr().err.startswith(words)


def test_our_own_mistakes_keep_their_traceback(house, monkeypatch):
    import training

    monkeypatch.setattr(training.Run, "train", lambda self, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "x.gin", "--allow-import", "workshop"])


def process(*command, **environment):
    path = os.pathsep.join([*environment.pop("before", ()), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd="/")


HEAVY = ("jax", "flax", "optax", "orbax", "tensorflow", "gin", "numpy", "torch")


def test_help_imports_nothing_heavy():
    code = (
        "import atexit, json, sys\n"
        "from launch import cli\n"
        f"atexit.register(lambda: print('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules])))\n"
        "cli.main(['--help'])"
    )
    done = process("-c", code)
    assert done.returncode == 0, done.stderr
    for verb in ("prepare", "train", "evaluate", "fill", "config", "methods"):
        assert verb in done.stdout
    assert json.loads(done.stdout.strip().splitlines()[-1]) == []


def test_a_refusal_in_a_process(tmp_path):
    (tmp_path / "bad.gin").write_text("training.Run.steps = = 3\n")
    done = process("-m", "launch.cli", "train", str(tmp_path / "bad.gin"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"palmette: {tmp_path / 'bad.gin'}:1: expected a value after `=`: a number, a string in " + (
        "quotes, a list, @class or %macro\n"
    )


@pytest.mark.parametrize("name", ["data", "partitioning"])
@pytest.mark.parametrize("kind", ["package", "file"])
def test_a_package_in_our_place_is_named(tmp_path, name, kind):
    if kind == "package":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    else:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    found = tmp_path / (name if kind == "package" else f"{name}.py")
    done = process("-m", "launch.cli", "methods", before=[str(tmp_path)])
    assert done.returncode == 2
    assert done.stderr.startswith(f"palmette: {found} takes the place of this project's package {name} ")
    assert done.stderr.count("\n") == 1


def test_our_packages_are_ours():
    assert ours.foreign() is None


def test_methods(tmp_path, capsys):
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "one.py").write_text(
        'import no_such_library\n\n\nclass Hide:\n    """Hides\n    tokens.\n\n    Source: "A", B et al.,\n    2019.\n'
        '    Differs: nothing known.\n    """\n\n\nclass Other:\n    """No method."""\n\n\nclass _Own:\n    """Own.\n\n'
        '    Source: x.\n    """\n'
    )
    found = methods(tmp_path)
    assert [(m.name, m.sentence, m.source) for m in found] == [
        ("objectives.Hide", "Hides tokens.", '"A", B et al., 2019.')
    ]
    assert palmette("methods") == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(methods())
