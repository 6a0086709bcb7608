"""A training step of each family against the same architecture in `transformers` and torch on the same cores, float32.

    python -m benchmarks families

Every model has 4 layers (T5 4 on either side) of width 256 with 4 heads and 8,192 tokens of vocabulary, AdamW; 4,096 tokens
a step, T5's 16 rows read 192 and write 64. Ours is a run's own step, as in `bert_step`, scanned with unroll = 4. Theirs is
the model as it ships, with labels: BERT and ModernBERT score every token there, where ours scores the masked ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.harness import Contestant, alternate
from benchmarks.runs import RandomPairs, RandomText, stepping

TARGET = 0.9
RATE = 1e-4
V = 8192
SIZES = {"vocab_size": V, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Rows and their length; T5 writes rows of TARGETS tokens.
SHAPES = {"BERT": (32, 128), "ModernBERT": (8, 512), "Llama": (8, 512), "T5": (16, 192)}
TARGETS = 64


def run(family: str) -> Any:
    """A run of ours."""
    from models import Trunk, bert, llama, modernbert, t5
    from objectives import CausalLM, MaskedLM, Seq2Seq
    from training import Run
    from training.optimizers import AdamW

    sizes: dict[str, Any] = {"width": 256, "layers": 4, "heads": 4, "trunk": partial(Trunk, unroll=4)}
    models: dict[str, tuple[Callable[..., Any], Any, Any]] = {
        "BERT": (partial(bert, hidden=1024, longest=128), MaskedLM(), RandomText(V)),
        "ModernBERT": (partial(modernbert, hidden=768), MaskedLM(), RandomText(V)),
        "Llama": (partial(llama, hidden=704, kv_heads=2, tied=False), CausalLM(), RandomText(V)),
        "T5": (partial(t5, hidden=1024, head_width=64), Seq2Seq(), RandomPairs(V, target=TARGETS)),
    }
    model, objective, data = models[family]
    rows, length = SHAPES[family]
    return Run(
        model=partial(model, **sizes),
        data=data,
        objective=objective,
        steps=1000,
        batch_size=rows,
        length=length,
        optimizer=AdamW(learning_rate=RATE, weight_decay=0.01),
    )


def ours(family: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a step of the run, placement of its batch included."""
    from training.loop import step_flops

    turn, plan, facts = stepping(run(family))
    return turn, facts | {"flops": step_flops(plan, plan.stages[0]).flops}


def theirs(family: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a step of torch's fused AdamW over `transformers`' model."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, (rows, length) = torch_model(family), SHAPES[family]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    draw = np.random.default_rng(0)
    tokens = torch.tensor(draw.integers(6, V, (rows, length)))
    labels = tokens
    if family in ("BERT", "ModernBERT"):
        labels = torch.where(torch.tensor(draw.random((rows, length)) < 0.15), tokens, -100)
    if family == "T5":
        labels = torch.tensor(draw.integers(6, V, (rows, TARGETS)))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    def turn() -> None:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    return turn, {"parameters": sum(p.numel() for p in model.parameters())}


def torch_model(family: str) -> Any:
    """The same architecture and sizes, without dropout."""
    import transformers as t

    makes: dict[str, Callable[[], Any]] = {
        "BERT": lambda: t.BertForMaskedLM(
            t.BertConfig(**SIZES, **STILL, intermediate_size=1024, max_position_embeddings=128)
        ),
        "ModernBERT": lambda: t.ModernBertForMaskedLM(
            t.ModernBertConfig(**SIZES, intermediate_size=768, pad_token_id=0, cls_token_id=1, sep_token_id=2)
        ),
        "Llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**SIZES, intermediate_size=704, num_key_value_heads=2, max_position_embeddings=512)
        ),
        "T5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=V,
                d_model=256,
                d_kv=64,
                d_ff=1024,
                num_layers=4,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        ),
    }
    return makes[family]().float().train()


def main() -> None:
    """Measures and writes the section."""
    rows: list[tuple[str, ...]] = []
    for family in SHAPES:
        mine, other = (Contestant(f"{side} {family}", __name__, side, family=family) for side in ("ours", "theirs"))
        found = alternate([mine, other])
        low, high = found.ratios(mine.name, other.name)
        flops = found.facts[mine.name]["flops"]
        rows.append(
            (
                family,
                f"{mine.facts['parameters'] / 1e6:.2f} / {other.facts['parameters'] / 1e6:.2f}",
                f"{1e3 * found.seconds(mine.name):.0f}",
                f"{1e3 * found.seconds(other.name):.0f}",
                f"{found.ratio(mine.name, other.name):.2f} ({low:.2f} to {high:.2f})",
                f"{flops / found.seconds(mine.name) / 1e9:.0f}",
                found.note(),
            )
        )
        print(*rows[-1], sep=" | ", flush=True)
    head = ("family", "M parameters, ours / theirs", "ours, ms", "theirs, ms", "ratio", "GFLOP/s, ours", "rounds")
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(head, rows),
            "",
            f"Target: at most {TARGET}. GFLOP/s counts what ours computes.",
        ]
    )
    results.write("families", "A step of each family", body)


if __name__ == "__main__":
    main()
