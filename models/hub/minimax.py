"""MiniMax as `transformers` lays it out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models.families.family import Family
from models.hub.layout import Layout, Tensor, heads_in, heads_out, rows_padded, same
from models.hub.llama import scaling
from models.hub.mixtral import experts
from partitioning import UserError

KINDS = {"linear_attention": "linear", "full_attention": "softmax"}
FACTORS = {"linear_factors": "linear_attn", "softmax_factors": "full_attn", "feed_forward_factors": "mlp"}


class MiniMax(Layout):
    """See `Layout`."""

    models = ("minimax",)
    shown = ("layers", "hidden", "tied")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name."""
        heads = config["num_attention_heads"]
        if config["hidden_act"] != "silu":
            raise UserError(f"hidden_act = {config['hidden_act']!r}: expected 'silu'")
        if scaling(config) is not None:
            raise UserError("rope_parameters: expected rope_type 'default'")
        unknown = sorted({kind for kind in config["layer_types"] if kind not in KINDS})
        if unknown:
            raise UserError(f"layer_types has {unknown[0]!r}: expected {' or '.join(map(repr, KINDS))}")
        parameters = config.get("rope_parameters") or {}
        factors = {
            ours: (float(config.get(f"{name}_alpha_factor", 1)), float(config.get(f"{name}_beta_factor", 1)))
            for ours, name in FACTORS.items()
        }
        return factors | {
            "width": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_width": config.get("head_dim") or config["hidden_size"] // heads,
            "hidden": config["intermediate_size"],
            "experts": config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "pattern": shortest([KINDS[kind] for kind in config["layer_types"]]),
            "theta": float(config.get("rope_theta") or parameters.get("rope_theta", 1_000_000.0)),
            "window": config.get("sliding_window"),
            "tied": bool(config.get("tie_word_embeddings", False)),
            "eps": config["rms_norm_eps"],
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """Their config."""
        family, vocabulary = trunk.family, trunk.vocabulary
        if not family["plain"]:
            raise UserError(
                "this MiniMax has other feed-forward layers than experts, which `transformers` does not have"
            )
        theirs = {ours: name for name, ours in KINDS.items()}
        kinds = [theirs[family["pattern"][i % len(family["pattern"])]] for i in range(family["layers"])]
        factors = {
            f"{name}_{letter}_factor": value
            for ours, name in FACTORS.items()
            for letter, value in zip(("alpha", "beta"), family[ours], strict=True)
        }
        return factors | {
            "architectures": ["MiniMaxForCausalLM"],
            "model_type": "minimax",
            "vocab_size": vocabulary.size,
            "hidden_size": family["width"],
            "num_hidden_layers": family["layers"],
            "num_attention_heads": family["heads"],
            "num_key_value_heads": family["kv_heads"],
            "head_dim": family["head_width"],
            "intermediate_size": family["hidden"],
            "num_local_experts": family["experts"],
            "num_experts_per_tok": family["top_k"],
            "layer_types": kinds,
            "hidden_act": "silu",
            "rope_theta": family["theta"],
            "rope_parameters": {"rope_type": "default", "rope_theta": family["theta"]},
            "rms_norm_eps": family["eps"],
            "sliding_window": family["window"],
            "tie_word_embeddings": family["tied"],
            "pad_token_id": vocabulary.pad,
            "bos_token_id": vocabulary.bos,
            "eos_token_id": vocabulary.eos,
        }

    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Embeddings, layers, head."""
        size, heads = family["vocabulary"], family["heads"]
        yield rows_padded("model.embed_tokens.weight", "table", rows, size)
        for i in range(family["layers"]):
            theirs, ours = f"model.layers.{i}", f"stack/layers/{i}"
            if family["pattern"][i % len(family["pattern"])] == "linear":
                names = tuple(f"{ours}/mixer/{name}" for name in ("query", "key", "value"))
                yield by_head(f"{theirs}.self_attn.qkv_proj.weight", names, heads)
                yield heads_in(f"{theirs}.self_attn.output_gate.weight", f"{ours}/mixer/gate", heads)
                yield same(f"{theirs}.self_attn.norm.weight", f"{ours}/mixer/norm/scale")
                yield heads_out(f"{theirs}.self_attn.out_proj.weight", f"{ours}/mixer/out", heads)
            else:
                for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
                    count = heads if letter == "q" else family["kv_heads"]
                    yield heads_in(f"{theirs}.self_attn.{letter}_proj.weight", f"{ours}/mixer/{name}", count)
                yield heads_out(f"{theirs}.self_attn.o_proj.weight", f"{ours}/mixer/out", heads)
            yield from experts(f"{theirs}.block_sparse_moe", f"{ours}/feed_forward", family["experts"])
            yield same(f"{theirs}.input_layernorm.weight", f"{ours}/mixer_norm/scale")
            yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours}/feed_forward_norm/scale")
        yield same("model.norm.weight", "final_norm/scale")
        if not family["tied"]:
            yield rows_padded("lm_head.weight", "head/table", rows, size)

    def spare(self, name: str) -> bool:
        """A tied head, and the constants of the decays that their layers keep."""
        return name == "lm_head.weight" or bool(
            re.search(r"\.self_attn\.(slope_rate|(query|key|diagonal)_decay)$", name)
        )


def shortest(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern whose repetition begins with these kinds."""
    fits = lambda n: all(kind == kinds[i % n] for i, kind in enumerate(kinds))
    return tuple(kinds[: next(n for n in range(1, len(kinds) + 1) if fits(n))])


def by_head(name: str, leaves: tuple[str, ...], heads: int) -> Tensor:
    """Several projections to heads in one: theirs [H, number of leaves, K, D] as a matrix, ours [D, H, K] each."""
    count = len(leaves)

    def come(x: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = x.reshape(heads, count, -1, x.shape[-1])
        return tuple(parts[:, i].transpose(2, 0, 1) for i in range(count))

    def go(*ours: np.ndarray) -> np.ndarray:
        return np.stack([x.transpose(1, 2, 0) for x in ours], axis=1).reshape(-1, ours[0].shape[0])

    return Tensor(name, leaves, come, go)
