"""What a run has spent so far: tokens and FLOPs, beside the metrics that they bought."""

from __future__ import annotations

from pathlib import Path

from training.goodput import parsed
from training.metrics import FILE

TOKENS, FLOPS = "spent/tokens", "spent/flops"


class Spent:
    """Tokens that were read and model FLOPs, over all starts of a run.

    A figure goes on file with every checkpoint, so that a run which goes on from one counts on exactly. A run whose checkpoint
    has none behind it (an earlier version's) has no figures rather than wrong ones.

    Args:
      out: the run's folder; read before its metrics are cut to the step that it goes on from.
      step: steps done.
    """

    def __init__(self, out: Path, step: int):
        self.tokens, self.flops, self._known = 0, 0.0, step == 0
        path = out / FILE
        if self._known or not path.exists():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            found = parsed(line)
            if TOKENS in found and found["step"] == step:
                self.tokens, self.flops, self._known = int(found[TOKENS]), float(found[FLOPS]), True

    def add(self, tokens: int, flops: float) -> None:
        """Counts a step."""
        self.tokens += tokens
        self.flops += flops

    def figures(self) -> dict[str, float]:
        """Tokens (padding aside) and model FLOPs (see `training.flops`), on all devices."""
        return {TOKENS: self.tokens, FLOPS: self.flops} if self._known else {}
