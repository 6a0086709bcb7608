"""A training step of a BERT-like encoder against torch and `transformers` on the same cores, float32.

    python -m benchmarks bert_step

4 layers, width 256, 4 heads, 32 rows of 128 tokens, 8,192 tokens of vocabulary, AdamW, 15 % masked. Ours is a run's own
step: placement of the batch, draws, masking, loss, gradient, clipping, update and norms; its last layer computes keys and
values for all tokens, and all else at the masked positions only, which changes no loss and no gradient. torch gets masked
tokens ready made and does not clip. Its two rows: `transformers.BertForMaskedLM` as it ships, which scores every token, and
the same model whose head sees the masked positions only, as ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.harness import Contestant, alternate
from benchmarks.runs import bert, stepping

TARGET = 0.8
RATE = 1e-4


def ours(unroll: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a step of the run, placement of its batch included."""
    from training.loop import step_flops

    turn, plan, facts = stepping(bert(unroll=unroll))
    return turn, facts | {"flops": step_flops(plan, plan.stages[0]).flops}


def theirs(gathered: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: a step of torch, with or without its head on the masked positions only."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = torch_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    draw = np.random.default_rng(0)
    tokens = torch.tensor(draw.integers(6, 8192, (32, 128)))
    places = torch.tensor(np.sort(draw.permuted(np.tile(np.arange(128), (32, 1)), axis=1)[:, :19], axis=1))

    def turn() -> None:
        optimizer.zero_grad()
        torch_loss(model, tokens, places, tokens.gather(1, places), gathered).backward()
        optimizer.step()

    return turn, {}


def torch_model() -> Any:
    """`BertForMaskedLM` of the same size, without dropout."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config).train()


def torch_loss(model: Any, tokens: Any, places: Any, targets: Any, gathered: bool) -> Any:
    """The mean loss at the masked places, `[B, K]`, of tokens `[B, S]`."""
    import torch

    seen = torch.ones_like(tokens)
    if not gathered:
        labels = torch.full_like(tokens, -100).scatter(1, places, targets)
        return model(input_ids=tokens, attention_mask=seen, labels=labels).loss
    hidden = model.bert(input_ids=tokens, attention_mask=seen).last_hidden_state
    picked = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)
    return torch.nn.functional.cross_entropy(model.cls(picked), targets.flatten())


def formula(layers: int = 4, width: int = 256, length: int = 128, rows: int = 32, vocabulary: int = 8192) -> float:
    """FLOPs of a step by hand: three times 2 n m k for each matrix product of the forward pass."""
    places = -(-15 * length // 100)
    block = lambda queries: 2 * rows * (2 * length * width**2 + queries * (10 * width**2 + 2 * length * width))
    head = 2 * rows * places * (width**2 + width * vocabulary)
    return 3.0 * ((layers - 1) * block(length) + block(places) + head)


def agreement(steps: int = 4) -> float:
    """The largest difference of losses over a few AdamW steps from the same weights, on the same masked tokens."""
    import jax
    import torch

    from objectives.draws import draws
    from training.optimizers import is_norm_or_bias

    plan = bert(clip=None).plan()
    stage = plan.stages[0]
    program, state = plan.compile(stage), plan.init()
    model = torch_model()
    load(model, {name: np.asarray(value) for name, value in state.params.items()})
    # One optimizer for the embeddings and matrices, which decay, and the others, which do not.
    flat = [p for n, p in model.named_parameters() if is_norm_or_bias(n.replace("LayerNorm", "norm").replace(".", "/"))]
    rest = [p for p in model.parameters() if not any(p is other for other in flat)]
    groups = [{"params": rest, "weight_decay": 0.01}, {"params": flat, "weight_decay": 0.0}]
    optimizer, worst = torch.optim.AdamW(groups, lr=RATE), 0.0
    objective, vocabulary = stage.step.objective, plan.trees.models(state.params, {}, {}).trunk.vocabulary

    @jax.jit
    def masked(batch: Any, step: Any) -> tuple[Any, Any]:
        key = draws(jax.random.key(plan.run.seed), step, batch["row"], 32)
        hide = objective.select(batch, vocabulary, step=step, key=key)
        return hide, objective.replace(batch["tokens"], hide, vocabulary, key=key)

    for step in range(steps):
        batch = stage.reader.batch(step, batch_size=32, length=128)
        hide, seen = masked(batch, step)
        used = int(hide.weight[0].sum())
        as_torch = lambda x: torch.tensor(np.asarray(x), dtype=torch.long)
        places = as_torch(hide.positions[:, :used])
        targets = as_torch(batch["tokens"]).gather(1, places)
        optimizer.zero_grad()
        loss = torch_loss(model, as_torch(seen), places, targets, gathered=True)
        loss.backward()
        optimizer.step()
        state, out = program(state, plan.put(stage, batch))
        worst = max(worst, abs(loss.item() - float(out["metrics"]["loss"])))
    return worst


def load(model: Any, params: dict[str, np.ndarray]) -> None:
    """Copies a trunk's parameters into torch's model."""
    import torch

    bert, head = model.bert, model.cls.predictions
    width = model.config.hidden_size

    def put(target: Any, value: np.ndarray) -> None:
        with torch.no_grad():
            target.copy_(torch.tensor(np.ascontiguousarray(value)).reshape(target.shape))

    def norm(target: Any, name: str, take: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
        put(target.weight, take(params[f"trunk/{name}/scale"]))
        put(target.bias, take(params[f"trunk/{name}/bias"]))

    put(bert.embeddings.word_embeddings.weight, params["trunk/table"])
    put(bert.embeddings.position_embeddings.weight, params["trunk/positions/table"])
    put(bert.embeddings.token_type_embeddings.weight, np.zeros((2, width), np.float32))
    norm(bert.embeddings.LayerNorm, "embedding_norm")
    for i, layer in enumerate(bert.encoder.layer):
        prefix = "trunk/stack/scanned/0"
        one = lambda name, i=i: params[f"{prefix}/{name}"][i]  # noqa: B023
        attention = layer.attention
        for name in ("query", "key", "value"):
            put(getattr(attention.self, name).weight, one(f"mixer/{name}").reshape(width, -1).T)
            put(getattr(attention.self, name).bias, one(f"mixer/{name}_bias"))
        put(attention.output.dense.weight, one("mixer/out").reshape(-1, width).T)
        put(attention.output.dense.bias, one("mixer/out_bias"))
        take = lambda x, i=i: x[i]
        norm(attention.output.LayerNorm, "stack/scanned/0/mixer_norm", take)
        put(layer.intermediate.dense.weight, one("feed_forward/inner").T)
        put(layer.intermediate.dense.bias, one("feed_forward/inner_bias"))
        put(layer.output.dense.weight, one("feed_forward/outer").T)
        put(layer.output.dense.bias, one("feed_forward/outer_bias"))
        norm(layer.output.LayerNorm, "stack/scanned/0/feed_forward_norm", take)
    put(head.transform.dense.weight, params["trunk/head/dense"].T)
    put(head.transform.dense.bias, params["trunk/head/dense_bias"])
    norm(head.transform.LayerNorm, "head/norm")
    put(head.bias, params["trunk/head/bias"])


def main() -> None:
    """Measures and writes the section."""
    names = {"scanned": "ours, scanned", "unrolled": "ours, scanned with unroll = 4"}
    contestants = [
        Contestant(names["scanned"], __name__, "ours", unroll=1),
        Contestant(names["unrolled"], __name__, "ours", unroll=4),
        Contestant("torch, masked positions gathered before the head", __name__, "theirs", gathered=True),
        Contestant("transformers as it ships", __name__, "theirs", gathered=False),
    ]
    found = alternate(contestants)
    gathered, ships = contestants[2].name, contestants[3].name
    rows = []
    for c in contestants:
        low, high = found.ratios(c.name, gathered)
        over = f"{found.ratio(c.name, gathered):.2f} ({low:.2f} to {high:.2f})"
        rows.append((c.name, f"{1e3 * found.seconds(c.name):.0f}", over, f"{found.ratio(c.name, ships):.2f}"))
    facts = found.facts[names["scanned"]]
    best = min(found.ratio(name, gathered) for name in names.values())
    flops = facts["flops"]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("a step of", "ms", "over torch, gathered", "over transformers"), rows),
            "",
            f"Target: at most {TARGET} of torch, gathered. Scanned {found.ratio(names['scanned'], gathered):.2f}, best {best:.2f}.",
            f"Losses from the same weights and masks, over 4 steps: at most {agreement():.1e} apart.",
            f"FLOPs of a step: {flops / 1e9:.1f} G by `training.loop.step_flops`, {formula() / 1e9:.1f} G by hand; "
            f"{flops / found.seconds(names['scanned']) / 1e9:.0f} GFLOP/s scanned.",
            f"Temporaries of the step: {facts['temporary'] / 2**20:.0f} MiB.",
            "",
            f"{found.note()}.",
        ]
    )
    results.write("bert_step", "A step of a BERT-like encoder", body)
