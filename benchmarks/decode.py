"""Greedy decoding with a Llama against `transformers.generate` on the same cores, float32.

    python -m benchmarks decode

Large: 8 layers, width 512, 8 heads (4 of keys), feed-forward layers of 1,408, 32,000 tokens of vocabulary, tied. Small: the
Llama of `families`, 4 layers, width 256, 4 heads (2 of keys), 704, 8,192 tokens. The same weights on both sides. Prompts of 64
tokens, 128 new ones, none of which ends a row. All prompts are of one length, so that `transformers` pays for no padding. A
turn is one whole call, prompt included; a step is the time of a call that is not the prompt's, over its tokens. At batch 1
the floor is the time to read every weight once a token: beside the speed at which a step reads them stands that of the largest
element of 1 GiB of numbers, found by both cores in the same process.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.harness import Contestant, alternate

TARGET = 3.0
PROMPT, NEW = 64, 128
SIZES: dict[str, dict[str, Any]] = {
    "large": {"width": 512, "layers": 8, "heads": 8, "kv_heads": 4, "hidden": 1408, "theta": 10_000.0},
    "small": {"width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 704, "theta": 10_000.0},
}
VOCABULARIES = {"large": 32_000, "small": 8192}


def prompts(size: str, rows: int) -> np.ndarray:
    """Random ids, `[B, P]`."""
    return np.random.default_rng(0).integers(6, VOCABULARIES[size], (rows, PROMPT))


def trunk(size: str) -> Any:
    """Ours, at random."""
    from flax import nnx

    from models import Vocabulary, llama

    vocabulary = Vocabulary(size=VOCABULARIES[size], pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
    return llama(vocabulary, **SIZES[size], rngs=nnx.Rngs(0))


def read_speed() -> float:
    """Bytes a second out of main memory, the median of ten readings of 1 GiB."""
    import jax
    import jax.numpy as jnp

    numbers = jnp.ones((1 << 28,), jnp.float32)
    largest = jax.jit(jnp.max).lower(numbers).compile()
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        jax.block_until_ready(largest(numbers))
        seconds.append(time.perf_counter() - begin)
    return numbers.nbytes / statistics.median(seconds)


def ours(size: str, rows: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: one program of prefill and loop."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from models.decoding import Greedy, Prompts, Stop, TrunkDecoder, generate, unrolled

    graph, state = nnx.split(unrolled(trunk(size)))
    given = Prompts(jnp.asarray(prompts(size, rows), jnp.int32), jnp.ones((rows, PROMPT), jnp.int32))
    keys = jax.random.split(jax.random.key(0), rows)

    def run(state: Any, given: Any, length: int) -> Any:
        return generate(TrunkDecoder(nnx.merge(graph, state)), given, Greedy(), Stop(length=length), keys).tokens

    program, first = (jax.jit(partial(run, length=n)) for n in (NEW, 1))

    def timed(program: Any) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(program(state, given))
        return time.perf_counter() - begin

    facts = {
        "tokens": np.asarray(program(state, given)).tolist(),
        "prefill": statistics.median([timed(first) for _ in range(6)][1:]),
        "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "read": read_speed(),
    }

    def turn() -> None:
        jax.block_until_ready(program(state, given))

    return turn, facts


def theirs(size: str, rows: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: `transformers.generate` with its cache, from the weights that ours exports."""
    import torch
    import transformers
    from flax import nnx

    from models.hub.folder import export
    from models.stack import unstack
    from models.variables import flatten

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    made = trunk(size)
    values = {name: np.asarray(value) for name, value in unstack(flatten(made, nnx.Param)).items()}
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder) / "model", made, values)
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model").float().eval()
    given = torch.tensor(prompts(size, rows))
    how = {"attention_mask": torch.ones_like(given), "do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}

    def run() -> Any:
        with torch.inference_mode():
            return model.generate(given, pad_token_id=0, eos_token_id=None, **how)

    def turn() -> None:
        run()

    return turn, {"tokens": run()[:, PROMPT:].tolist()}


def main() -> None:
    """Measures and writes the section."""
    rows = []
    for size, batch in itertools.product(SIZES, (1, 16)):
        mine, other = (
            Contestant(f"{side} {size} {batch}", __name__, side, size=size, rows=batch) for side in ("ours", "theirs")
        )
        found = alternate([mine, other], wanted=9, times=1)
        low, high = found.ratios(other.name, mine.name)
        speed = lambda c, found=found, batch=batch: f"{batch * NEW / found.seconds(c.name):.0f}"
        alike = np.mean(np.equal(mine.facts["tokens"], other.facts["tokens"]))
        step = (found.seconds(mine.name) - mine.facts["prefill"]) / (NEW - 1)
        rows.append(
            (
                size,
                batch,
                speed(mine),
                speed(other),
                f"{found.ratio(other.name, mine.name):.2f} ({low:.2f} to {high:.2f})",
                f"{1e3 * step:.1f}",
                f"{mine.facts['bytes'] / step / 1e9:.0f}",
                f"{mine.facts['read'] / 1e9:.0f}",
                f"{100 * alike:.0f} %",
                found.note(),
            )
        )
    head = (
        "model",
        "batch",
        "ours",
        "`transformers`",
        "ratio",
        "ms a step",
        "GB/s of weights",
        "GB/s of memory",
        "tokens alike",
        "rounds",
    )
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(head, rows),
            "",
            f"Tokens a second, of {NEW} new ones a row. Target: {TARGET} times `transformers`.",
        ]
    )
    results.write("decode", "Decoding", body)


if __name__ == "__main__":
    main()
