"""Qwen3-Next as `transformers` lays it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models.families.family import Family
from models.hub.layout import Layout, Tensor, heads_in, heads_out, rows_padded, same, turned, turned_entry
from models.hub.llama import scaling
from partitioning import UserError

LINEAR, SOFTMAX = "linear_attention", "full_attention"
# Our names of an expert's, or a feed-forward layer's, matrices.
FORWARD = (("gate", "inner"), ("up", "gate"), ("down", "outer"))


class Qwen3Next(Layout):
    """See `Layout`."""

    models = ("qwen3_next",)
    shown = ("layers", "hidden", "tied", "experts", "expert_hidden", "shared")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name."""
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        rope = config.get("rope_parameters") or {}
        if config["hidden_act"] != "silu":
            raise UserError(f"hidden_act = {config['hidden_act']!r}: expected 'silu'")
        if config.get("attention_bias"):
            raise UserError("attention_bias = true: this family's projections have no biases")
        if scaling(config) is not None:
            raise UserError("rope_type: expected default, this family's rotary frequencies are not scaled")
        sizes = {
            "width": config["hidden_size"],
            "layers": layers,
            "interval": interval(config),
            "heads": heads,
            "kv_heads": config["num_key_value_heads"],
            "head_width": config.get("head_dim") or config["hidden_size"] // heads,
            "theta": float(config.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
            "rotary": config.get("partial_rotary_factor") or rope.get("partial_rotary_factor", 0.25),
            "delta_heads": config["linear_num_value_heads"],
            "delta_key_heads": config["linear_num_key_heads"],
            "delta_key_width": config["linear_key_head_dim"],
            "delta_value_width": config["linear_value_head_dim"],
            "convolution": config["linear_conv_kernel_dim"],
            "hidden": config["intermediate_size"],
            "experts": config["num_experts"] if sparse(config) else 0,
            "tied": bool(config.get("tie_word_embeddings", False)),
            "eps": config["rms_norm_eps"],
        }
        if not sizes["experts"]:
            return sizes
        return sizes | {
            "top_k": config["num_experts_per_tok"],
            "expert_hidden": config["moe_intermediate_size"],
            "shared": config["shared_expert_intermediate_size"],
            "renormalise": config["norm_topk_prob"],
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """With the kind of every layer written out."""
        family, vocabulary = trunk.family, trunk.vocabulary
        rope = {"rope_type": "default", "rope_theta": family["theta"], "partial_rotary_factor": family["rotary"]}
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "vocab_size": vocabulary.size,
            "hidden_size": family["width"],
            "num_hidden_layers": family["layers"],
            "full_attention_interval": family["interval"],
            "layer_types": kinds(family["layers"], family["interval"]),
            "num_attention_heads": family["heads"],
            "num_key_value_heads": family["kv_heads"],
            "head_dim": family["head_width"],
            "hidden_act": "silu",
            "rope_theta": family["theta"],
            "partial_rotary_factor": family["rotary"],
            "rope_parameters": rope,
            "linear_num_value_heads": family["delta_heads"],
            "linear_num_key_heads": family["delta_key_heads"],
            "linear_key_head_dim": family["delta_key_width"],
            "linear_value_head_dim": family["delta_value_width"],
            "linear_conv_kernel_dim": family["convolution"],
            "intermediate_size": family["hidden"],
            "num_experts": family["experts"],
            "num_experts_per_tok": family["top_k"],
            "moe_intermediate_size": family["expert_hidden"],
            "shared_expert_intermediate_size": family["shared"],
            "norm_topk_prob": family["renormalise"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "rms_norm_eps": family["eps"],
            "attention_bias": False,
            "tie_word_embeddings": family["tied"],
            "pad_token_id": vocabulary.pad,
            "bos_token_id": vocabulary.bos,
            "eos_token_id": vocabulary.eos,
        }

    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Embeddings, layers, head."""
        size = family["vocabulary"]
        yield rows_padded("model.embed_tokens.weight", "table", rows, size)
        for i, kind in enumerate(kinds(family["layers"], family["interval"])):
            theirs, ours = f"model.layers.{i}", f"stack/layers/{i}"
            mixer = _softmax if kind == SOFTMAX else _delta
            yield from mixer(family, theirs, f"{ours}/mixer")
            yield same(f"{theirs}.input_layernorm.weight", f"{ours}/mixer_norm/scale")
            yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours}/feed_forward_norm/scale")
            yield from _forward(family, f"{theirs}.mlp", f"{ours}/feed_forward")
        yield same("model.norm.weight", "final_norm/scale")
        if not family["tied"]:
            yield rows_padded("lm_head.weight", "head/table", rows, size)

    def spare(self, name: str) -> bool:
        """A tied head that was written out, and the layers that predict several tokens."""
        return name == "lm_head.weight" or name.startswith("mtp.")


def interval(config: Mapping[str, Any]) -> int:
    """Every how many layers one is of softmax attention; raises UserError where that is not regular."""
    layers, told = config["num_hidden_layers"], config.get("layer_types")
    found = config.get("full_attention_interval")
    if found is None:
        found = 4 if told is None else told.index(SOFTMAX) + 1 if SOFTMAX in told else layers + 1
    if told is not None and list(told) != kinds(layers, found):
        raise UserError(f"layer_types: expected {SOFTMAX} in every {found}th layer and {LINEAR} elsewhere")
    return found


def kinds(layers: int, interval: int) -> list[str]:
    """Their name of each layer's mixer."""
    return [LINEAR if (i + 1) % interval else SOFTMAX for i in range(layers)]


def sparse(config: Mapping[str, Any]) -> bool:
    """Whether the layers have experts; raises UserError where some have and others have not."""
    plain, step = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step") or 1
    found = {i not in plain and (i + 1) % step == 0 for i in range(config["num_hidden_layers"])}
    if config["num_experts"] and len(found) > 1:
        raise UserError("mlp_only_layers, decoder_sparse_step: expected experts in every layer, or in none")
    return bool(config["num_experts"]) and True in found


def _softmax(family: Family, theirs: str, ours: str) -> Iterator[Tensor]:
    heads, own = family["heads"], family["kv_heads"]
    # Each head's query and gate stand behind each other.
    come = lambda x: tuple(np.split(x.T.reshape(x.shape[1], heads, -1), 2, axis=-1))
    go = lambda *both: np.concatenate(both, axis=-1).reshape(len(both[0]), -1).T
    yield Tensor(f"{theirs}.self_attn.q_proj.weight", (f"{ours}/query", f"{ours}/gate"), come, go)
    yield heads_in(f"{theirs}.self_attn.k_proj.weight", f"{ours}/key", own)
    yield heads_in(f"{theirs}.self_attn.v_proj.weight", f"{ours}/value", own)
    yield heads_out(f"{theirs}.self_attn.o_proj.weight", f"{ours}/out", heads)
    for letter, name in (("q", "query"), ("k", "key")):
        yield same(f"{theirs}.self_attn.{letter}_norm.weight", f"{ours}/{name}_norm/scale")


def _delta(family: Family, theirs: str, ours: str) -> Iterator[Tensor]:
    theirs, heads, groups = f"{theirs}.linear_attn", family["delta_heads"], family["delta_key_heads"]
    keys, values = family["delta_key_width"], family["delta_value_width"]
    # A head of keys, and behind it what belongs to its heads of values.
    widths = [keys, keys, heads // groups * values, heads // groups * values]
    names = tuple(f"{ours}/{name}" for name in ("query", "key", "value", "gate"))
    yield _grouped(f"{theirs}.in_proj_qkvz.weight", names, groups, widths, [(groups, keys)] * 2 + [(heads, values)] * 2)
    both = (f"{ours}/rate", f"{ours}/decay")
    yield _grouped(f"{theirs}.in_proj_ba.weight", both, groups, [heads // groups] * 2, [(heads,)] * 2)
    shapes = [(groups, keys), (groups, keys), (heads, values)]
    ends = np.cumsum([a * b for a, b in shapes])[:-1]
    come = lambda x: tuple(
        part[:, 0].T.reshape(-1, *shape) for part, shape in zip(np.split(x, ends), shapes, strict=True)
    )
    go = lambda *parts: np.concatenate([part.reshape(len(part), -1).T[:, None] for part in parts])
    convolutions = tuple(f"{ours}/{name}_conv/kernel" for name in ("query", "key", "value"))
    yield Tensor(f"{theirs}.conv1d.weight", convolutions, come, go)
    yield same(f"{theirs}.A_log", f"{ours}/log_strength")
    yield same(f"{theirs}.dt_bias", f"{ours}/decay_bias")
    yield same(f"{theirs}.norm.weight", f"{ours}/norm/scale")
    yield heads_out(f"{theirs}.out_proj.weight", f"{ours}/out", heads)


def _grouped(
    name: str, leaves: tuple[str, ...], groups: int, widths: list[int], shapes: list[tuple[int, ...]]
) -> Tensor:
    """Several projections, [outputs, inputs] together, the parts of one group of heads behind each other."""
    ends = np.cumsum(widths)[:-1]

    def come(x):
        parts = np.split(x.T.reshape(x.shape[1], groups, -1), ends, axis=-1)
        return tuple(part.reshape(x.shape[1], *shape) for part, shape in zip(parts, shapes, strict=True))

    def go(*parts):
        apart = [part.reshape(len(part), groups, -1) for part in parts]
        return np.concatenate(apart, axis=-1).reshape(len(parts[0]), -1).T

    return Tensor(name, leaves, come, go)


def _forward(family: Family, theirs: str, ours: str) -> Iterator[Tensor]:
    if not family["experts"]:
        for word, name in FORWARD:
            yield turned(f"{theirs}.{word}_proj.weight", f"{ours}/{name}")
        return
    yield turned(f"{theirs}.gate.weight", f"{ours}/router/kernel")
    for e in range(family["experts"]):
        for word, name in FORWARD:
            yield turned_entry(f"{theirs}.experts.{e}.{word}_proj.weight", f"{ours}/{name}", e)
    for word, name in FORWARD:
        yield turned(f"{theirs}.shared_expert.{word}_proj.weight", f"{ours}/shared/{name}")
    yield Tensor(f"{theirs}.shared_expert_gate.weight", (f"{ours}/shared_gate",), lambda x: (x[0],), lambda x: x[None])
