"""The embedded corpora: no module in two splits, no text twice, nothing of a function's answer in its question."""

import itertools

import pytest

from data import corpora
from data.derived import PythonSummaries
from data.retrieval import Retrieval, python_search
from data.sources import SPLITS
from partitioning.errors import UserError

CORPORA = {"docs": corpora.docs, "code": corpora.code, "functions": corpora.functions}


@pytest.mark.parametrize("name", CORPORA)
def test_splits_hold_whole_modules(name):
    modules = {split: set() for split in SPLITS}
    for item in CORPORA[name]():
        modules[corpora.split_of_module(item.module)].add(item.module)
    assert all(modules.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not modules[one] & modules[other]


def test_every_file_of_a_package_is_in_the_package_split():
    root = corpora.stdlib()
    assert corpora.module_of(root / "email" / "mime" / "text.py") == "email"
    assert corpora.module_of(root / "_strptime.py") == "strptime"
    homes: dict[str, set[str]] = {}
    for function in corpora.functions():
        top = function.place.split(":")[0].split("/")[0].removesuffix(".py")
        homes.setdefault(top, set()).add(corpora.split_of_module(function.module))
    assert len(homes["email"]) == len(homes["asyncio"]) == 1
    assert all(len(splits) == 1 for splits in homes.values())


@pytest.mark.parametrize("source", [corpora.PythonDocs, corpora.PythonCode])
def test_no_text_is_in_two_splits_and_none_is_lost(source):
    splits = {split: [r["text"] for r in source(split)] for split in SPLITS}
    everything = [text for texts in splits.values() for text in texts]
    assert len(everything) == len(set(everything))
    whole = corpora.docs() if source is corpora.PythonDocs else corpora.code()
    assert sorted(everything) == sorted(t.text for t in whole)


def test_summaries_stand_in_front_of_their_texts():
    """The sentence opens the text, and the paragraphs behind the first end it; those of a split are of its modules."""
    whole = [t.text.strip() for t in corpora.docs() if corpora.split_of_module(t.module) == "test"]
    pairs = list(PythonSummaries("test"))
    assert len(pairs) == sum("\n\n" in text for text in whole) > 100
    following = iter(whole)
    for pair in pairs:
        text = next(t for t in following if "\n\n" in t)
        assert text.split("\n\n", 1)[1].strip() == pair["positive"].strip()
        assert " ".join(text.split()).startswith(pair["query"])
    with pytest.raises(UserError, match="split 'tset'"):
        list(PythonSummaries("tset"))


def test_sizes_are_those_of_a_corpus():
    assert sum(len(t.text) for t in corpora.docs()) > 1_000_000
    assert sum(len(t.text) for t in corpora.code()) > 5_000_000
    assert len(corpora.functions()) > 2_000
    assert any(t.module.startswith("topic ") for t in corpora.docs())


def test_tests_of_the_standard_library_are_left_out():
    for file, _ in corpora._sources():
        inside = file.relative_to(corpora.stdlib()).parts
        assert not {"test", "tests", "idle_test", "site-packages"} & set(inside), file


def test_nothing_is_imported():
    import sys

    corpora.docs()
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


def test_a_function_is_given_without_its_docstring():
    import ast

    for function in corpora.functions()[::20]:
        tree = ast.parse(function.source)
        found = tree.body[0]
        assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(found) != function.docstring


def test_a_docstring_on_the_line_of_its_function():
    import ast

    text = "class A:\n    @staticmethod\n    def f(x): 'says é what'; return x\n"
    node = ast.parse(text).body[0].body[0]
    lines = text.encode().splitlines(keepends=True)
    assert corpora._without_docstring(node, lines) == "@staticmethod\ndef f(x): return x\n"


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x. Then stop.", "Return x."),
        ("Return the\n   value", "Return the value"),
        ("Use e.g. this one. Not that.", "Use e.g. this one."),
        ("Open file.txt now\n\nMore.", "Open file.txt now"),
    ],
)
def test_first_sentence(docstring, sentence):
    assert corpora.first_sentence(docstring) == sentence


def test_search_splits_agree_with_training_pairs(tmp_path):
    held = python_search("validation")
    pairs = list(corpora.PythonSearch("validation"))
    judged = {(held.queries[q], held.corpus[d]) for q, found in held.qrels.items() for d in found}
    assert judged == {(p["query"], p["positive"]) for p in pairs}
    assert not set(held.corpus.values()) & {p["positive"] for p in corpora.PythonSearch("train")}
    held.save(tmp_path, "validation")
    assert Retrieval.load(tmp_path, "validation") == held


def test_a_broken_collection_names_file_and_line(tmp_path):
    python_search("test").save(tmp_path)
    qrels = tmp_path / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text() + "q0\tnowhere\t1\n")
    with pytest.raises(UserError, match=r"test.tsv, line \d+: query 'q0' or document 'nowhere'"):
        Retrieval.load(tmp_path)
    with pytest.raises(UserError, match=r"dev.tsv: no such file"):
        Retrieval.load(tmp_path, "dev")


def test_an_unknown_split_is_named():
    with pytest.raises(UserError, match="split 'dev'"):
        list(corpora.PythonDocs("dev"))
