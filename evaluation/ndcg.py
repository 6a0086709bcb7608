"""Normalised discounted cumulative gain of a ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def ndcg(ranked: Sequence[str], judged: Mapping[str, float], k: int = 10) -> float:
    """DCG@k of a ranking over that of the best one.

    DCG@k = sum_{i=1..k} relevance(i) / log2(i + 1).

    Args:
      ranked: documents, best first; what stands behind the k-th does not count.
      judged: relevance by document; a document without one has 0.
      k: the depth.

    Returns:
      From 0 to 1; 0 where nothing is relevant.

    Source: "Cumulated Gain-Based Evaluation of IR Techniques", Järvelin and Kekäläinen, 2002.
    Differs: a relevance is its own gain, not 2^relevance - 1, as in trec_eval and BEIR.
    """
    discount = 1 / np.log2(np.arange(k) + 2)
    found = np.array([judged.get(document, 0.0) for document in ranked[:k]])
    best = np.sort(np.array([value for value in judged.values() if value > 0], np.float64))[::-1][:k]
    ideal = float(best @ discount[: len(best)])
    return float(found @ discount[: len(found)]) / ideal if ideal else 0.0
