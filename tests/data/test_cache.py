"""The cache gives back what was put in, is whole or not there, and says what is wrong with it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import data
from data import cache, cache_writing, tasks
from data.columns import MemorySplit, Tokenized, reordered
from data.sources import InMemory
from partitioning.errors import UserError

ROOT = Path(__file__).parents[2]
TEXTS = tuple({"text": f"document {i} of {i * 7919}: " + "word and other " * (i % 17)} for i in range(500))
MIXED = tuple(
    {
        "query": f"q{i}",
        "candidates": [f"c{i}.{j}" for j in range(i % 5)] if i else ["a"],
        "relevance": [1.0] * (i % 3) if i else [2.0],
        "score": i / 4,
    }
    for i in range(60)
)
PIECES = data.SentencePiece(vocabulary=330)


def task(train=TEXTS, **options):
    return data.Task(**{"name": "small", "train": InMemory(train), "validation": InMemory(train[:20]), **options})


def everything(split):
    """The examples of a split as Python values, in a canonical order."""
    columns = []
    for name, kind in sorted(split.kinds.items()):
        bounds = split.bounds(name)
        if kind == "texts":
            inner = split.inner(name)
            values = split.values(name, 0, int(inner[-1]))
            items = [tuple(values[a:b].tolist()) for a, b in itertools.pairwise(inner)]
        else:
            items = split.values(name, 0, int(bounds[-1])).tolist()
        columns.append([tuple(items[a:b]) for a, b in itertools.pairwise(bounds)])
    return sorted(zip(*columns, strict=True))


@pytest.mark.parametrize(("records", "tokenizer"), [(TEXTS, data.Bytes()), (TEXTS, PIECES), (MIXED, data.Bytes())])
def test_columns_come_back_aligned(records, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writing, "CHUNK", 64)  # many chunks, cut inside examples
    monkeypatch.setattr(cache_writing, "reordered", partial(reordered, group=200))
    folder = data.prepare(task(records, tokenizer=tokenizer), str(tmp_path))
    opened = cache.Cache(folder)
    held = Tokenized(opened.tokenizer, "held")
    held.add(records)
    assert everything(opened.split("train")) == everything(MemorySplit(held.columns()))
    assert opened.manifest["splits"]["train"]["text_bytes"] == held.bytes
    split = opened.split("train")
    for name in (name for name, kind in split.kinds.items() if kind in ("text", "texts")):
        counts = np.bincount(
            split.values(name, 0, len(held.columns()[name].values)), minlength=held.tokenizer.vocabulary
        )
        assert (counts > 0).sum() > 5
        np.testing.assert_array_equal(split.counts(name, held.tokenizer.vocabulary), counts)


def test_the_order_is_shuffled_and_fixed(tmp_path):
    folders = [data.prepare(task(), str(tmp_path / name)) for name in "ab"]
    one, other = (cache.Cache(folder) for folder in folders)
    assert one.manifest == other.manifest
    bounds = one.split("train").bounds("text")
    np.testing.assert_array_equal(bounds, other.split("train").bounds("text"))
    assert (np.diff(bounds) != [len(r["text"]) for r in TEXTS]).any()


def test_a_cached_epoch_is_the_corpus(tmp_path):
    cached = data.Cached(task=task(), folder=str(tmp_path), tokenizer=PIECES, begin=None, end="eos", epochs=1)
    cached.prepare()
    reader = cached.open()
    steps = -(-reader.rows(length=32) // 8)
    got = np.concatenate([reader.batch(s, batch_size=8, length=32, seed=0)["tokens"].ravel() for s in range(steps)])
    wanted = np.concatenate([reader.tokenizer.encode(r["text"]) for r in TEXTS])
    got, ends = got[got != 0], (got == reader.specials.eos).sum()
    np.testing.assert_allclose(
        reader.frequencies(), np.bincount(got, minlength=reader.vocabulary) / len(got), rtol=1e-12
    )
    assert ends == len(TEXTS)
    np.testing.assert_array_equal(np.sort(got[got != reader.specials.eos]), np.sort(wanted))
    assert reader.identity()["content"] == cache.read_manifest(task(tokenizer=PIECES).folder(str(tmp_path)))["content"]
    json.dumps(reader.identity())


def test_a_second_prepare_reuses_and_another_text_is_refused(tmp_path):
    root = str(tmp_path)
    folder = data.prepare(task(), root)
    before = Path(folder, cache.MANIFEST).stat().st_mtime_ns
    assert data.prepare(task(), root) == folder
    changed = task((*TEXTS[:-1], {"text": "another end"}))
    with pytest.raises(UserError, match="made from another the train text; prepare with --overwrite"):
        data.prepare(changed, root)
    assert Path(folder, cache.MANIFEST).stat().st_mtime_ns == before
    data.prepare(changed, root, overwrite=True)
    assert Path(folder, cache.MANIFEST).stat().st_mtime_ns != before
    data.prepare(changed, root)
    assert [p.name for p in tmp_path.iterdir()] == [Path(folder).name]


def test_tasks_share_a_vocabulary_by_naming_its_corpus(tmp_path, monkeypatch):
    other = task(tuple({"text": f"else {i}"} for i in range(50)), name="other")
    monkeypatch.setitem(tasks.TASKS, "small", task())
    monkeypatch.setitem(tasks.TASKS, "other", other)
    shared = data.SentencePiece(vocabulary=330, corpora=("small",))
    sources = {n: data.Cached(task=n, folder=str(tmp_path), tokenizer=shared) for n in ("small", "other")}
    for source in sources.values():
        source.prepare()
    mixed = data.Mixture(sources=sources, weights={"small": 1, "other": 1}).open()
    assert mixed.tokenizer.identity == PIECES.train(r["text"] for r in TEXTS).identity
    saved = data.Saved(folder=tasks.find("small", shared).folder(str(tmp_path)))
    folder = data.prepare("other", str(tmp_path), tokenizer=saved)
    assert cache.Cache(folder).tokenizer.identity == mixed.tokenizer.identity


def test_the_root_is_argument_then_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(tasks.CACHE_VARIABLE, str(tmp_path / "variable"))
    assert tasks.cache_root() == str(tmp_path / "variable")
    assert tasks.cache_root(str(tmp_path)) == str(tmp_path)
    assert tasks.cache_root("gs://bucket/x") == "gs://bucket/x"
    assert cache.kvstore("gs://bucket/x/y") == {"driver": "gcs", "bucket": "bucket", "path": "x/y/"}


def test_a_bucket_holds_a_cache_as_a_folder_does(tmp_path, bucket):
    cached = data.Cached(task=task(), folder=f"{bucket}/caches", tokenizer=PIECES)
    assert cached.prepare() == cached.prepare() == f"{bucket}/caches/small-unigram-330"
    local = data.Cached(task=task(), folder=str(tmp_path / "local"), tokenizer=PIECES)
    local.prepare()
    one, other = (c.open().batch(3, batch_size=4, length=32, seed=0) for c in (cached, local))
    assert all((one[name] == other[name]).all() for name in one)
    stored = cache.store(f"{bucket}/caches/small-unigram-330")
    stored.write("train/text/values/c/0", None).result()
    with pytest.raises(UserError, match="gs://tests/caches/small-unigram-330/train/text/values/c/0: missing"):
        cached.open()
    # The manifest is written last: without it there is no cache yet.
    stored.write(cache.MANIFEST, None).result()
    with pytest.raises(UserError, match="is not prepared here"):
        cached.open()


# What can be wrong with a cache.


@pytest.fixture
def prepared(tmp_path):
    return Path(data.prepare(task(tokenizer=PIECES), str(tmp_path)))


def opened(prepared, **options):
    return data.Cached(task=task(tokenizer=PIECES), folder=str(prepared.parent), **options).open()


def test_a_task_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match=r"small-bytes: small is not prepared here; run `palmette prepare`"):
        data.Cached(task=task(), folder=str(tmp_path)).open()


def test_a_split_that_is_not_there(prepared):
    with pytest.raises(UserError, match="no split 'test'; there is train, validation"):
        opened(prepared, split="test")


def test_a_cache_cut_short(prepared):
    values = max((p for p in (prepared / "train").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    whole = values.read_bytes()
    values.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{values.name}: \d+ bytes, the manifest says \d+: the cache was cut short"):
        opened(prepared)
    values.unlink()
    with pytest.raises(UserError, match=f"{values.name}: missing from the cache"):
        opened(prepared)
    with pytest.raises(UserError, match="cut short"):
        data.prepare(task(tokenizer=PIECES), str(prepared.parent))
    data.prepare(task(tokenizer=PIECES), str(prepared.parent), overwrite=True)
    opened(prepared)


def test_a_cache_without_counts(prepared):
    """An older version's is read as it was; what asks for frequencies says how to have them, and the texts stay the same."""
    file = prepared / cache.MANIFEST
    manifest = json.loads(file.read_text())
    for split in manifest["splits"].values():
        del split["columns"]["text"]["counts"]
        split["files"] = {name: size for name, size in split["files"].items() if "counts" not in name}
    file.write_text(json.dumps(manifest))
    reader, root = opened(prepared), str(prepared.parent)
    reader.batch(0, batch_size=1, length=32, seed=0)
    with pytest.raises(UserError, match=r"train/text: made by an older version.*; prepare again with --overwrite"):
        reader.frequencies()
    data.prepare(task(tokenizer=PIECES), root)
    assert json.loads(file.read_text()) == manifest
    data.prepare(task(tokenizer=PIECES), root, overwrite=True)
    assert opened(prepared).frequencies().sum() == pytest.approx(1)
    assert opened(prepared).identity() == reader.identity()


