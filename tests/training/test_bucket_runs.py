"""A run whose folder is in a bucket: what a local one has, there; gone on with, read, and refused where it must be."""

import json
import os
from pathlib import Path

import pytest
from google.cloud import storage
from running import devices, tiny

from checkpoints import lease
from checkpoints.folder import opened, place
from launch import cli
from partitioning import UserError
from training.metrics import FILE
from training.store import Store


@pytest.fixture
def folder(bucket, request):
    """A folder of its own in the bucket."""
    return f"{bucket}/{request.node.name}"


def names(folder):
    """What is in it, checkpoints aside."""
    prefix = folder.removeprefix("gs://tests/") + "/"
    found = {blob.name.removeprefix(prefix) for blob in storage.Client().list_blobs("tests", prefix=prefix)}
    return {name for name in found if not name.startswith("checkpoints/")}


def rows(out):
    """Figures by step; where the time went aside."""
    found = {}
    for line in (place(out) / FILE).read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {}).update({k: v for k, v in row.items() if not k.startswith("goodput/")})
    return found


def record(out, step):
    return json.loads((place(out) / "checkpoints" / str(step) / "metadata" / "metadata").read_text())


def test_a_run_in_a_bucket_has_what_a_local_one_has_and_goes_on(folder, tmp_path):
    with devices(1):
        tiny("clm").train(tmp_path / "run")
        tiny("clm", steps=2).train(folder)
        local = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*")}
        assert "hosts/0.json" in names(folder)
        # What was written after the checkpoint is no part of what goes on, in a bucket as elsewhere.
        blob = storage.Client().bucket("tests").blob(f"{folder.removeprefix('gs://tests/')}/{FILE}")
        blob.upload_from_string(blob.download_as_bytes() + b'{"step": 3, "loss": 1.0}\n{"st')
        tiny("clm").train(folder)
    assert rows(folder) == rows(tmp_path / "run")
    assert record(folder, 4)["leaves"] == record(tmp_path / "run", 4)["leaves"]
    boards = {name for name in names(folder) if "tfevents" in name}
    assert len(boards) == 2
    assert names(folder) - boards == {"metrics.jsonl", "environment.json", "hosts/0.json"} <= local
    assert len(json.loads((place(folder) / "environment.json").read_text())) == 2


def test_whatever_a_checkpoint_has_behind_it_is_in_the_bucket_before_it(folder, monkeypatch):
    seen, real = [], Store.save

    def save(self, state, *rest):
        seen.append((int(state.step), max(rows(folder))))
        real(self, state, *rest)

    monkeypatch.setattr(Store, "save", save)
    with devices(1):
        tiny("clm").train(folder)
    assert seen == [(2, 2), (4, 4)]


def test_what_ended_a_run_is_said_and_what_it_had_said_is_kept(folder):
    def end(run):
        (run.path / "a").write_text("1")
        raise RuntimeError("as a device does")

    with pytest.raises(RuntimeError, match="as a device does"), opened(folder, print) as run:
        end(run)
    assert names(folder) == {"a"}


def test_a_heartbeat_is_sent_at_once(folder):
    with opened(folder, print) as run:
        beat = run.path / "beat"
        beat.write_text("1")
        run.soon(beat)
        run._sent.result()
        assert names(folder) == {"beat", lease.FILE}


def test_nothing_is_written_by_a_process_that_lost_the_folder(folder):
    def lose(run):
        (run.path / "a").write_text("1")
        run.keep()
        assert names(folder) == {"a", lease.FILE}
        (run.path / "a").write_text("2")
        (run.path / "b").write_text("2")
        blob = storage.Client().bucket("tests").blob(f"{folder.removeprefix('gs://tests/')}/{lease.FILE}")
        blob.upload_from_string("process 1 on another\n")
        run.keep()

    with pytest.raises(UserError, match="another one took the folder over"), opened(folder, print) as run:
        lose(run)
    assert names(folder) == {"a", lease.FILE}
    assert (place(folder) / "a").read_text() == "1"


def test_files_are_sent_once_and_an_object_that_leaves_the_folder_is_refused(folder, monkeypatch):
    sent = []
    real = storage.Blob.upload_from_filename
    monkeypatch.setattr(
        storage.Blob, "upload_from_filename", lambda self, name: (sent.append(Path(name).name), real(self, name))
    )
    with opened(folder, print) as run:
        (run.path / "a").write_text("1")
        (run.path / "b.tmp").write_text("half")
        run.keep()
        run.keep()
        (run.path / "c").write_text("1")
    assert sent == ["a", "c"]
    with opened(folder, print) as run:
        assert {path.name for path in run.path.iterdir()} == {"a", "c"}
    assert sent == ["a", "c"]
    storage.Client().bucket("tests").blob(f"{folder.removeprefix('gs://tests/')}/../../x").upload_from_string("1")
    with pytest.raises(UserError, match="leaves the folder: remove it"), opened(folder, print):
        pass
    assert sent == ["a", "c"]
    # A folder that could not be read is let go.
    assert lease.FILE not in names(folder)


def test_a_bucket_that_is_not_there_is_one_line():
    words = r"gs://nowhere/run: the bucket cannot be reached or written to: 404"
    with pytest.raises(UserError, match=words), opened("gs://nowhere/run", print):
        pass


def palmette(*words):
    """Its exit status."""
    with pytest.raises(SystemExit) as done:
        cli.main(list(words))
    return done.value.code


def test_the_command_trains_into_a_bucket_and_reads_from_there(folder, tmp_path, monkeypatch, capsys):
    from benchmarks.several import JUDGED

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.gin").write_text(JUDGED)
    with devices(1):
        assert palmette("train", "run.gin", "Run.steps = 4", "--out", folder) == 0
        assert {"config.gin", "metrics.jsonl", "environment.json"} <= names(folder)
        for words in (
            ["evaluate", folder],
            ["checkpoints", "list", folder],
            ["checkpoints", "verify", folder],
            ["checkpoints", "average", folder, "--out", "mean"],
            ["fill", folder, "foxes [MASK] over"],
            ["report", folder],
            ["train", "run.gin", "Run.steps = 6", f"Run.init_from = '{folder}'", "--out", "further"],
        ):
            capsys.readouterr()
            status = palmette(*words)
            said, wrong = capsys.readouterr()
            assert status == 0, wrong
            if words[0] == "evaluate":
                assert f"{folder}: checkpoint of step 4" in said
            if words[:2] == ["checkpoints", "list"]:
                assert said.split()[0] == "4"
    assert "report.html" in names(folder)
    assert not os.path.exists("gs:")
    assert palmette("train", "run.gin", "--out", "s3://x/y") == 2
    assert "s3://x/y: expected a local folder or gs://BUCKET/FOLDER" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_in_a_bucket_is_gone_on_with_and_exported(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PALMETTE_CACHE", str(tmp_path / "cache"))
    small = ["Run.batch_size = 8", "Run.length = 32", "Run.evaluators = []", "Run.steps = 2"]
    with devices(1):
        for words in (
            ["prepare", "configs/llama.gin"],
            ["train", "configs/llama.gin", *small, "--out", folder],
            ["generate", folder, "def ", "--tokens", "3"],
            ["export", folder, "--out", "hub"],
        ):
            status = palmette(*words)
            assert status == 0, capsys.readouterr().err
    assert (tmp_path / "hub" / "model.safetensors").is_file()
