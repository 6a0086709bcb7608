"""Training steps in bfloat16 on one GPU, against `transformers` with SDPA and `torch.compile` on the same card.

    python -m benchmarks gpu

Llama: 16 layers of width 2,048, 128,256 tokens, 1.24 G parameters, 8 rows of 2,048 tokens. ModernBERT: 28 layers of width
1,024, 50,368 tokens, 395 M parameters, 32 rows of 512. Parameters and AdamW's moments float32, products bfloat16 on both
sides (torch under autocast). Ours: cuDNN attention, activations of a layer computed again in the backward pass where the
card has no room. Model FLOPs are those of `palmette train`: three times the forward products, causal attention by half.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.harness import Contestant, alternate
from benchmarks.runs import RandomText, stepping

# Both processes share the card.
SHARED = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
RATE = 1e-4
GOAL = 0.55
VOCABULARIES = {"Llama": 128_256, "ModernBERT": 50_368}
SHAPES = {"Llama": (8, 2048), "ModernBERT": (32, 512)}
LARGE: dict[str, dict[str, Any]] = {
    "Llama": {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "hidden": 8192},
    "ModernBERT": {"width": 1024, "layers": 28, "heads": 16, "hidden": 2624},
}


def at_hand() -> bool:
    """Whether jax sees a GPU; asked in a process of its own, which has no other platform forced on it."""
    probe = Contestant("probe", __name__, "probe", environment={"JAX_PLATFORMS": ""})
    probe.close()
    return probe.facts["platform"] == "gpu"


def probe() -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: says which platform jax takes."""
    import jax

    return (lambda: None), {"platform": jax.default_backend()}


def ours(family: str, remat: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a step of a run."""
    import jax

    from models import Attention, Trunk, llama, modernbert
    from objectives import CausalLM, MaskedLM
    from training import Run
    from training.flops import mfu, peak_flops
    from training.loop import step_flops
    from training.optimizers import AdamW

    make: Any = {"Llama": llama, "ModernBERT": modernbert}[family]
    model = partial(
        make,
        **LARGE[family],
        attention=partial(Attention, backend="cudnn"),
        trunk=partial(Trunk, dtype="bfloat16", remat=remat),
    )
    rows, length = SHAPES[family]
    run = Run(
        model=model,
        data=RandomText(VOCABULARIES[family]),
        objective=CausalLM() if family == "Llama" else MaskedLM(),
        steps=1000,
        batch_size=rows,
        length=length,
        optimizer=AdamW(learning_rate=RATE, weight_decay=0.01),
    )
    turn, plan, facts = stepping(run)
    one_second = mfu(step_flops(plan, plan.stages[0]), 1.0, devices=1, peak=peak_flops()).value
    return turn, facts | {"card": jax.devices()[0].device_kind, "one_second": one_second}


def theirs(family: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a compiled step of torch's fused AdamW over `transformers`' model."""
    import torch
    import transformers as t

    sizes, vocabulary = LARGE[family], VOCABULARIES[family]
    common = {
        "vocab_size": vocabulary,
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["hidden"],
        "attn_implementation": "sdpa",
    }
    rows, length = SHAPES[family]
    draw = np.random.default_rng(0)
    tokens = torch.tensor(draw.integers(6, vocabulary, (rows, length)), device="cuda")
    labels = tokens
    model: Any
    if family == "Llama":
        model = t.LlamaForCausalLM(
            t.LlamaConfig(**common, num_key_value_heads=sizes["kv_heads"], tie_word_embeddings=True)
        )
    else:
        model = t.ModernBertForMaskedLM(
            t.ModernBertConfig(**common, pad_token_id=0, cls_token_id=1, sep_token_id=2, sparse_prediction=True)
        )
        hidden = torch.tensor(draw.random((rows, length)) < 0.15, device="cuda")
        labels = torch.where(hidden, tokens, -100)
    model = model.float().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    compiled = torch.compile(model)

    def turn() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()

    return turn, {"parameters": sum(p.numel() for p in model.parameters())}


def row(family: str) -> tuple[Any, ...]:
    """Measures one family: without recomputation, or with where the card has no room for both."""
    contestant = partial(Contestant, module=__name__, environment=SHARED, family=family)
    try:
        mine, remat = contestant("ours", function="ours", remat="none"), "none"
        mine.turn(1)
    except RuntimeError:
        mine, remat = contestant("ours", function="ours", remat="full"), "full"
    other = contestant("theirs", function="theirs")
    found = alternate([mine, other])
    low, high = found.ratios("ours", "theirs")
    share = lambda name: f"{100 * mine.facts['one_second'] / found.seconds(name):.0f} %"
    return (
        family,
        mine.facts["card"],
        f"{mine.facts['parameters'] / 1e6:.0f} / {other.facts['parameters'] / 1e6:.0f}",
        remat,
        f"{1e3 * found.seconds('ours'):.0f}",
        f"{1e3 * found.seconds('theirs'):.0f}",
        f"{found.ratio('ours', 'theirs'):.2f} ({low:.2f} to {high:.2f})",
        share("ours"),
        share("theirs"),
        found.note(),
    )


def main() -> None:
    """Measures and writes the section; where there is no GPU it says so."""
    says = (__doc__ or "").split("\n\n")[-1].strip()
    if not at_hand():
        results.write("gpu", "Steps on a GPU", f"{says}\n\nNo GPU was at hand: nothing was measured.")
        return
    head = (
        "family",
        "card",
        "M parameters, ours / theirs",
        "remat",
        "ours, ms",
        "theirs, ms",
        "ratio",
        "MFU, ours",
        "MFU, theirs",
        "rounds",
    )
    rows = [row(family) for family in LARGE]
    body = [says, "", results.table(head, rows), "", f"Goal: an MFU of {GOAL:.0%}, ahead of torch."]
    results.write("gpu", "Steps on a GPU", "\n".join(body))


if __name__ == "__main__":
    main()
