"""`python -m benchmarks [name ...]`: runs the benchmarks one after the other and writes `benchmarks/RESULTS.md`."""

import importlib
import os
import sys

from benchmarks.harness import ENVIRONMENT

NAMES = (
    "bert_step",
    "families",
    "host_overhead",
    "compile_time",
    "cross_entropy",
    "optimizers",
    "prepare",
    "reader",
    "decode",
    "linear_attention",
    "linear_kernel",
    "mixture",
    "gpu",
    "checkpoint",
    "report",
)
APART = ("chaos", "chaos_plain", "expert_parallel", "sweep")
"""Run when they are named, not with all."""


def main() -> None:
    """Runs those that are named, all by default."""
    chosen = sys.argv[1:] or list(NAMES)
    unknown = [name for name in chosen if name not in (*NAMES, *APART)]
    if unknown:
        sys.exit(f"python -m benchmarks: no benchmark {unknown[0]!r}: expected {', '.join((*NAMES, *APART))}")
    os.environ.update(ENVIRONMENT)
    for name in chosen:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
