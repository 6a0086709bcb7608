"""DeBERTa v2 and v3 as `transformers` lays them out: the masked-language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.families.family import Family
from models.hub.bert import ACTIVATIONS, layer
from models.hub.layout import Layout, Tensor, dense, norm, rows_padded, same
from partitioning import UserError

PLAIN = {
    "relative_attention": True,
    "share_att_key": True,
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 0,
    "legacy": True,
}


class Deberta(Layout):
    """See `Layout`."""

    models = ("deberta-v2",)
    shown = ("layers", "hidden", "types")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name."""
        # What a file leaves out is as in their class.
        absent = {
            "relative_attention": False,
            "share_att_key": False,
            "position_biased_input": True,
            "norm_rel_ebd": "none",
        }
        for name, value in PLAIN.items():
            found = config.get(name, absent.get(name, value))
            if found != value:
                raise UserError(f"{name} = {found!r}: this family has {value!r}")
        terms = config.get("pos_att_type") or []
        if sorted(terms.split("|") if isinstance(terms, str) else terms) != ["c2p", "p2c"]:
            raise UserError(f"pos_att_type = {terms!r}: this family has c2p and p2c")
        if config.get("position_buckets", -1) < 1:
            raise UserError(f"position_buckets = {config.get('position_buckets')!r}: this family has some")
        if config["hidden_act"] not in ACTIVATIONS:
            raise UserError(f"hidden_act = {config['hidden_act']!r}: expected one of {', '.join(ACTIVATIONS)}")
        if config.get("embedding_size", config["hidden_size"]) != config["hidden_size"]:
            raise UserError(f"embedding_size = {config['embedding_size']}: this family has that of the hidden states")
        longest = config.get("max_relative_positions", -1)
        return {
            "width": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "heads": config["num_attention_heads"],
            "hidden": config["intermediate_size"],
            "buckets": config["position_buckets"],
            "longest": longest if longest > 0 else config["max_position_embeddings"],
            "types": config["type_vocab_size"],
            "activation": ACTIVATIONS[config["hidden_act"]],
            "eps": config["layer_norm_eps"],
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """Their config."""
        family, vocabulary = trunk.family, trunk.vocabulary
        activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return PLAIN | {
            "architectures": ["DebertaV2ForMaskedLM"],
            "model_type": "deberta-v2",
            "vocab_size": vocabulary.size,
            "hidden_size": family["width"],
            "num_hidden_layers": family["layers"],
            "num_attention_heads": family["heads"],
            "intermediate_size": family["hidden"],
            "position_buckets": family["buckets"],
            "max_relative_positions": family["longest"],
            "max_position_embeddings": family["longest"],
            "pos_att_type": ["c2p", "p2c"],
            "type_vocab_size": family["types"],
            "hidden_act": activations[family["activation"]],
            "layer_norm_eps": family["eps"],
            "pad_token_id": vocabulary.pad,
            "bos_token_id": vocabulary.bos,
            "eos_token_id": vocabulary.eos,
            "tie_word_embeddings": True,
        }

    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Embeddings, distances, layers, head."""
        size, heads = family["vocabulary"], family["heads"]

        yield rows_padded("deberta.embeddings.word_embeddings.weight", "table", rows, size)
        if family["types"]:
            yield same("deberta.embeddings.token_type_embeddings.weight", "types")
        yield from norm("deberta.embeddings.LayerNorm", "embedding_norm")
        yield same("deberta.encoder.rel_embeddings.weight", "relative/table")
        yield from norm("deberta.encoder.LayerNorm", "relative/norm")
        for i in range(family["layers"]):
            yield from layer(f"deberta.encoder.layer.{i}", f"stack/layers/{i}", heads, "_proj")
        head = "cls.predictions.transform"
        yield from dense(f"{head}.dense", "head/dense")
        yield from norm(f"{head}.LayerNorm", "head/norm")
        yield rows_padded("cls.predictions.bias", "head/bias", rows, size)

    def spare(self, name: str) -> bool:
        """The tied decoder, and what later heads of theirs leave behind."""
        return ".decoder." in name or name.endswith("position_ids") or name.startswith("mask_predictions.")
