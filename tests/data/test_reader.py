"""A batch is a pure function of seed and step: every token once an epoch, every host and every resume alike."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data.epochs import Epochs
from partitioning.errors import UserError

RNG = np.random.default_rng(0)
TEXTS = [{"text": f"<{i}>" + "x" * int(RNG.integers(0, 90))} for i in range(300)]
BYTES = data.Bytes()


def texts(**options):
    return data.Records(examples=TEXTS, window=32, **options).open()


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def epoch_of(reader, length, first, batch_size=7, seed=3):
    """All rows `first` up to `first + rows` of the run, read in batches."""
    rows = reader.rows(length=length)
    steps = range(first // batch_size, (first + rows) // batch_size + 1)
    found = [reader.batch(s, batch_size=batch_size, length=length, seed=seed) for s in steps]
    skip = first - steps[0] * batch_size
    return {k: np.concatenate([b[k] for b in found])[skip : skip + rows] for k in found[0]}


@pytest.mark.parametrize("length", [24, 64, 256])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_holds_every_token_once(length, epoch):
    reader = texts()
    batch = epoch_of(reader, length, epoch * reader.rows(length=length))
    seen = Counter()
    for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
        for s in range(1, segments.max() + 1):
            seen[tuple(tokens[segments == s].tolist())] += 1
    bos, eos = BYTES.specials.bos, BYTES.specials.eos
    wanted = Counter()
    for record in TEXTS:
        ids = [bos, *BYTES.encode(record["text"]).tolist(), eos]
        for at in range(0, len(ids), length):
            wanted[tuple(ids[at : at + length])] += 1
    assert seen == wanted


def test_epochs_differ_and_seeds_differ():
    reader = texts()
    rows = reader.rows(length=64)
    one, other = (epoch_of(reader, 64, first)["tokens"] for first in (0, rows))
    assert (one != other).any()
    assert (one != epoch_of(reader, 64, 0, seed=4)["tokens"]).any()


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_any_number_of_hosts_sees_the_same_batch(hosts):
    whole = texts()
    for step in (0, 3, 40):
        shares = [
            texts().batch(step, batch_size=16, length=64, seed=5, start=11, host=h, hosts=hosts) for h in range(hosts)
        ]
        joined = {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}
        same(joined, whole.batch(step, batch_size=16, length=64, seed=5, start=11))
        np.testing.assert_array_equal(joined["row"], np.arange(16))


def test_any_step_can_be_read_first_and_in_any_order():
    ordered = texts()
    batches = [ordered.batch(s, batch_size=8, length=48, seed=1) for s in range(30)]
    for step in (29, 0, 13, 7, 28):
        same(texts().batch(step, batch_size=8, length=48, seed=1), batches[step])
        same(ordered.batch(step, batch_size=8, length=48, seed=1), batches[step])


def test_a_stage_starts_where_the_last_one_stopped():
    reader = texts()
    small = [reader.batch(s, batch_size=4, length=48, seed=1) for s in range(12)]
    big = reader.batch(1, batch_size=16, length=48, seed=1, start=16)
    np.testing.assert_array_equal(big["tokens"], np.concatenate([b["tokens"] for b in small[8:12]]))


def test_spec_is_what_a_batch_is():
    for reader in (texts(), texts(pack=False), pairs(), lists(), preferences()):
        spec = reader.spec(batch_size=6, length=32)
        batch = reader.batch(2, batch_size=6, length=32, seed=0)
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == spec


def test_rows_past_the_last_epoch_are_padding():
    reader = texts(epochs=1)
    rows = reader.rows(length=64)
    steps = -(-rows // 16)
    batches = [reader.batch(s, batch_size=16, length=64, seed=0) for s in range(steps + 1)]
    tokens = np.concatenate([b["segments"] > 0 for b in batches]).sum()
    assert tokens == sum(len(BYTES.encode(r["text"])) + 2 for r in TEXTS)
    assert not batches[-1]["segments"].any()
    assert not batches[-1]["tokens"].any()


def test_unpacked_documents_have_a_row_each():
    reader = texts(pack=False, shuffle=False, begin=None, end="sep")
    batch = reader.batch(0, batch_size=300, length=32, seed=0)
    for record, tokens, segments in zip(TEXTS, batch["tokens"], batch["segments"], strict=True):
        ids = [*BYTES.encode(record["text"]).tolist()[:31], BYTES.specials.sep]
        assert tokens[: len(ids)].tolist() == ids
        assert segments.tolist() == [1] * len(ids) + [0] * (32 - len(ids))


def test_word_starts_restart_at_each_document():
    records = [{"text": "ab cd"}] * 8
    reader = data.Records(examples=records, begin=None, end=None).open()
    batch = reader.batch(0, batch_size=1, length=20, seed=0)
    np.testing.assert_array_equal(batch["word_starts"][0], ([True, False, False, True, False] * 4))
    np.testing.assert_array_equal(batch["positions"][0], list(range(5)) * 4)


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=13),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 200),
)
def test_epochs_visit_every_row_once(counts, seed, first):
    epochs = Epochs(np.array(counts), seed)
    rows = np.arange(first * epochs.rows, (first + 1) * epochs.rows)
    seen = set()
    for block, inside, at in epochs.runs(rows):
        order = epochs.within(block)
        owner = np.repeat(block.windows, np.array(counts)[list(block.windows)])
        row = np.concatenate([np.arange(counts[w]) for w in block.windows])
        for r in order[inside].tolist():
            assert (owner[r], row[r]) not in seen
            seen.add((owner[r], row[r]))
        assert block.epoch == first
        np.testing.assert_array_equal(rows[at] - first * epochs.rows - block.first, inside)
    assert len(seen) == sum(counts)


# Structured examples.


def pairs(**options):
    examples = [{"query": f"q{i}", "positive": f"answer {i} " + "y" * i} for i in range(50)]
    return data.Records(examples=examples, window=16, **options).open()


def lists(**options):
    examples = [
        {
            "query": f"q{i}",
            "candidates": [f"c{i}.{j}" for j in range(1 + i % 4)],
            "relevance": [float(j) for j in range(1 + i % 4)],
        }
        for i in range(40)
    ]
    return data.Records(examples=examples, window=16, **options).open()


def preferences(**options):
    examples = [{"prompt": f"p{i}" + "z" * i, "chosen": f" good {i}", "rejected": f" bad {i}!"} for i in range(40)]
    return data.Records(examples=examples, window=16, **options).open()


def decoded(tokens):
    return BYTES.decode(np.asarray(tokens))


def test_pairs_stay_together():
    batch = epoch_of(pairs(), 64, 50)
    seen = set()
    for query, positive in zip(batch["query/tokens"], batch["positive/tokens"], strict=True):
        i = int(decoded(query)[1:])
        assert decoded(positive) == f"answer {i} " + "y" * i
        seen.add(i)
    assert seen == set(range(50))
    assert set(batch) == {f"{f}/{p}" for f in ("query", "positive") for p in ("tokens", "segments", "positions")} | {
        "row"
    }


def test_a_long_text_keeps_its_end_special():
    batch = pairs(begin="cls", end="sep").batch(0, batch_size=50, length=16, seed=0)
    tokens = batch["positive/tokens"]
    assert (tokens[:, 0] == BYTES.specials.cls).all()
    assert ((tokens == BYTES.specials.sep).sum(axis=1) == 1).all()
    last = batch["positive/segments"].sum(axis=1) - 1
    assert (tokens[np.arange(50), last] == BYTES.specials.sep).all()


def test_lists_are_aligned_with_their_relevance():
    batch = epoch_of(lists(), 32, 0)
    assert batch["candidates/tokens"].shape == (40, 4, 32)
    for query, tokens, segments, relevance, valid in zip(
        *(batch[k] for k in ("query/tokens", "candidates/tokens", "candidates/segments", "relevance", "valid")),
        strict=True,
    ):
        i = int(decoded(query)[1:])
        assert valid.tolist() == [j <= i % 4 for j in range(4)]
        assert relevance.tolist() == [float(j) if j <= i % 4 else 0.0 for j in range(4)]
        assert [decoded(t) for t in tokens] == [f"c{i}.{j}" if j <= i % 4 else "" for j in range(4)]
        assert segments.any(axis=-1).tolist() == valid.tolist()


def test_a_list_can_be_cut():
    batch = lists(items=2).batch(0, batch_size=8, length=32, seed=0)
    assert batch["candidates/tokens"].shape == (8, 2, 32)
    assert batch["relevance"].shape == (8, 2)


def test_preferences_share_their_prompt_and_mask_it():
    batch = epoch_of(preferences(), 32, 0)
    for name, text in (("chosen", " good {}"), ("rejected", " bad {}!")):
        for tokens, mask, prompt in zip(
            batch[f"{name}/tokens"], batch[f"{name}/loss_mask"], batch["prompt/tokens"], strict=True
        ):
            i = int(decoded(prompt)[1:].split("z")[0])
            assert decoded(tokens[mask]) == text.format(i)
            assert tokens[mask][-1] == BYTES.specials.eos
            seen = decoded(tokens[~mask])
            assert seen == (f"p{i}" + "z" * i)[-len(seen) :]
    inside = ~batch["chosen/loss_mask"] & (batch["chosen/segments"] > 0)
    other = ~batch["rejected/loss_mask"] & (batch["rejected/segments"] > 0)
    np.testing.assert_array_equal(inside, other)
    np.testing.assert_array_equal(batch["chosen/tokens"] * inside, batch["rejected/tokens"] * other)


def test_responses_give_a_prompt_mask():
    examples = [{"prompt": f"ask {i}:", "response": f"say {i}"} for i in range(10)]
    batch = data.Records(examples=examples).open().batch(0, batch_size=10, length=24, seed=0)
    for tokens, prompt, loss, segments in zip(
        *(batch[k] for k in ("tokens", "prompt_mask", "loss_mask", "segments")), strict=True
    ):
        assert decoded(tokens[prompt]).replace("ask", "say").replace(":", "") == decoded(tokens[loss])
        np.testing.assert_array_equal(prompt | loss, segments > 0)


def test_numbers_follow_their_text():
    examples = [{"text": f"t{i}", "score": i / 2} for i in range(30)]
    batch = data.Records(examples=examples, window=8).open().batch(0, batch_size=30, length=16, seed=9)
    assert [decoded(t) for t in batch["tokens"]] == [f"t{int(2 * s)}" for s in batch["score"]]
    assert sorted(batch["score"].tolist()) == [i / 2 for i in range(30)]


def test_typed_texts_are_read_as_records_are():
    strings = [r["text"] for r in TEXTS[:20]] + [""]
    reader = data.Records(examples=[{"text": t} for t in strings], pack=False, shuffle=False, begin="cls").open()
    batch = reader.batch(0, batch_size=21, length=40, seed=0)
    typed = data.text_batch(strings, reader.tokenizer, length=40, begin="cls")
    same(typed, {name: batch[name] for name in typed})
    assert data.text_batch([], BYTES, length=8)["tokens"].shape == (0, 8)


@pytest.mark.parametrize("make", [pairs, lists, preferences])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_agree_on_structured_examples(make, hosts):
    shares = [make().batch(9, batch_size=12, length=24, seed=2, host=h, hosts=hosts) for h in range(hosts)]
    same(
        {k: np.concatenate([s[k] for s in shares]) for k in shares[0]},
        make().batch(9, batch_size=12, length=24, seed=2),
    )


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "records: there is no record"),
        ([{"text": "a"}, {"txt": "b"}], "records, record 1: its fields are txt, record 0 has text"),
        ([{"text": "a"}, {"text": 3}], "records, record 1: field 'text' is not of kind 'text'"),
        ([{"text": None}], "records, record 0: field 'text' is neither"),
        ([{"chosen": "a", "rejected": "b"}], "field 'chosen' needs a field 'prompt'"),
    ],
)
def test_bad_records_are_one_line(examples, message):
    with pytest.raises(UserError, match=message) as error:
        data.Records(examples=examples).open()
    assert "\n" not in str(error.value)


def test_bad_requests_are_one_line():
    with pytest.raises(UserError, match="a batch of 10 rows cannot be shared evenly by 4 hosts"):
        texts().batch(0, batch_size=10, length=32, seed=0, hosts=4)
    with pytest.raises(UserError, match=r"Records.begin = 'start': one of bos"):
        texts(begin="start")
    with pytest.raises(UserError, match="length = 2"):
        texts().batch(0, batch_size=1, length=2, seed=0)
    with pytest.raises(UserError, match=r"Records.epochs = 0"):
        texts(epochs=0)
