"""Mixtral as `transformers` lays it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.families.family import Family
from models.hub.layout import Layout, Tensor, heads_in, heads_out, rows_padded, same, turned, turned_entry
from models.hub.llama import scaling
from partitioning import UserError


class Mixtral(Layout):
    """See `Layout`."""

    models = ("mixtral",)
    shown = ("layers", "hidden", "tied")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name."""
        return plain(config) | {
            "head_width": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            "experts": config["num_local_experts"],
            "theta": theta(config, 1_000_000.0),
            "window": config.get("sliding_window"),
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """Their config."""
        family = trunk.family
        return shared_config(trunk) | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "head_dim": family["head_width"],
            "num_local_experts": family["experts"],
            "sliding_window": family["window"],
        }

    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Embeddings, layers, head."""
        yield from outside(family, rows)
        for i in range(family["layers"]):
            theirs, ours = f"model.layers.{i}", f"stack/layers/{i}"
            yield from attended(family, theirs, ours)
            yield from experts(f"{theirs}.block_sparse_moe", f"{ours}/feed_forward", family["experts"])

    def spare(self, name: str) -> bool:
        """A tied head that was written out."""
        return name == "lm_head.weight"


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that decoders of experts name alike; raises UserError for what they do not have here."""
    if config["hidden_act"] != "silu":
        raise UserError(f"hidden_act = {config['hidden_act']!r}: expected 'silu'")
    if scaling(config) is not None:
        raise UserError("rope_parameters: expected rope_type 'default'")
    if config.get("attention_bias"):
        raise UserError("attention_bias = true: this family's projections have no biases")
    heads = config["num_attention_heads"]
    return {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "hidden": config["intermediate_size"],
        "top_k": config["num_experts_per_tok"],
        "tied": bool(config.get("tie_word_embeddings", False)),
        "eps": config["rms_norm_eps"],
    }


def theta(config: Mapping[str, Any], default: float) -> float:
    """The base of the rotary frequencies, where older versions and newer ones have it."""
    parameters = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or parameters.get("rope_theta", default))


def shared_config(trunk: Any) -> dict[str, Any]:
    """The part of a config that decoders of experts have alike."""
    family, vocabulary = trunk.family, trunk.vocabulary
    return {
        "vocab_size": vocabulary.size,
        "hidden_size": family["width"],
        "num_hidden_layers": family["layers"],
        "num_attention_heads": family["heads"],
        "num_key_value_heads": family["kv_heads"],
        "intermediate_size": family["hidden"],
        "num_experts_per_tok": family["top_k"],
        "hidden_act": "silu",
        "rope_theta": family["theta"],
        "rope_parameters": {"rope_type": "default", "rope_theta": family["theta"]},
        "rms_norm_eps": family["eps"],
        "tie_word_embeddings": family["tied"],
        "pad_token_id": vocabulary.pad,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
    }


def outside(family: Family, rows: int) -> Iterator[Tensor]:
    """What stands around the layers."""
    yield rows_padded("model.embed_tokens.weight", "table", rows, family["vocabulary"])
    yield same("model.norm.weight", "final_norm/scale")
    if not family["tied"]:
        yield rows_padded("lm_head.weight", "head/table", rows, family["vocabulary"])


def attended(family: Family, theirs: str, ours: str) -> Iterator[Tensor]:
    """A layer's attention and its norms."""
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        count = family["heads"] if letter == "q" else family["kv_heads"]
        yield heads_in(f"{theirs}.self_attn.{letter}_proj.weight", f"{ours}/mixer/{name}", count)
    yield heads_out(f"{theirs}.self_attn.o_proj.weight", f"{ours}/mixer/out", family["heads"])
    yield same(f"{theirs}.input_layernorm.weight", f"{ours}/mixer_norm/scale")
    yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours}/feed_forward_norm/scale")


def experts(name: str, leaf: str, count: int) -> Iterator[Tensor]:
    """A router and its experts: w1 is activated, w3 gates, w2 goes out."""
    yield turned(f"{name}.gate.weight", f"{leaf}/router/kernel")
    for e in range(count):
        for theirs, ours in (("w1", "inner"), ("w3", "gate"), ("w2", "outer")):
            yield turned_entry(f"{name}.experts.{e}.{theirs}.weight", f"{leaf}/{ours}", e)
