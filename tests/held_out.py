"""Held-out texts that the tests of evaluation share."""

from __future__ import annotations

import data
from models import Vocabulary

TEXTS = [
    "def add(a, b): return a + b",
    "the quick brown fox jumps over the lazy dog and runs",
    "x = [1, 2, 3]",
    "naïve café, 5 €",
    "import os",
    "for i in range(10): print(i)",
    "one two three four five six seven eight nine ten eleven twelve",
]
TOKENIZER = data.Bytes()
VOCABULARY = Vocabulary(size=TOKENIZER.vocabulary, **vars(TOKENIZER.specials))


def records(texts=TEXTS, **options):
    """Texts as evaluators take them."""
    return data.Records(examples=[{"text": text} for text in texts], window=3, **options)
