"""ModernBERT as `transformers` lays it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.families.family import Family
from models.hub.layout import Layout, Tensor, heads_in, heads_out, joined, rows_padded, same, turned
from partitioning import UserError

PLAIN = {
    "attention_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
}


class ModernBert(Layout):
    """See `Layout`."""

    models = ("modernbert",)

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name."""
        for name, value in PLAIN.items():
            if config.get(name, value) != value:
                raise UserError(f"{name} = {config[name]!r}: this family has {value!r}")
        layers, every = config["num_hidden_layers"], config.get("global_attn_every_n_layers") or 3
        kinds = config.get("layer_types")
        expected = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
        if kinds is not None and list(kinds) != expected:
            every = next((i for i in range(1, layers) if kinds[i] == "full_attention"), layers)
            if list(kinds) != ["sliding_attention" if i % every else "full_attention" for i in range(layers)]:
                raise UserError("layer_types: expected full attention in every n-th layer from the first on")
        rope = config.get("rope_parameters") or {}
        theta = lambda name, kind: float(config.get(name) or rope.get(kind, {}).get("rope_theta"))
        return {
            "width": config["hidden_size"],
            "layers": layers,
            "heads": config["num_attention_heads"],
            "hidden": config["intermediate_size"],
            "window": config["local_attention"] // 2,
            "every": every,
            "theta": theta("global_rope_theta", "full_attention"),
            "local_theta": theta("local_rope_theta", "sliding_attention"),
            "eps": config["norm_eps"],
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """Their config."""
        family, vocabulary = trunk.family, trunk.vocabulary
        rope = lambda theta: {"rope_type": "default", "rope_theta": theta}
        return PLAIN | {
            "architectures": ["ModernBertForMaskedLM"],
            "model_type": "modernbert",
            "vocab_size": vocabulary.size,
            "hidden_size": family["width"],
            "num_hidden_layers": family["layers"],
            "num_attention_heads": family["heads"],
            "intermediate_size": family["hidden"],
            "local_attention": 2 * family["window"],
            "global_attn_every_n_layers": family["every"],
            "global_rope_theta": family["theta"],
            "local_rope_theta": family["local_theta"],
            "rope_parameters": {
                "full_attention": rope(family["theta"]),
                "sliding_attention": rope(family["local_theta"]),
            },
            "norm_eps": family["eps"],
            "pad_token_id": vocabulary.pad,
            "bos_token_id": vocabulary.bos,
            "eos_token_id": vocabulary.eos,
            "cls_token_id": vocabulary.cls,
            "sep_token_id": vocabulary.sep,
            "tie_word_embeddings": True,
        }

    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Embeddings, layers, head."""
        size, heads = family["vocabulary"], family["heads"]
        yield rows_padded("model.embeddings.tok_embeddings.weight", "table", rows, size)
        yield same("model.embeddings.norm.weight", "embedding_norm/scale")
        for i in range(family["layers"]):
            theirs, ours = f"model.layers.{i}", f"stack/layers/{i}"
            if i:
                yield same(f"{theirs}.attn_norm.weight", f"{ours}/mixer_norm/scale")
            parts = tuple(heads_in("", f"{ours}/mixer/{name}", heads) for name in ("query", "key", "value"))
            yield joined(f"{theirs}.attn.Wqkv.weight", parts)
            yield heads_out(f"{theirs}.attn.Wo.weight", f"{ours}/mixer/out", heads)
            yield same(f"{theirs}.mlp_norm.weight", f"{ours}/feed_forward_norm/scale")
            parts = tuple(turned("", f"{ours}/feed_forward/{name}") for name in ("inner", "gate"))
            yield joined(f"{theirs}.mlp.Wi.weight", parts)
            yield turned(f"{theirs}.mlp.Wo.weight", f"{ours}/feed_forward/outer")
        yield same("model.final_norm.weight", "final_norm/scale")
        yield turned("head.dense.weight", "head/dense")
        yield same("head.norm.weight", "head/norm/scale")
        yield rows_padded("decoder.bias", "head/bias", rows, size)

    def spare(self, name: str) -> bool:
        """The tied decoder."""
        return name == "decoder.weight"
