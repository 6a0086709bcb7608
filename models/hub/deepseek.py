"""DeepSeek-V3 as `transformers` lays it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models.families.family import Family
from models.hub.layout import Layout, Tensor, heads_in, heads_out, rows_padded, same, turned, turned_entry
from models.hub.llama import scaling, unscaled
from models.rope_scaling import RopeScaling
from partitioning import UserError

# Our names of an expert's, or a feed-forward layer's, matrices.
FORWARD = (("gate", "inner"), ("up", "gate"), ("down", "outer"))


class DeepSeek(Layout):
    """See `Layout`."""

    models = ("deepseek_v3",)
    shown = ("layers", "dense", "hidden", "tied", "experts", "expert_hidden", "shared")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name."""
        expected = {"hidden_act": "silu", "attention_bias": False, "rope_interleave": True}
        for name, value in expected.items():
            if config.get(name, value) != value:
                raise UserError(f"{name} = {config[name]!r}: expected {value!r}")
        rope = config.get("rope_parameters") or {}
        return {
            "width": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "dense": min(config["first_k_dense_replace"], config["num_hidden_layers"]),
            "heads": config["num_attention_heads"],
            "query_rank": config["q_lora_rank"],
            "rank": config["kv_lora_rank"],
            "plain": config["qk_nope_head_dim"],
            "rotary": config["qk_rope_head_dim"],
            "value_width": config["v_head_dim"],
            "hidden": config["intermediate_size"],
            "experts": config["n_routed_experts"],
            "top_k": config["num_experts_per_tok"],
            "expert_hidden": config["moe_intermediate_size"],
            "shared": config["moe_intermediate_size"] * config["n_shared_experts"],
            "groups": config["n_group"],
            "top_groups": config["topk_group"],
            "renormalise": config["norm_topk_prob"],
            "scale": float(config["routed_scaling_factor"]),
            "theta": float(config.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
            "scaling": sharpened(config),
            "tied": bool(config.get("tie_word_embeddings", False)),
            "eps": config["rms_norm_eps"],
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """Shared experts are one, or as many as have an expert's features."""
        family, vocabulary = trunk.family, trunk.vocabulary
        if family["shared"] % family["expert_hidden"]:
            raise UserError(
                f"deepseek.shared = {family['shared']}: that layout has whole experts of {family['expert_hidden']} features"
            )
        rope = unscaled(family["scaling"]) | {"rope_theta": family["theta"]}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": vocabulary.size,
            "hidden_size": family["width"],
            "num_hidden_layers": family["layers"],
            "first_k_dense_replace": family["dense"],
            "num_attention_heads": family["heads"],
            "num_key_value_heads": family["heads"],
            "q_lora_rank": family["query_rank"],
            "kv_lora_rank": family["rank"],
            "qk_nope_head_dim": family["plain"],
            "qk_rope_head_dim": family["rotary"],
            "v_head_dim": family["value_width"],
            "intermediate_size": family["hidden"],
            "moe_intermediate_size": family["expert_hidden"],
            "n_routed_experts": family["experts"],
            "n_shared_experts": family["shared"] // family["expert_hidden"],
            "num_experts_per_tok": family["top_k"],
            "n_group": family["groups"],
            "topk_group": family["top_groups"],
            "norm_topk_prob": family["renormalise"],
            "routed_scaling_factor": family["scale"],
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_interleave": True,
            "rope_theta": family["theta"],
            "rope_parameters": rope if family["scaling"] is None else rope | {"mscale": 1.0, "mscale_all_dim": 1.0},
            "rms_norm_eps": family["eps"],
            "num_nextn_predict_layers": 0,
            "tie_word_embeddings": family["tied"],
            "pad_token_id": vocabulary.pad,
            "bos_token_id": vocabulary.bos,
            "eos_token_id": vocabulary.eos,
        }

    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Embeddings, layers, head."""
        size = family["vocabulary"]
        yield rows_padded("model.embed_tokens.weight", "table", rows, size)
        for i in range(family["layers"]):
            theirs, ours = f"model.layers.{i}", f"stack/layers/{i}"
            yield from _attention(family, f"{theirs}.self_attn", f"{ours}/mixer")
            yield same(f"{theirs}.input_layernorm.weight", f"{ours}/mixer_norm/scale")
            yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours}/feed_forward_norm/scale")
            theirs, ours = f"{theirs}.mlp", f"{ours}/feed_forward"
            if i < family["dense"]:
                yield from _dense(theirs, ours)
                continue
            yield turned(f"{theirs}.gate.weight", f"{ours}/router/kernel")
            yield same(f"{theirs}.gate.e_score_correction_bias", f"{ours}/router/bias")
            for e in range(family["experts"]):
                for word, name in FORWARD:
                    yield turned_entry(f"{theirs}.experts.{e}.{word}_proj.weight", f"{ours}/{name}", e)
            yield from _dense(f"{theirs}.shared_experts", f"{ours}/shared")
        yield same("model.norm.weight", "final_norm/scale")
        if not family["tied"]:
            yield rows_padded("lm_head.weight", "head/table", rows, size)

    def spare(self, name: str) -> bool:
        """A tied head that was written out."""
        return name == "lm_head.weight"


def sharpened(config: Mapping[str, Any]) -> RopeScaling | None:
    """Their scaling of rotary frequencies, where whole queries and keys are sharpened; raises UserError for another."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    asked = dict(config.get(name) or {})
    if asked.get("rope_type", asked.get("type", "default")) != "yarn":
        return scaling(config)
    both = (asked.pop("mscale", None), asked.pop("mscale_all_dim", None))
    if both != (1.0, 1.0):
        raise UserError(f"{name}: mscale and mscale_all_dim are {both[0]} and {both[1]}: expected 1 and 1")
    return scaling({**config, name: asked})


def _attention(family: Family, theirs: str, ours: str) -> Iterator[Tensor]:
    heads, rank, plain = family["heads"], family["rank"], family["plain"]
    if family["query_rank"] is None:
        query = heads_in(f"{theirs}.q_proj.weight", f"{ours}/query", heads)
    else:
        yield turned(f"{theirs}.q_a_proj.weight", f"{ours}/query_latent")
        yield same(f"{theirs}.q_a_layernorm.weight", f"{ours}/query_norm/scale")
        query = heads_in(f"{theirs}.q_b_proj.weight", f"{ours}/query", heads)
    yield Tensor(
        query.name,
        query.leaves,
        lambda x: (_behind(query.come(x)[0], plain, _halves),),
        lambda x: query.go(_behind(x, plain, _pairs)),
    )
    come = lambda x: (x[:rank].T, _halves(x[rank:].T))
    go = lambda latent, key: np.concatenate([latent.T, _pairs(key).T])
    yield Tensor(f"{theirs}.kv_a_proj_with_mqa.weight", (f"{ours}/latent", f"{ours}/rotary_key"), come, go)
    yield same(f"{theirs}.kv_a_layernorm.weight", f"{ours}/latent_norm/scale")
    # Each head's key and value stand behind each other.
    apart = lambda x: tuple(np.split(x.T.reshape(x.shape[1], heads, -1), [plain], axis=-1))
    together = lambda *both: np.concatenate(both, axis=-1).reshape(len(both[0]), -1).T
    yield Tensor(f"{theirs}.kv_b_proj.weight", (f"{ours}/key", f"{ours}/value"), apart, together)
    yield heads_out(f"{theirs}.o_proj.weight", f"{ours}/out", heads)


def _dense(theirs: str, ours: str) -> Iterator[Tensor]:
    for word, name in FORWARD:
        yield turned(f"{theirs}.{word}_proj.weight", f"{ours}/{name}")


def _behind(x: np.ndarray, plain: int, order: Any) -> np.ndarray:
    """With the features behind the plain ones in another order."""
    return np.concatenate([x[..., :plain], order(x[..., plain:])], axis=-1)


def _halves(x: np.ndarray) -> np.ndarray:
    """Rotated pairs that are neighbours, as the two halves."""
    return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


def _pairs(x: np.ndarray) -> np.ndarray:
    """The inverse of `_halves`."""
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)