def test_a_damaged_chunk(prepared):
    values = prepared / "train" / "text" / "values" / "c" / "0"
    values.write_bytes(b"\0" * values.stat().st_size)
    with pytest.raises(UserError, match="train/text/values: cut short or damaged"):
        opened(prepared).batch(0, batch_size=1, length=32, seed=0)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "broken manifest"), ("{}", "broken manifest"), ('{"format": 99}', "cache format 99")]
)
def test_a_broken_manifest(prepared, content, message):
    (prepared / cache.MANIFEST).write_text(content)
    with pytest.raises(UserError, match=rf"manifest.json: {message}"):
        opened(prepared)


def test_a_tokenizer_that_does_not_match(prepared):
    other = data.SentencePiece(vocabulary=320).train(r["text"] for r in TEXTS)
    mine = cache.Cache(str(prepared)).tokenizer
    other.save(prepared)
    with pytest.raises(
        UserError, match=f"made with tokenizer {mine.identity[:12]}, the one beside it is {other.identity[:12]}"
    ):
        opened(prepared)
    mine.save(prepared)
    manifest = json.loads((prepared / cache.MANIFEST).read_text())
    manifest["identity"]["tokenizer"] |= {"tag": "unigram-8000", "vocabulary": 8000}
    (prepared / cache.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="made with tokenizer unigram-8000, not unigram-330"):
        opened(prepared)


