"""T5, T5 1.1, mT5 and Flan-T5 as `transformers` lays them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.families.family import Family
from models.hub.layout import Layout, Tensor, heads_in, heads_out, rows_padded, same, turned
from partitioning import UserError

# (activation, gated) by their name.
PROJECTIONS = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu_new": ("gelu_tanh", False),
    "silu": ("silu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-relu": ("relu", True),
    "gated-silu": ("silu", True),
}


class T5(Layout):
    """See `Layout`."""

    models = ("t5", "mt5")
    table = "encoder/table"
    shown = ("layers", "decoder_layers", "hidden", "tied")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name."""
        projection = config.get("feed_forward_proj", "relu")
        if projection not in PROJECTIONS:
            raise UserError(f"feed_forward_proj = {projection!r}: expected one of {', '.join(PROJECTIONS)}")
        activation, gated = PROJECTIONS[projection]
        # The first T5 ties its head and scales what it says; newer files say the second apart from the first.
        tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        return {
            "width": config["d_model"],
            "layers": config["num_layers"],
            "decoder_layers": config.get("num_decoder_layers") or config["num_layers"],
            "heads": config["num_heads"],
            "head_width": config["d_kv"],
            "hidden": config["d_ff"],
            "activation": activation,
            "gated": gated,
            "buckets": config["relative_attention_num_buckets"],
            "longest": config.get("relative_attention_max_distance", 128),
            "tied": bool(tied),
            "eps": config["layer_norm_epsilon"],
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """Their config."""
        family, vocabulary = trunk.family, trunk.vocabulary
        names = {form: name for name, form in PROJECTIONS.items()}
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "vocab_size": vocabulary.size,
            "d_model": family["width"],
            "num_layers": family["layers"],
            "num_decoder_layers": family["decoder_layers"],
            "num_heads": family["heads"],
            "d_kv": family["head_width"],
            "d_ff": family["hidden"],
            "feed_forward_proj": names[family["activation"], family["gated"]],
            "relative_attention_num_buckets": family["buckets"],
            "relative_attention_max_distance": family["longest"],
            "layer_norm_epsilon": family["eps"],
            "tie_word_embeddings": family["tied"],
            "pad_token_id": vocabulary.pad,
            "eos_token_id": vocabulary.eos,
            "decoder_start_token_id": vocabulary.pad,
        }

    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Embeddings, both sides, head."""
        size, heads = family["vocabulary"], family["heads"]
        yield rows_padded("shared.weight", "encoder/table", rows, size)
        for side, layers in (("encoder", family["layers"]), ("decoder", family["decoder_layers"])):
            first = f"{side}.block.0.layer.0.SelfAttention"
            yield same(f"{first}.relative_attention_bias.weight", f"{side}/relative/table")
            for i in range(layers):
                kinds = [("SelfAttention", "mixer")] + [("EncDecAttention", "cross")] * (side == "decoder")
                ours = f"{side}/stack/layers/{i}"
                for j, (kind, name) in enumerate(kinds):
                    theirs = f"{side}.block.{i}.layer.{j}"
                    for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
                        yield heads_in(f"{theirs}.{kind}.{letter}.weight", f"{ours}/{name}/{part}", heads)
                    yield heads_out(f"{theirs}.{kind}.o.weight", f"{ours}/{name}/out", heads)
                    yield same(f"{theirs}.layer_norm.weight", f"{ours}/{name}_norm/scale")
                theirs = f"{side}.block.{i}.layer.{len(kinds)}"
                words = [("wi_0", "inner"), ("wi_1", "gate")] if family["gated"] else [("wi", "inner")]
                for word, part in (*words, ("wo", "outer")):
                    yield turned(f"{theirs}.DenseReluDense.{word}.weight", f"{ours}/feed_forward/{part}")
                yield same(f"{theirs}.layer_norm.weight", f"{ours}/feed_forward_norm/scale")
            yield same(f"{side}.final_layer_norm.weight", f"{side}/final_norm/scale")
        if not family["tied"]:
            yield rows_padded("lm_head.weight", "encoder/head/table", rows, size)

    def spare(self, name: str) -> bool:
        """The shared table under its other names."""
        return name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
