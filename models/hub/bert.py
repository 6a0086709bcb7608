"""BERT and RoBERTa as `transformers` lays them out: the masked-language models of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.families.family import Family
from models.hub.layout import Layout, Tensor, dense, heads_bias, heads_in, heads_out, norm, rows_padded, same
from partitioning import UserError

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


def layer(theirs: str, ours: str, heads: int, projection: str) -> Iterator[Tensor]:
    """A layer of BERT's kind; `projection` ends the names of those to heads."""
    for name in ("query", "key", "value"):
        yield heads_in(f"{theirs}.attention.self.{name}{projection}.weight", f"{ours}/mixer/{name}", heads)
        yield heads_bias(f"{theirs}.attention.self.{name}{projection}.bias", f"{ours}/mixer/{name}_bias", heads)
    yield heads_out(f"{theirs}.attention.output.dense.weight", f"{ours}/mixer/out", heads)
    yield same(f"{theirs}.attention.output.dense.bias", f"{ours}/mixer/out_bias")
    yield from norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/mixer_norm")
    yield from dense(f"{theirs}.intermediate.dense", f"{ours}/feed_forward/inner")
    yield from dense(f"{theirs}.output.dense", f"{ours}/feed_forward/outer")
    yield from norm(f"{theirs}.output.LayerNorm", f"{ours}/feed_forward_norm")


class Bert(Layout):
    """See `Layout`."""

    models = ("bert", "roberta", "xlm-roberta", "camembert")
    shown = ("layers", "hidden", "longest", "types")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name; RoBERTa's positions begin at the padding token's row + 1."""
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise UserError(f"position_embedding_type = {config['position_embedding_type']!r}: expected 'absolute'")
        if config["hidden_act"] not in ACTIVATIONS:
            raise UserError(f"hidden_act = {config['hidden_act']!r}: expected one of {', '.join(ACTIVATIONS)}")
        offset = 0 if config["model_type"] == "bert" else config["pad_token_id"] + 1
        return {
            "width": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "heads": config["num_attention_heads"],
            "hidden": config["intermediate_size"],
            "longest": config["max_position_embeddings"] - offset,
            "types": config["type_vocab_size"],
            "offset": offset,
            "activation": ACTIVATIONS[config["hidden_act"]],
            "eps": config["layer_norm_eps"],
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """RoBERTa where there is an offset, else BERT."""
        family, vocabulary = trunk.family, trunk.vocabulary
        kind = "roberta" if family["offset"] else "bert"
        activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return {
            "architectures": ["RobertaForMaskedLM" if kind == "roberta" else "BertForMaskedLM"],
            "model_type": kind,
            "vocab_size": vocabulary.size,
            "hidden_size": family["width"],
            "num_hidden_layers": family["layers"],
            "num_attention_heads": family["heads"],
            "intermediate_size": family["hidden"],
            "max_position_embeddings": family["longest"] + family["offset"],
            "type_vocab_size": family["types"],
            "hidden_act": activations[family["activation"]],
            "layer_norm_eps": family["eps"],
            "pad_token_id": family["offset"] - 1 if family["offset"] else vocabulary.pad,
            "bos_token_id": vocabulary.bos,
            "eos_token_id": vocabulary.eos,
            "tie_word_embeddings": True,
        }

    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Embeddings, layers, head."""
        roberta, heads = bool(family["offset"]), family["heads"]
        base = "roberta" if roberta else "bert"
        size = family["vocabulary"]

        embeddings = f"{base}.embeddings"
        yield rows_padded(f"{embeddings}.word_embeddings.weight", "table", rows, size)
        yield same(f"{embeddings}.position_embeddings.weight", "positions/table")
        yield same(f"{embeddings}.token_type_embeddings.weight", "types")
        yield from norm(f"{embeddings}.LayerNorm", "embedding_norm")
        for i in range(family["layers"]):
            yield from layer(f"{base}.encoder.layer.{i}", f"stack/layers/{i}", heads, "")
        head = "lm_head" if roberta else "cls.predictions.transform"
        yield from dense(f"{head}.dense", "head/dense")
        yield from norm(f"{head}.layer_norm" if roberta else f"{head}.LayerNorm", "head/norm")
        yield rows_padded("lm_head.bias" if roberta else "cls.predictions.bias", "head/bias", rows, size)

    def spare(self, name: str) -> bool:
        """The tied decoder, and buffers that older versions kept."""
        return ".decoder." in name or name.endswith("position_ids")