def test_a_file_in_the_way(tmp_path):
    Path(task().folder(str(tmp_path))).write_text("mine")
    with pytest.raises(UserError, match="a file is in the way; name a folder"):
        data.prepare(task(), str(tmp_path))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        data.prepare(task(), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_bad_records_leave_the_old_cache(tmp_path):
    folder = Path(data.prepare(task(), str(tmp_path)))
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    with pytest.raises(UserError, match="small, train, record 500: field 'text' is not of kind 'text'"):
        data.prepare(task((*TEXTS, {"text": 3})), str(tmp_path), overwrite=True)
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [folder]


PREPARE = """
import resource, signal, sys
import data
from data.sources import InMemory
from partitioning.errors import UserError
if sys.argv[2] != "0":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
records = tuple({"text": str(i) * 60} for i in range(40_000))
print("begun", flush=True)
try:
    data.prepare(data.Task(name="big", train=InMemory(records)), sys.argv[1], report=print, overwrite=True)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("limit", ["300000", "8000000"])
def test_a_disk_that_is_full_leaves_nothing(limit, tmp_path):
    """The limit on a file's size stops the write as a full disk does: first the scratch file, then a chunk."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(tmp_path), limit], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "the cache cannot be written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_can_be_seen_is_whole(tmp_path):
    """The writer is killed the moment its folder has its name."""
    folder = Path(data.Task(name="big", train=InMemory(TEXTS)).folder(str(tmp_path)))
    running = subprocess.Popen([sys.executable, "-c", PREPARE, str(tmp_path), "0"], cwd=ROOT, stdout=subprocess.PIPE)
    while not folder.exists():
        assert running.poll() is None
        time.sleep(0.0005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert cache.Cache(str(folder)).split("train").examples == 40_000


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_at_any_moment_the_cache_is_whole_or_as_before(replacing, tmp_path):
    root = tmp_path / "root"
    big = data.Task(name="big", train=InMemory(TEXTS))
    if replacing:
        data.prepare(big, str(root))
    for delay in (0.0, 0.15, 0.4, 0.8):
        running = subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(root), "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        running.stdout.readline()
        time.sleep(delay)
        running.send_signal(signal.SIGKILL)
        running.wait()
        folder = Path(big.folder(str(root)))
        manifest = cache.read_manifest(str(folder))
        assert replacing <= (manifest is not None)
        assert folder.exists() == (manifest is not None)
        if manifest is not None:
            split = cache.Cache(str(folder)).split("train")
            assert split.examples in (len(TEXTS), 40_000)
            assert len(everything(split)) == split.examples
    # The next prepare clears what the killed ones left.
    data.prepare(big, str(root), overwrite=True)
    assert [p.name for p in root.iterdir()] == ["big-bytes"]


def test_a_kill_between_the_two_renames_is_mended(prepared):
    os.replace(prepared, prepared.with_name(f".{prepared.name}.replaced"))
    opened(prepared)
    assert prepared.is_dir()
