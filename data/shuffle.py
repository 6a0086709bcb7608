"""Permutations that never change: the same on every machine, in every process, under every NumPy."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def random_words(seed: Sequence[int], count: int) -> Int[np.ndarray, " count"]:
    """`count` random 64-bit words that depend on the seed words alone.

    NumPy keeps the streams of its bit generators fixed, not those of `Generator.permutation`: only raw words are used.
    """
    return np.random.Philox(np.random.SeedSequence(list(seed))).random_raw(count)


def permutation(seed: Sequence[int], count: int) -> Int[np.ndarray, " count"]:
    """A permutation of 0..count-1 that depends on the seed words alone."""
    return np.argsort(random_words(seed, count), kind="stable")


def derive(seed: int, name: str) -> int:
    """A new seed for a named part, so that two parts with the same seed do not move in step."""
    words = [seed & 0xFFFFFFFF, seed >> 32, *name.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1
