"""Sources read what is there, and say in one line what is wrong with what is not."""

import json

import pytest

from data.sources import SPLITS, InMemory, JsonLines, LocalText, Portion
from data.tasks import find, text_task
from partitioning.errors import UserError


def test_a_folder_gives_one_document_a_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("zwei\n\nAbsätze\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no.md").write_text("not this")
    assert list(LocalText(str(tmp_path))) == [{"text": "one"}, {"text": "zwei\n\nAbsätze\n"}]


def test_json_lines_map_fields(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"q": "a", "p": "b", "s": 1.5}\n\n{"q": "c", "p": "d", "s": 2}\n')
    assert list(JsonLines(str(file), field="q")) == [{"text": "a"}, {"text": "c"}]
    fields = {"query": "q", "score": "s"}
    assert list(JsonLines(str(file), fields=fields)) == [{"query": "a", "score": 1.5}, {"query": "c", "score": 2}]


BAD = {
    "not-utf8.txt": (b"good line\n\xff\xfe", r"not-utf8.txt: not UTF-8 at byte 10"),
    "empty.txt": (b" \n ", r"empty.txt: empty"),
    "empty.jsonl": (b"\n", r"empty.jsonl: empty"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken.jsonl, line 2: not JSON: .* at column"),
    "bytes.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', r"bytes.jsonl, line 2: not UTF-8 at byte 24"),
    "list.jsonl": (b"[1]\n", r"list.jsonl, line 1: a JSON object is wanted"),
    "missing.jsonl": (
        b'{"text": "a"}\n\n{"txt": "b"}\n',
        r"missing.jsonl, line 3: no field 'text'; the record has txt",
    ),
    "type.jsonl": (b'{"text": null}\n', r"type.jsonl, line 1: field 'text' holds NoneType"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', r"surrogate.jsonl, line 1: field 'text' holds half a surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_one_line(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    source = LocalText(str(tmp_path / name)) if name.endswith("txt") else JsonLines(str(tmp_path / name))
    with pytest.raises(UserError, match=message) as error:
        list(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", [LocalText, JsonLines])
def test_a_missing_path_and_an_empty_folder(source, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        list(source(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="the folder holds no"):
        list(source(str(tmp_path)))


def test_portions_cover_without_overlap():
    records = tuple({"text": f"document {i}"} for i in [*range(400), 7])
    parts = {split: [r["text"] for r in Portion(InMemory(records), split, 0.1)] for split in SPLITS}
    assert sorted(text for texts in parts.values() for text in texts) == sorted(r["text"] for r in records)
    assert all(len(texts) > 10 for texts in parts.values())
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not set(parts[one]) & set(parts[other])


def test_one_document_is_split_by_lines():
    text = "".join(f"line {i}\n" for i in range(100))
    parts = [next(iter(Portion(InMemory(({"text": text},)), split)))["text"] for split in SPLITS]
    assert "".join(parts) == text
    assert [part.count("\n") for part in parts] == [90, 5, 5]


def test_a_task_is_found_by_name_or_path(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    assert find("python_docs").name == "python_docs"
    assert find(str(tmp_path / "mine.jsonl")).name == "mine"
    assert isinstance(text_task(str(tmp_path), validation=str(tmp_path / "mine.jsonl")).train, JsonLines)
    with pytest.raises(UserError, match="no task 'python_dogs': one of python_docs"):
        find("python_dogs")
    with pytest.raises(UserError, match="nowhere"):
        find(str(tmp_path / "nowhere"))
