"""Tokenizers that others trained: any `tokenizer.json` of the `tokenizers` library."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from data.tokenizers import ByPiece, Specials, Tokenizer, json_file
from partitioning.errors import UserError

# What the specials are called in the files that are about, likeliest first.
SPELLINGS = {
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
    "bos": ("[BOS]", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("[EOS]", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
}


@dataclass(frozen=True)
class TokenizerJson:
    """A tokenizer.json of the `tokenizers` library; it is not trained, and no text gives its special tokens.

    Arguments:
        path: the file, or a folder that holds it as `tokenizer.json`.
        specials: special (`pad`, `bos`, `eos`, `mask`, `cls`, `sep`) -> its token in the file, for those whose token is
            not spelt as usual (`[MASK]`, `<mask>`, ...).
        add: tokens that the file lacks, put behind its vocabulary, e.g. `('[BOS]', '[EOS]')` for a BERT's.

    Errors: UserError naming the file when it is missing or broken, when a special has no token or two have one.

    Differs: a tokenizer that normalises (a lowercasing one) decodes to the normalised text, and `token_bytes` counts
    that text's bytes; so do bits per byte.
    """

    path: str
    specials: Mapping[str, str] | None = None
    add: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "add", tuple(self.add))
        for name in self.specials or {}:
            if name not in SPELLINGS:
                raise UserError(f"TokenizerJson.specials names {name!r}: one of {', '.join(SPELLINGS)} is wanted")

    @property
    def tag(self) -> str:
        """See `TokenizerSpec`."""
        return f"json-{self.load().identity[:12]}"

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer in the file; the texts are not read."""
        return self.load()

    def load(self) -> "Loaded":
        """Read the file."""
        file = Path(self.path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        library = parsed(content, str(file))
        if self.add:
            import tokenizers

            library.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in self.add])
            content = library.to_str().encode()
        return Loaded(content, self._ids(library, str(file)))

    def _ids(self, library: Any, file: str) -> Specials:
        ids: dict[str, int] = {}
        for name, usual in SPELLINGS.items():
            named = (self.specials or {}).get(name)
            tokens = usual if named is None else (named,)
            found = [i for i in map(library.token_to_id, tokens) if i is not None]
            if not found:
                raise UserError(
                    f"{file}: no token for the special {name!r} ({', '.join(tokens)}): name one of its tokens by "
                    f"TokenizerJson.specials = {{{name!r}: '...'}}, or bring one by TokenizerJson.add = ({tokens[0]!r},)"
                )
            twin = next((other for other, i in ids.items() if i == found[0]), None)
            if twin is not None:
                raise UserError(
                    f"{file}: the specials {twin!r} and {name!r} are one token, {library.id_to_token(found[0])!r}: "
                    f"give {name!r} its own by TokenizerJson.specials"
                )
            ids[name] = found[0]
        return Specials(**ids)


def parsed(content: bytes, where: str) -> Any:
    """The library's tokenizer of a file's content. Errors: UserError naming `where`."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{where}: reading it needs the package tokenizers: pip install 'palmette[files]'") from None
    try:
        library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    # The library raises bare Exceptions.
    except Exception as error:
        raise UserError(f"{where}: not a tokenizer.json of the tokenizers library: {error}") from None
    library.no_truncation()
    library.no_padding()
    # A text that spells `[MASK]` is text.
    library.encode_special_tokens = True
    return library


class Loaded(ByPiece):
    """A tokenizer of the `tokenizers` library.

    Arguments:
        content: its JSON.
        specials: the ids of its special tokens.
    """

    def __init__(self, content: bytes, specials: Specials):
        self.content, self.specials = content, specials
        self._library = parsed(content, "tokenizer.json")

    @cached_property
    def identity(self) -> str:
        """See `Tokenizer`."""
        return hashlib.sha256(self.content + json_file(asdict(self.specials))).hexdigest()

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        """What each id adds to a text that it continues."""
        library = self._library
        marked = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
        marked |= {getattr(self.specials, f.name) for f in fields(self.specials)}
        kinds = _kinds(json.loads(self.content).get("decoder"))
        table = _byte_level() if "ByteLevel" in kinds else None

        def piece(i: int) -> bytes:
            token = library.id_to_token(i)
            if token is None or i in marked:
                return b""
            if table is not None and all(c in table for c in token):
                return bytes(table[c] for c in token)
            if "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            # Whatever the decoder does at a text's beginning, it has done with the first of two.
            alone, twice = (library.decode([i] * n, skip_special_tokens=False) for n in (1, 2))
            return twice[len(alone) :].encode("utf-8")

        # Ids may have gaps.
        return [piece(i) for i in range(max(library.get_vocab(with_added_tokens=True).values()) + 1)]

    def encode(self, text: str) -> Int[np.ndarray, " S"]:
        """See `Tokenizer`."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """See `Tokenizer`."""
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoded.ids, np.int32) for encoded in found]

    def decode(self, ids: Int[np.ndarray, " S"]) -> str:
        """See `Tokenizer`."""
        skipped = set(vars(self.specials).values())
        return self._library.decode([int(i) for i in np.asarray(ids).reshape(-1) if int(i) not in skipped])

    def files(self) -> dict[str, bytes]:
        """See `Tokenizer`."""
        kept = {"kind": "tokenizers", "specials": asdict(self.specials)}
        return {"tokenizer.json": json_file(kept), "tokenizer.model": self.content}


def _kinds(decoder: Any) -> set[str]:
    """The kinds of a decoder and of those in it."""
    if not decoder:
        return set()
    return {decoder["type"]}.union(*(_kinds(inner) for inner in decoder.get("decoders", ())))


def _byte_level() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE: the printable ones for themselves, the rest from U+0100 on.

    Source: GPT-2, Radford et al., 2019 (`bytes_to_unicode`).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}
