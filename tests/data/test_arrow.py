"""Parquet, folders that `datasets` saved and BEIR folders give the records of the same data as JSON lines."""

import json

import pyarrow as pa
import pyarrow.parquet as arrow
import pytest

import data
from data.sources import JsonLines
from partitioning.errors import UserError

ROWS = [{"text": f"row {i} é", "list": [f"a{i}", "b"], "score": i / 4, "n": i} for i in range(2500)]
FIELDS = {"query": "text", "candidates": "list", "relevance": "score", "number": "n"}


def parquet(file, rows=ROWS):
    arrow.write_table(pa.Table.from_pylist(rows), file, row_group_size=700)
    return file


def saved(folder, rows=ROWS, shards=2):
    """A folder as `datasets.Dataset.save_to_disk` lays it out: IPC streams, named by state.json."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        part = table.slice(i * len(rows) // shards, (i + 1) * len(rows) // shards - i * len(rows) // shards)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=1100)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], "_split": None}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("fields", [None, FIELDS])
def test_every_format_gives_the_same_records(fields, tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    wanted = list(JsonLines(str(lines), fields=fields))
    assert list(data.Parquet(str(parquet(tmp_path / "rows.parquet")), fields=fields)) == wanted
    assert list(data.SavedDataset(str(saved(tmp_path / "saved")), fields=fields)) == wanted


def test_a_folder_of_parquet_is_read_in_order(tmp_path):
    for i in (1, 0, 2):
        parquet(tmp_path / f"{i}.parquet", ROWS[i * 10 : (i + 1) * 10])
    assert [r["text"] for r in data.Parquet(str(tmp_path))] == [r["text"] for r in ROWS[:30]]


def test_a_path_is_a_task_by_what_lies_there(tmp_path):
    parquet(tmp_path / "rows.parquet")
    task = data.text_task(str(tmp_path / "rows.parquet"))
    parts = [[r["text"] for r in task.splits()[split]] for split in ("train", "validation", "test")]
    assert sorted(text for part in parts for text in part) == sorted(r["text"] for r in ROWS)
    (tmp_path / "parts").mkdir()
    for name, rows in (("train", ROWS[:40]), ("validation", ROWS[40:60]), ("other", ROWS[60:70])):
        saved(tmp_path / "parts" / name, rows)
    (tmp_path / "parts" / "dataset_dict.json").write_text('{"splits": ["train", "validation", "other"]}')
    folder = data.prepare(str(tmp_path / "parts"), str(tmp_path / "cache"))
    splits = data.Cache(folder).manifest["splits"]
    assert {name: entry["examples"] for name, entry in splits.items()} == {"train": 40, "validation": 20}


def test_a_beir_folder_is_pairs(tmp_path):
    corpus = {"d1": "first", "d2": "second", "d3": "third"}
    judged = {"q1": {"d1": 1, "d3": 2}, "q2": {"d2": 1}}
    data.Retrieval({"q1": "one?", "q2": "two?"}, corpus, judged).save(tmp_path / "beir", "train")
    pairs = [("one?", "first"), ("one?", "third"), ("two?", "second")]
    assert [(r["query"], r["positive"]) for r in data.JudgedPairs(str(tmp_path / "beir"))] == pairs
    (tmp_path / "beir" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\nq1\td2\t0\n")
    task = data.text_task(str(tmp_path / "beir"))
    assert [len(list(source)) for source in task.splits().values()] == [3, 1]
    reader = data.Cached(task=task, folder=str(tmp_path), epochs=1)
    reader.prepare()
    assert "positive/tokens" in reader.open().spec(batch_size=2, length=8)
    with (tmp_path / "beir" / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d4", "title": "Fourth", "text": "text"}\n')
    assert data.Retrieval.load(tmp_path / "beir", "train").corpus["d4"] == "Fourth\ntext"


def wrong(tmp_path):
    """Each wrong input, and what is said of it."""
    whole = parquet(tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-500])
    (tmp_path / "not.parquet").write_text("not parquet")
    parquet(tmp_path / "null.parquet", [{"text": "a"}, {"text": None}])
    arrow.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    middle = bytearray(whole.read_bytes())
    middle[300:900] = bytes(600)
    (tmp_path / "damaged.parquet").write_bytes(middle)
    short = saved(tmp_path / "short")
    second = short / "data-00001-of-00002.arrow"
    second.write_bytes(second.read_bytes()[:4000])
    gone = saved(tmp_path / "gone")
    (gone / "data-00000-of-00002.arrow").unlink()
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["one", "two"]}')
    at = lambda name: str(tmp_path / name)
    return {
        r"whole.parquet: no column 'body'; there is text, list, score, n": data.Parquet(at("whole.parquet"), "body"),
        r"cut.parquet: cannot be read, broken or cut short: ": data.Parquet(at("cut.parquet")),
        r"not.parquet: cannot be read, broken or cut short: ": data.Parquet(at("not.parquet")),
        r"damaged.parquet: cannot be read, broken or cut short: ": data.Parquet(at("damaged.parquet")),
        r"null.parquet, row 1: field 'text' holds NoneType": data.Parquet(at("null.parquet")),
        r"empty.parquet: empty: there is no record": data.Parquet(at("empty.parquet")),
        r"short/data-00001-of-00002.arrow: cannot be read, broken or cut short: ": data.SavedDataset(at("short")),
        r"gone/data-00000-of-00002.arrow: cannot be read, broken or cut short: ": data.SavedDataset(at("gone")),
        r"dict: no split 'three'; there is one, two": data.SavedDataset(at("dict"), split="three"),
        r"dict/one/state.json: missing: not a folder that datasets": data.SavedDataset(at("dict"), split="one"),
        r"saved-nowhere: no such file or folder": data.SavedDataset(at("saved-nowhere")),
    }


def test_what_is_wrong_is_one_line_and_nothing_is_written(tmp_path):
    root = tmp_path / "cache"
    for message, source in wrong(tmp_path).items():
        with pytest.raises(UserError, match=message) as error:
            data.prepare(data.Task(name="t", train=source), str(root))
        assert "\n" not in str(error.value)
        assert not root.exists() or not list(root.iterdir())
