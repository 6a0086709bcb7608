"""Llama, Mistral and Qwen3 as `transformers` lays them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.families.family import Family
from models.hub.layout import Layout, Tensor, heads_bias, heads_in, heads_out, rows_padded, same, turned
from models.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from partitioning import UserError


def scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """Their `rope_scaling` (or, from `transformers` 5 on, `rope_parameters`) as ours."""
    asked = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = asked.get("rope_type", asked.get("type", "default"))
    longest = asked.get("original_max_position_embeddings", config.get("max_position_embeddings", 0))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=asked["factor"])
    if kind == "llama3":
        slow, fast = asked["low_freq_factor"], asked["high_freq_factor"]
        return Llama3Scaling(factor=asked["factor"], slow=slow, fast=fast, longest=longest)
    if kind == "yarn" and not {"attention_factor", "mscale", "truncate"} & {
        k for k, v in asked.items() if v is not None
    }:
        slow, fast = asked.get("beta_slow") or 1.0, asked.get("beta_fast") or 32.0
        return YarnScaling(factor=asked["factor"], slow=slow, fast=fast, longest=longest)
    raise UserError(f"rope_type = {kind!r}: expected default, linear, llama3 or plain yarn")


def unscaled(rope: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `scaling`."""
    if rope is None:
        return {"rope_type": "default"}
    if isinstance(rope, LinearScaling):
        return {"rope_type": "linear", "factor": rope.factor}
    assert isinstance(rope, (Llama3Scaling, YarnScaling))
    kind, slow, fast = (
        ("llama3", "low_freq_factor", "high_freq_factor")
        if isinstance(rope, Llama3Scaling)
        else ("yarn", "beta_slow", "beta_fast")
    )
    turns = {slow: rope.slow, fast: rope.fast}
    return {"rope_type": kind, "factor": rope.factor, "original_max_position_embeddings": rope.longest, **turns}


class Llama(Layout):
    """See `Layout`."""

    models = ("llama", "mistral", "qwen3")
    shown = ("layers", "hidden", "tied")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name."""
        kind, heads = config["model_type"], config["num_attention_heads"]
        if config["hidden_act"] != "silu":
            raise UserError(f"hidden_act = {config['hidden_act']!r}: expected 'silu'")
        if config.get("mlp_bias"):
            raise UserError("mlp_bias = true: this family's feed-forward layers have no biases")
        window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
        if window is not None and kind != "mistral":
            raise UserError("use_sliding_window = true: expected the same attention in every layer")
        parameters = config.get("rope_parameters") or {}
        return {
            "width": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_width": config.get("head_dim") or config["hidden_size"] // heads,
            "hidden": config["intermediate_size"],
            "theta": float(config.get("rope_theta") or parameters.get("rope_theta", 10_000.0)),
            "scaling": scaling(config),
            "window": window,
            "qk_norm": kind == "qwen3",
            "bias": bool(config.get("attention_bias", False)),
            "tied": bool(config.get("tie_word_embeddings", False)),
            "eps": config["rms_norm_eps"],
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """Qwen3 where queries and keys are normalised, Mistral where there is a window, else Llama."""
        family, vocabulary = trunk.family, trunk.vocabulary
        if not family["plain"] or (family["qk_norm"] and family["window"] is not None):
            raise UserError(
                "this decoder (gated heads, norms elsewhere, or a window with normalised queries) is none that "
                "`transformers` has: expected a plain Llama, Mistral or Qwen3"
            )
        kind = "qwen3" if family["qk_norm"] else "llama" if family["window"] is None else "mistral"
        name = {"qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}[kind]
        return {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": kind,
            "vocab_size": vocabulary.size,
            "hidden_size": family["width"],
            "num_hidden_layers": family["layers"],
            "num_attention_heads": family["heads"],
            "num_key_value_heads": family["kv_heads"],
            "head_dim": family["head_width"],
            "intermediate_size": family["hidden"],
            "hidden_act": "silu",
            "rope_theta": family["theta"],
            "rope_parameters": unscaled(family["scaling"]) | {"rope_theta": family["theta"]},
            "rms_norm_eps": family["eps"],
            "attention_bias": family["bias"],
            "sliding_window": family["window"],
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
            for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
                heads = family["heads"] if letter == "q" else family["kv_heads"]
                yield heads_in(f"{theirs}.self_attn.{letter}_proj.weight", f"{ours}/mixer/{name}", heads)
                if family["bias"]:
                    yield heads_bias(f"{theirs}.self_attn.{letter}_proj.bias", f"{ours}/mixer/{name}_bias", heads)
                if family["qk_norm"] and letter != "v":
                    yield same(f"{theirs}.self_attn.{letter}_norm.weight", f"{ours}/mixer/{name}_norm/scale")
            yield heads_out(f"{theirs}.self_attn.o_proj.weight", f"{ours}/mixer/out", family["heads"])
            if family["bias"]:
                yield same(f"{theirs}.self_attn.o_proj.bias", f"{ours}/mixer/out_bias")
            yield same(f"{theirs}.input_layernorm.weight", f"{ours}/mixer_norm/scale")
            yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours}/feed_forward_norm/scale")
            for word, name in (("gate", "inner"), ("up", "gate"), ("down", "outer")):
                yield turned(f"{theirs}.mlp.{word}_proj.weight", f"{ours}/feed_forward/{name}")
        yield same("model.norm.weight", "final_norm/scale")
        if not family["tied"]:
            yield rows_padded("lm_head.weight", "head/table", rows, size)

    def spare(self, name: str) -> bool:
        """A tied head that was written out, and buffers that older versions kept."""
        return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
