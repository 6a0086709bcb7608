"""Tokenizers in the Hugging Face layout: a model's `tokenizer.json` and what its specials are called, in and out."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.tokenizer_json import SPELLINGS, Loaded, TokenizerJson, parsed
from data.tokenizers import Tokenizer

FILE, CONFIG, OLDER = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
# Tokens that a model was given and never saw.
SPARE = re.compile(r"unused|reserved|madeup|extra_id")
# Where two have one token (RoBERTa's <s> is both bos and cls, Llama's padding is often eos), the first here keeps it.
ORDER = ("eos", "bos", "mask", "cls", "sep", "pad")


def spec_of(folder: str | Path) -> TokenizerJson | None:
    """The tokenizer in a model's folder, or None where there is no `tokenizer.json`.

    A special that the folder does not name, or that has another's token, gets a token that the model never saw
    (`[unused1]`, `<|reserved_special_token_0|>`); where there is none, it is left to `TokenizerJson.specials` or `add`.

    Errors: UserError naming the file when it is broken.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    ids = parsed(file.read_bytes(), str(file)).get_vocab(with_added_tokens=True)
    named = {**_json(Path(folder) / OLDER), **_json(Path(folder) / CONFIG)}
    found: dict[str, str] = {}
    for special in ORDER:
        said = named.get(f"{special}_token")
        said = said.get("content") if isinstance(said, Mapping) else said
        for token in (said, *SPELLINGS[special]):
            if isinstance(token, str) and token in ids and token not in found.values():
                found[special] = token
                break
    spare = iter(sorted((t for t in ids if SPARE.search(t) and t not in found.values()), key=ids.__getitem__))
    for special in ORDER:
        if special not in found and (token := next(spare, None)) is not None:
            found[special] = token
    return TokenizerJson(path=str(file.resolve()), specials={name: found[name] for name in SPELLINGS if name in found})


def around(spec: TokenizerJson) -> tuple[str, str]:
    """The specials before and after a document: `cls` and `sep` of a model that has no `bos` and `eos` of its own."""
    own = {name: token for name, token in (spec.specials or {}).items() if not SPARE.search(token)}
    whole = lambda special, other: other if special not in own and other in own else special
    return whole("bos", "cls"), whole("eos", "sep")


def files_of(tokenizer: Tokenizer) -> dict[str, str] | None:
    """The files that `transformers` reads a tokenizer from, by name; None where it is no tokenizer.json."""
    if not isinstance(tokenizer, Loaded):
        return None
    library = parsed(tokenizer.content, FILE)
    config = {
        # Not the model's own class, which would build another tokenizer from this one's vocabulary.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": library.id_to_token(i) for name, i in asdict(tokenizer.specials).items()},
    }
    return {FILE: tokenizer.content.decode("utf-8"), CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
