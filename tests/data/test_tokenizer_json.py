"""Tokenizers of the `tokenizers` library, trained here: their ids, bytes and specials are what the library's are."""

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import data
from data.cache import Cache
from data.saved_tokenizers import load_tokenizer
from partitioning.errors import UserError

LINES = [f"Return the {w} of a list, {w}: if {i} is é or not." for i in range(50) for w in ("value", "key", "name")]
MINE = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>"]


def byte_level():
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made, trainers.BpeTrainer(
        vocab_size=400, special_tokens=MINE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )


def byte_fallback():
    """As Llama's: U+2581 for spaces, unknown characters as bytes."""
    made = library.Tokenizer(models.BPE(byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    spelt = [*MINE, *(f"<0x{b:02X}>" for b in range(256))]
    return made, trainers.BpeTrainer(vocab_size=500, special_tokens=spelt, show_progress=False)


def word_piece():
    made = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer(vocab_size=200, special_tokens=[*MINE, "[UNK]"], show_progress=False)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Kind -> (the library's own tokenizer, its file)."""
    out = {}
    for make in (byte_level, byte_fallback, word_piece):
        tokenizer, trainer = make()
        tokenizer.train_from_iterator(LINES, trainer)
        if make is byte_fallback:
            # The trainer marks the bytes special; in the files that are about they are ordinary.
            text = tokenizer.to_str().replace('"special":true', '"special":false')
            tokenizer = library.Tokenizer.from_str(text)
            tokenizer.add_special_tokens(MINE)
        file = tmp_path_factory.mktemp(make.__name__) / "tokenizer.json"
        tokenizer.save(str(file))
        out[make.__name__] = (tokenizer, file)
    return out


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "word_piece"])
def test_ids_are_the_library_s_and_are_kept(kind, made, tmp_path):
    theirs, file = made[kind]
    ours = data.TokenizerJson(str(file)).load()
    assert ours.vocabulary == theirs.get_vocab_size()
    for line in LINES[:9]:
        assert ours.encode(line).tolist() == theirs.encode(line, add_special_tokens=False).ids
        assert ours.decode(ours.encode(line)) == theirs.decode(theirs.encode(line).ids)
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.identity, again.specials) == (ours.identity, ours.specials)
    np.testing.assert_array_equal(again.encode(LINES[0]), ours.encode(LINES[0]))
    assert ours.specials.mask == theirs.token_to_id("[MASK]")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(max_examples=80, deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.text(alphabet="ab é\n[MASK]<s>日", max_size=40)))
def test_a_tokenizer_that_loses_nothing_counts_every_byte(kind, made, text):
    """Also where the text spells a special token, which is then text."""
    if kind == "byte_fallback" and "\u2581" in text:
        return
    ours = data.TokenizerJson(str(made[kind][1])).load()
    ids = ours.encode(text)
    assert b"".join(ours.pieces[i] for i in ids) == text.encode()
    assert ours.token_bytes[ids].sum() == len(text.encode())
    assert ours.decode(ids) == text
    assert not np.isin(ids, list(vars(ours.specials).values())).any()


def test_word_pieces_count_the_words_and_the_bytes(made):
    ours = data.TokenizerJson(str(made["word_piece"][1])).load()
    ids = ours.encode("return the names of 49 keys")
    ids = np.concatenate([[ours.specials.cls], ids, [ours.specials.sep]])
    assert ours.word_starts(ids).sum() == 6
    # One space stands before the first word.
    assert ours.token_bytes[ids].sum() == len(" " + ours.decode(ids))


def test_it_prepares_a_cache_and_is_part_of_what_a_cache_is(made, tmp_path):
    texts = tuple({"text": line} for line in LINES)
    task = data.Task(name="t", train=data.InMemory(texts), tokenizer=data.TokenizerJson(str(made["byte_level"][1])))
    folder = data.prepare(task, str(tmp_path))
    assert data.prepare(task, str(tmp_path)) == folder
    assert Cache(folder).tokenizer.identity == task.reads_with.load().identity
    reader = data.Cached(task=task, folder=str(tmp_path), epochs=1).open()
    batch = reader.batch(0, batch_size=4, length=64, seed=0)
    assert reader.tokenizer.decode(batch["tokens"][0][batch["segments"][0] == 1]) in LINES


def test_what_a_file_lacks_is_named_and_may_be_added(made, tmp_path):
    bare, trainer = word_piece()
    trainer.special_tokens = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    bare.train_from_iterator(LINES, trainer)
    file = tmp_path / "bert.json"
    bare.save(str(file))
    with pytest.raises(
        UserError, match=r"bert.json: no token for the special 'bos' .*TokenizerJson.add = \('\[BOS\]',\)"
    ):
        data.TokenizerJson(str(file)).load()
    ours = data.TokenizerJson(str(file), add=("[BOS]", "[EOS]")).load()
    assert ours.vocabulary == bare.get_vocab_size() + 2
    assert not ours.token_bytes[ours.specials.eos]
    with pytest.raises(UserError, match="the specials 'mask' and 'cls' are one token"):
        data.TokenizerJson(str(file), specials={"cls": "[MASK]"}, add=("[BOS]", "[EOS]")).load()
    with pytest.raises(UserError, match=r"no token for the special 'mask' \(<gone>\)"):
        data.TokenizerJson(str(made["byte_level"][1]), specials={"mask": "<gone>"}).load()
    with pytest.raises(UserError, match="specials names 'start'"):
        data.TokenizerJson(str(file), specials={"start": "[CLS]"})


def test_a_file_that_is_missing_or_broken_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        data.TokenizerJson(str(tmp_path / "nowhere")).load()
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer.json of the tokenizers library"):
        data.TokenizerJson(str(tmp_path)).load()
